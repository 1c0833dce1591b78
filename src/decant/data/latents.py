"""Pictures and captions, encoded once: training then runs neither the VAE nor the text encoder."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from decant.data.batch import Batch
from decant.data.folder import Captioned, picture
from decant.errors import refuse

EncodePictures = Callable[[Tensor], tuple[Tensor, Tensor]]
EncodeCaptions = Callable[[Sequence[str]], dict[str, Tensor]]
Null = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Latents:
    """The moments of ``n`` pictures, ``(n, C, h, w)`` each, and the conditions of their captions.

    ``rows`` ``(n,)`` says which row of the tables ``condition`` and ``null`` is a picture's: equal captions
    share one. A null that is the same for every caption is stored as a single row.
    """

    mean: Tensor
    std: Tensor
    rows: Tensor
    condition: dict[str, Tensor]
    null: dict[str, Tensor]

    @property
    def n(self) -> int:
        """How many pictures there are."""
        return len(self.rows)

    def batch(self, positions: tuple[int, ...]) -> Batch:
        """The pictures at these positions of the endless stream; position % n is the index of a picture."""
        index = torch.tensor([position % self.n for position in positions])
        rows = self.rows[index]
        condition = {key: table[rows] for key, table in self.condition.items()}
        null = {key: table[rows if len(table) > 1 else rows * 0] for key, table in self.null.items()}
        return Batch(tuple(positions), self.mean[index], self.std[index], condition, null)


def encode_all(
    captioned: Captioned,
    size: int,
    encode_pictures: EncodePictures,
    encode_captions: EncodeCaptions,
    null: Null,
    chunk: int = 16,
    progress: Progress | None = None,
) -> Latents:
    """Encode every picture, at ``size`` pixels, and every different caption, once.

    Chunks are fixed by index, so the floats depend on the data and ``chunk`` alone. ``encode_pictures`` maps
    ``(B, 3, size, size)`` in [-1, 1] to scaled latent mean and standard deviation ``(B, C, h, w)``;
    ``progress(done)`` counts pictures. Raises ``UserError`` where the encoder gives numbers that are
    not finite.
    """
    assert captioned.files and chunk >= 1, "nothing to encode"
    captions = list(dict.fromkeys(captioned.captions))
    row = {caption: index for index, caption in enumerate(captions)}
    rows = torch.tensor([row[caption] for caption in captioned.captions])
    condition, empty = _encode_captions(captions, encode_captions, null, chunk)
    mean, std = _encode_pictures(captioned.files, size, encode_pictures, chunk, progress)
    return Latents(mean, std, rows, condition, empty)


@torch.no_grad()
def _encode_pictures(
    files: Sequence[Path], size: int, encode: EncodePictures, chunk: int, progress: Progress | None
) -> tuple[Tensor, Tensor]:
    means, stds = [], []
    for start in range(0, len(files), chunk):
        part = files[start : start + chunk]
        mean, std = encode(torch.stack([picture(file, size) for file in part]))
        if not (mean.isfinite().all() and std.isfinite().all()):
            hint = "check the VAE's weights; some VAEs overflow in float16, so encode in float32"
            names = f"one of {part[0].name} ... {part[-1].name}"
            raise refuse("data", f"the latents of {names} are not finite", allowed="finite latents", hint=hint)
        means.append(mean.cpu())
        stds.append(std.cpu())
        if progress is not None:
            progress(start + len(part))
    return torch.cat(means), torch.cat(stds)


@torch.no_grad()
def _encode_captions(
    captions: Sequence[str], encode: EncodeCaptions, null: Null, chunk: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tables of conditions and of their unconditional twins, one row a caption."""
    conditions, nulls = [], []
    for part in _chunks(captions, chunk):
        condition = encode(part)
        conditions.append({key: value.cpu() for key, value in condition.items()})
        nulls.append({key: value.cpu() for key, value in null(condition).items()})
    return _joined(conditions), {key: _compact(table) for key, table in _joined(nulls).items()}


def _chunks(captions: Sequence[str], chunk: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(captions), chunk):
        yield captions[start : start + chunk]


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _compact(table: Tensor) -> Tensor:
    """A single row where all rows are equal."""
    return table[:1].clone() if bool((table == table[:1]).all()) else table
