"""Crops, mirrored pictures and other aspects: what is cached, and what each epoch draws."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from decant.data.latents import Cache, Latents, encode_all
from decant.data.picture import View, framed_picture, look
from decant.data.source import read


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A picture of 48 x 16 whose every column is known by its colour."""
    columns = np.zeros((16, 48, 3), dtype=np.uint8)
    columns[:, :, 0] = np.arange(48) * 5
    Image.fromarray(columns).save(tmp_path / "wide.png")
    return tmp_path / "wide.png"


def _columns(file: Path, view: View) -> torch.Tensor:
    """Which columns of the picture a view shows, (16,): between two where the crop lies between them."""
    digest = look(file).digest
    pixels = framed_picture(file, 16, digest, view)[0]
    return (pixels[0, 8] + 1) * 127.5 / 5


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=0.4)


def test_a_mirrored_view_shows_the_same_part_from_the_other_side(wide: Path) -> None:
    for crop in (None, 0, 1, 2):
        plain, mirrored = _columns(wide, View(crop=crop)), _columns(wide, View(crop=crop, flip=True))
        assert _near(mirrored, plain.flip(0)) and _near(plain - plain.mean(), torch.arange(16) - 7.5)
    assert _near(_columns(wide, View()), torch.arange(16.0, 32.0))


def test_random_crops_lie_all_over_and_belong_to_the_picture(wide: Path) -> None:
    starts = [round(float(_columns(wide, View(crop=number))[0])) for number in range(60)]
    assert starts == [round(float(_columns(wide, View(crop=number))[0])) for number in range(60)]
    assert min(starts) <= 4 and max(starts) >= 28 and len(set(starts)) > 15


@pytest.mark.parametrize("crop", [None, 0, 5])
@pytest.mark.parametrize("flip", [False, True])
def test_the_frame_says_where_the_crop_lies(wide: Path, crop: int | None, flip: bool) -> None:
    """In the picture as it was cropped, so a mirrored one counts from its own left."""
    frame = framed_picture(wide, 16, look(wide).digest, View(crop=crop, flip=flip))[1]
    first = float(_columns(wide, View(crop=crop, flip=flip))[0])
    assert frame.original == (16, 48) and frame.target == (16, 16)
    assert frame.corner[0] == 0 and abs(frame.corner[1] - (47 - first if flip else first)) < 1


def test_letterbox_and_stretch_show_the_whole_picture(wide: Path) -> None:
    boxed, frame = framed_picture(wide, 48, None, View("letterbox"))
    assert frame.corner == (0, 0) and (boxed[:, :16] == -1).all() and (boxed[:, 32:] == -1).all()
    columns = ((boxed[0, 24] + 1) * 127.5 / 5).round().int().tolist()
    assert columns == list(range(48))
    stretched = framed_picture(wide, 16, None, View("stretch"))[0]
    assert torch.allclose((stretched[0, 8] + 1) * 127.5 / 5, torch.arange(16) * 3 + 1.0, atol=0.5)


def _folder(folder: Path, n: int = 6) -> Path:
    """Halves of different colours, so that a mirrored picture is another."""
    folder.mkdir()
    for index in range(n):
        image = Image.new("RGB", (16, 16), (index * 30, 0, 0))
        image.paste((0, 200, index), (8, 0, 16, 16))
        image.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"picture {index}")
    return folder


def _latents(data: Path, encoder: Any, cache: Path, views: tuple[View, ...], seed: int = 0) -> Latents:
    kept = Cache(cache, cache, lambda line: None)
    return encode_all(read(data), 16, encoder, kept, seed=seed, views=views)


def test_each_epoch_draws_a_view_and_its_latents_are_those_of_the_picture_seen_so(tmp_path: Path, spelled: Any) -> None:
    """A latent of a mirrored picture is what the encoder gives for the mirrored picture."""
    data, views = _folder(tmp_path / "data"), View.several("crop", 0, flip=True)
    assert views == (View(), View(flip=True))
    latents = _latents(data, spelled, tmp_path / "cache", views)
    assert latents.n == 6
    positions = tuple(range(600))
    whole = latents.batch(positions)
    seen: Counter[tuple[int, bool]] = Counter()
    for row, position in enumerate(positions):
        both = [framed_picture(data / f"{position % 6}.png", 16, None, view)[0] for view in views]
        means = [torch.nn.functional.avg_pool2d(picture[None], 8)[0] for picture in both]
        assert not means[0].equal(means[1])
        flipped = whole.mean[row].equal(means[1])
        assert flipped or whole.mean[row].equal(means[0])
        assert spelled.read(whole.condition["words"][row]) == f"picture {position % 6}"
        seen[position % 6, flipped] += 1
    assert all(30 <= seen[index, flip] <= 70 for index in range(6) for flip in (False, True)), seen
    for start in (0, 299, 595):
        assert latents.batch(positions[start : start + 5]).mean.equal(whole.mean[start : start + 5])
    assert not _latents(data, spelled, tmp_path / "cache", views, seed=1).batch(positions).mean.equal(whole.mean)


def test_views_share_the_cache_of_the_plain_picture(tmp_path: Path, spelled: Any) -> None:
    data, cache = _folder(tmp_path / "data"), tmp_path / "cache"
    _latents(data, spelled, cache, (View(),))
    assert spelled.pictures == 6
    _latents(data, spelled, cache, View.several("crop", 0, flip=True))
    assert spelled.pictures == 12
    _latents(data, spelled, cache, View.several("crop", 3, flip=True))
    spelled.pictures = 0
    latents = _latents(data, spelled, cache, View.several("crop", 3, flip=True))
    assert spelled.pictures == 0 and latents.views == 6 and len(latents.mean) == 36
