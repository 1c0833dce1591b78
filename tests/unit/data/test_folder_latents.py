from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from decant.data.folder import Captioned, picture
from decant.data.latents import Latents, encode_all
from decant.errors import UserError

_WORDS = ("red", "green", "red", "blue", "green", "red", "white")


def _captioned(folder: Path) -> Captioned:
    files = []
    for index, word in enumerate(_WORDS):
        file = folder / f"{index}.png"
        Image.new("RGB", (16, 16), (index * 20, 10, 200)).save(file)
        files.append(file)
        assert word
    return Captioned(tuple(files), _WORDS, (), folder)


def _encode_pictures(pictures: Tensor) -> tuple[Tensor, Tensor]:
    mean = torch.nn.functional.avg_pool2d(pictures, 8)
    return mean, mean.abs() / 2


def _row(caption: str) -> Tensor:
    return torch.tensor([float(ord(letter)) for letter in caption[:3]])


def _encode_captions(captions: Sequence[str]) -> dict[str, Tensor]:
    return {"encoder_hidden_states": torch.stack([_row(caption) for caption in captions])[:, None]}


def _null(condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros_like(value) for key, value in condition.items()}


def _encoded(folder: Path, chunk: int = 3) -> Latents:
    return encode_all(_captioned(folder), 16, _encode_pictures, _encode_captions, _null, chunk)


def test_every_sample_has_its_own_picture_and_caption(tmp_path: Path) -> None:
    latents = _encoded(tmp_path)
    batch = latents.batch((12, 0, 3, 7 * 40 + 6))
    assert latents.n == 7 and batch.samples == (12, 0, 3, 286)
    for row, index in enumerate((5, 0, 3, 6)):
        mean, std = _encode_pictures(picture(tmp_path / f"{index}.png", 16)[None])
        assert torch.equal(batch.mean[row], mean[0]) and torch.equal(batch.std[row], std[0])
        assert torch.equal(batch.condition["encoder_hidden_states"][row, 0], _row(_WORDS[index]))
    assert torch.equal(batch.null["encoder_hidden_states"], torch.zeros(4, 1, 3))


def test_equal_captions_are_encoded_and_stored_once(tmp_path: Path) -> None:
    seen: list[str] = []

    def encode(captions: Sequence[str]) -> dict[str, Tensor]:
        seen.extend(captions)
        return _encode_captions(captions)

    latents = encode_all(_captioned(tmp_path), 16, _encode_pictures, encode, _null, 2)
    assert seen == ["red", "green", "blue", "white"]
    assert len(latents.condition["encoder_hidden_states"]) == 4
    assert len(latents.null["encoder_hidden_states"]) == 1


def test_a_null_that_follows_its_caption_stays_with_it(tmp_path: Path) -> None:
    def null(condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: -value for key, value in condition.items()}

    latents = encode_all(_captioned(tmp_path), 16, _encode_pictures, _encode_captions, null)
    batch = latents.batch((3, 6, 0))
    assert torch.equal(batch.null["encoder_hidden_states"], -batch.condition["encoder_hidden_states"])


def test_chunks_are_fixed_by_index_and_progress_counts_pictures(tmp_path: Path) -> None:
    sizes: list[int] = []
    told: list[int] = []

    def encode(pictures: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(pictures))
        return _encode_pictures(pictures)

    captioned = _captioned(tmp_path)
    encode_all(captioned, 16, encode, _encode_captions, _null, 3, told.append)
    assert sizes == [3, 3, 1] and told == [3, 6, 7]


def test_latents_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    def broken(pictures: Tensor) -> tuple[Tensor, Tensor]:
        return pictures / 0, pictures

    with pytest.raises(UserError, match="not finite"):
        encode_all(_captioned(tmp_path), 16, broken, _encode_captions, _null)


def test_nothing_keeps_a_graph(tmp_path: Path) -> None:
    weight = torch.ones((), requires_grad=True)

    def encode(pictures: Tensor) -> tuple[Tensor, Tensor]:
        return pictures * weight, pictures * weight

    latents = encode_all(_captioned(tmp_path), 16, encode, _encode_captions, _null)
    assert not latents.mean.requires_grad and not latents.std.requires_grad
