"""Latents through the cache: what is encoded, how often, and that nobody can tell whether it was there before."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from decant.data.batch import Batch
from decant.data.captioned import Captioned
from decant.data.latents import Cache, Latents, encode_all
from decant.data.picture import Frame, picture
from decant.data.source import read
from decant.errors import UserError

_WORDS = ("red", "green", "red", "blue", "green", "red", "white")
SIZE = 16


class _Encoder:
    """A linear "VAE" and spelled captions; counts what it is asked for."""

    def __init__(self, made_by: str = "1", text: str = "1") -> None:
        self.pictures, self.captions, self.sizes = 0, 0, set[int]()
        self.said = {"pictures": made_by, "captions": text}

    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        self.pictures += len(torch.unique(pictures, dim=0))
        self.sizes.add(len(pictures))
        mean = torch.nn.functional.avg_pool2d(pictures, 8)
        return mean, mean.abs() / 2

    def condition(self, captions: Sequence[str]) -> dict[str, Tensor]:
        self.captions += len(set(captions))
        return {"encoder_hidden_states": torch.stack([_row(caption) for caption in captions])[:, None]}

    def null(self, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: torch.zeros_like(value) for key, value in condition.items()}

    def framing(self, frames: Sequence[Frame]) -> dict[str, Tensor]:
        return {}

    def made_by(self) -> dict[str, str]:
        return self.said


class _Following(_Encoder):
    """The unconditional twin depends on its caption."""

    def null(self, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: -value for key, value in condition.items()}


def _row(caption: str) -> Tensor:
    return torch.tensor([float(ord(letter)) for letter in caption[:3]])


def _add(folder: Path, numbers: Sequence[int], words: Sequence[str] = _WORDS) -> None:
    folder.mkdir(exist_ok=True)
    for index in numbers:
        colour = (index * 20 % 256, index // 12, 200)
        Image.new("RGB", (SIZE, SIZE), colour).save(folder / f"{index:05d}.png")
        (folder / f"{index:05d}.txt").write_text(words[index % len(words)])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    _add(tmp_path / "data", range(7))
    return tmp_path / "data"


def _encode(data: Path | Captioned, encoder: _Encoder, cache: Path, said: list[str] | None = None) -> Latents:
    captioned = data if isinstance(data, Captioned) else read(data)
    talk = said.append if said is not None else lambda line: None
    return encode_all(captioned, SIZE, encoder, Cache(cache, cache.with_name("spare"), talk))


def _all(latents: Latents) -> Batch:
    return latents.batch(tuple(range(latents.n)))


def _same(a: Batch, b: Batch) -> bool:
    pairs = [(a.mean, b.mean), (a.std, b.std)]
    pairs += [(x[key], y[key]) for x, y in ((a.condition, b.condition), (a.null, b.null)) for key in x]
    return all(torch.equal(x, y) for x, y in pairs)


def test_every_sample_has_its_own_picture_and_caption(data: Path, tmp_path: Path) -> None:
    encoder = _Encoder()
    latents = _encode(data, encoder, tmp_path / "cache")
    batch = latents.batch((12, 0, 3, 7 * 40 + 6))
    assert latents.n == 7 and batch.samples == (12, 0, 3, 286)
    for row, index in enumerate((5, 0, 3, 6)):
        mean, std = encoder.encode(picture(data / f"{index:05d}.png", SIZE)[None])
        assert torch.equal(batch.mean[row], mean[0]) and torch.equal(batch.std[row], std[0])
        assert torch.equal(batch.condition["encoder_hidden_states"][row, 0], _row(_WORDS[index]))
    assert torch.equal(batch.null["encoder_hidden_states"], torch.zeros(4, 1, 3))


def test_a_null_that_follows_its_caption_stays_with_it(data: Path, tmp_path: Path) -> None:
    batch = _encode(data, _Following(), tmp_path / "cache").batch((3, 6, 0))
    assert torch.equal(batch.null["encoder_hidden_states"], -batch.condition["encoder_hidden_states"])


def test_equal_pictures_and_equal_captions_are_encoded_once(data: Path, tmp_path: Path) -> None:
    (data / "copy.png").write_bytes((data / "00003.png").read_bytes())
    (data / "copy.txt").write_text("green")
    encoder = _Encoder()
    latents = _encode(data, encoder, tmp_path / "cache")
    assert (latents.n, encoder.pictures, encoder.captions) == (8, 7, 4)
    batch = _all(latents)
    assert torch.equal(batch.mean[7], batch.mean[3])
    assert torch.equal(batch.condition["encoder_hidden_states"][7], batch.condition["encoder_hidden_states"][1])


def test_a_warm_cache_encodes_nothing_and_gives_the_same_bits(data: Path, tmp_path: Path) -> None:
    first, again = _Encoder(), _Encoder()
    cold = _all(_encode(data, first, tmp_path / "cache"))
    said: list[str] = []
    warm = _all(_encode(data, again, tmp_path / "cache", said))
    assert (first.pictures, again.pictures, again.captions) == (7, 0, 0)
    assert _same(cold, warm) and "7 of 7 pictures were encoded before" in said[0]


def test_ten_more_pictures_cost_ten(tmp_path: Path) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache"
    _add(data, range(60))
    _encode(data, _Encoder(), cache)
    _add(data, range(60, 70))
    encoder = _Encoder()
    grown = _all(_encode(data, encoder, cache))
    assert (encoder.pictures, encoder.captions) == (10, 0)
    assert _same(grown, _all(_encode(data, _Encoder(), tmp_path / "fresh")))


def test_a_picture_swapped_for_another_of_its_size_is_noticed(data: Path, tmp_path: Path) -> None:
    """Equal name, equal length, equal times: only the contents tell."""
    file, cache = data / "00002.ppm", tmp_path / "cache"
    (data / "00002.png").unlink()
    Image.new("RGB", (SIZE, SIZE), "red").save(file)
    _encode(data, _Encoder(), cache)
    before = file.stat()
    Image.new("RGB", (SIZE, SIZE), "lime").save(file)
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    encoder = _Encoder()
    batch = _encode(data, encoder, cache).batch((2,))
    assert encoder.pictures == 1
    assert torch.allclose(batch.mean[0, :, 0, 0], torch.tensor([-1.0, 1.0, -1.0]))


def test_another_encoder_or_size_shares_nothing(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    _encode(data, _Encoder(), cache)
    other, text = _Encoder(made_by="2"), _Encoder(text="2")
    _encode(data, other, cache)
    _encode(data, text, cache)
    assert (other.pictures, other.captions, text.pictures, text.captions) == (7, 0, 0, 4)
    larger = _Encoder()
    talk: list[str] = []
    encode_all(read(data), 32, larger, Cache(cache, cache, talk.append))
    assert (larger.pictures, larger.captions) == (7, 0)


def test_the_encoder_always_gets_the_same_number_of_rows(data: Path, tmp_path: Path) -> None:
    """Kernels round differently for other numbers of rows."""
    _add(data, range(7, 40))
    encoder = _Encoder()
    _encode(data, encoder, tmp_path / "cache")
    assert len(encoder.sizes) == 1 and encoder.pictures == 40


def test_progress_counts_pictures(data: Path, tmp_path: Path) -> None:
    told: list[int] = []
    _add(data, range(7, 40))
    cache = Cache(tmp_path / "cache", tmp_path / "cache", lambda line: None)
    encode_all(read(data), SIZE, _Encoder(), cache, told.append)
    assert told == sorted(told) and told[-1] == 40


def test_latents_that_are_not_finite_are_refused_and_not_kept(data: Path, tmp_path: Path) -> None:
    class Broken(_Encoder):
        def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
            return pictures / 0, pictures

    with pytest.raises(UserError, match="not finite"):
        _encode(data, Broken(), tmp_path / "cache")
    encoder = _Encoder()
    _encode(data, encoder, tmp_path / "cache")
    assert encoder.pictures == 7


def test_what_was_encoded_before_a_stop_is_kept(tmp_path: Path) -> None:
    data = tmp_path / "data"
    _add(data, range(40))

    class Stopping(_Encoder):
        def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
            if self.pictures >= 32:
                raise KeyboardInterrupt
            return super().encode(pictures)

    stopped, encoder = Stopping(), _Encoder()
    with pytest.raises(KeyboardInterrupt):
        _encode(data, stopped, tmp_path / "cache")
    resumed = _all(_encode(data, encoder, tmp_path / "cache"))
    assert encoder.pictures == 40 - stopped.pictures
    assert _same(resumed, _all(_encode(data, _Encoder(), tmp_path / "fresh")))


def test_a_picture_that_changes_after_the_scan_is_replaced_and_named(tmp_path: Path) -> None:
    """By another, caption and all; which one follows from the seed and its name. More than a tenth is too many."""
    _add(tmp_path / "data", range(40), words=[f"{number:03d}" for number in range(40)])
    data, captioned = tmp_path / "data", read(tmp_path / "data")
    (data / "00005.png").unlink()
    (data / "00011.png").write_bytes((data / "00011.png").read_bytes()[:-20])
    Image.new("RGB", (SIZE, SIZE), "black").save(data / "00020.png")
    said: list[str] = []
    first = _encode(captioned, _Encoder(), tmp_path / "a", said)
    assert [item.name for item in first.replaced] == ["00005.png", "00011.png", "00020.png"]
    whole = _all(first)
    rows = {index: whole.mean[index].flatten().tolist() for index in range(40)}
    for lost in (5, 11, 20):
        place = next(index for index in range(40) if index not in (5, 11, 20) and rows[index] == rows[lost])
        assert whole.condition["encoder_hidden_states"][lost].equal(whole.condition["encoder_hidden_states"][place])
    assert _same(whole, _all(_encode(captioned, _Encoder(), tmp_path / "b")))
    for name in ("00001.png", "00002.png"):
        (data / name).unlink()
    with pytest.raises(UserError, match=r"5 of 40 pictures[\s\S]*hint:"):
        _encode(captioned, _Encoder(), tmp_path / "c")
    kept = _all(_encode(captioned, _Encoder(), tmp_path / "a"))  # what was encoded before needs no file
    assert _same(kept, whole)


def test_nothing_keeps_a_graph(data: Path, tmp_path: Path) -> None:
    class Trainable(_Encoder):
        weight = torch.ones((), requires_grad=True)

        def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
            return pictures * self.weight, pictures * self.weight

    batch = _all(_encode(data, Trainable(), tmp_path / "cache"))
    assert not batch.mean.requires_grad and not batch.std.requires_grad
