"""Pictures and captions, encoded once and kept on disk: training then runs neither the VAE nor the text encoder."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from decant.data.batch import Batch
from decant.data.captioned import Captioned
from decant.data.picture import CROP, Frame, ahead, framed_picture
from decant.data.shards import Rows, Shards
from decant.errors import refuse
from decant.maths.seeds import seed_of

Table = Tensor | Rows
Progress = Callable[[int], object]

_FORMAT = 1  # raised whenever the same inputs would give other rows
_FLUSH_BYTES = 16 * 2**20
_FLUSH_SECONDS = 60.0  # what a kill may cost
_CAPTIONS_AT_ONCE = 16
_DRAWN_AT_ONCE = 8
_PIXELS_AT_ONCE = 16 * 64 * 64

_Item = TypeVar("_Item")


class Encoder(Protocol):
    """What turns pictures and captions into what a network is trained on; a family is one."""

    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, 3, size, size)`` in [-1, 1] -> mean and standard deviation ``(B, C, h, w)`` of the scaled latents."""
        ...

    def condition(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What the network is told about B captions, each value with B as its first axis."""
        ...

    def null(self, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The unconditional twin of what ``condition`` gave, same keys and shapes."""
        ...

    def framing(self, frames: Sequence[Frame]) -> dict[str, Tensor]:
        """What the network is told about how B pictures were framed; often ``{}``."""
        ...

    def made_by(self) -> dict[str, str]:
        """``{"pictures", "captions"}``: digests of all that ``encode`` and ``framing``, and ``condition`` and ``null``,
        depend on.
        """
        ...


class Drawer(Protocol):
    """What gives latents for captions that have no pictures."""

    @property
    def made_by(self) -> Mapping[str, str]:
        """All that ``draw`` depends on beside the captions."""
        ...

    def draw(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation ``(B, C, h, w)`` of scaled latents, each decided by its own caption."""
        ...


@dataclass(frozen=True)
class Cache:
    """A folder that keeps what was encoded; ``spare`` takes what cannot be written there."""

    folder: Path
    spare: Path
    talk: Callable[[str], None]

    def shards(self, made_by: Mapping[str, str], keys: Sequence[bytes]) -> Shards:
        """The rows of these keys among those that were made by this."""
        name = hashlib.sha256(json.dumps([_FORMAT, made_by], sort_keys=True).encode()).hexdigest()[:32]
        folders = dict.fromkeys(root / f"{made_by['what']}-{name}" for root in (self.folder, self.spare))
        return Shards(list(folders), keys, self.talk)


@dataclass(frozen=True)
class Latents:
    """The moments of ``n`` pictures, ``(n, C, h, w)`` each, and the conditions of their captions; in memory or on disk.

    ``rows`` ``(n,)`` says which row of the tables ``condition`` and ``null`` is a picture's: equal captions share
    one. Where pictures have several captions it is ``(n, k)``, filled up with -1, and every epoch draws one of a
    picture's rows from (``seed``, position). A table that is the same for all is stored as a single row. ``framing`` is
    what the network is told about each picture itself, with caption or without: a part of every condition and of its
    null.
    """

    mean: Table
    std: Table
    rows: Tensor
    condition: Mapping[str, Table]
    null: Mapping[str, Table]
    framing: Mapping[str, Table] = field(default_factory=dict)
    seed: int = 0

    @property
    def n(self) -> int:
        """How many pictures there are."""
        return len(self.rows)

    def batch(self, positions: tuple[int, ...]) -> Batch:
        """The pictures at these positions of the endless stream; position % n is the index of a picture."""
        index = torch.tensor([position % self.n for position in positions])
        rows = self.rows[index] if self.rows.ndim == 1 else torch.tensor([self._drawn(p) for p in positions])
        framing = {key: _gather(table, index) for key, table in self.framing.items()}
        condition = {key: _gather(table, rows) for key, table in self.condition.items()} | framing
        null = {key: _gather(table, rows) for key, table in self.null.items()} | framing
        return Batch(tuple(positions), _gather(self.mean, index), _gather(self.std, index), condition, null)

    def _drawn(self, position: int) -> int:
        """The row of the caption that is a picture's in this epoch."""
        rows = self.rows[position % self.n]
        known = int((rows >= 0).sum())
        return int(rows[seed_of(self.seed, "caption", position) % known])


def encode_all(
    captioned: Captioned,
    size: int,
    encoder: Encoder,
    cache: Cache,
    progress: Progress | None = None,
    seed: int = 0,
    drawer: Drawer | None = None,
) -> Latents:
    """Every picture, at ``size`` pixels, and every different caption, encoded unless the cache has it.

    A row depends on its picture or caption and on what encodes it, not on the others or on what the cache held: the
    encoders always get the same number of rows, the last chunk filled up. ``progress(done)`` counts pictures. ``seed``
    decides which of its captions a picture has in an epoch. Captions alone get the latents of ``drawer``. Raises
    ``UserError`` where the encoder gives numbers that are not finite.
    """
    assert captioned.files and len(captioned.digests) == len(captioned.files), "pictures that were looked at"
    choices = captioned.choices
    captions = list(dict.fromkeys(caption for own in choices for caption in own))
    rows = _rows(choices, {caption: index for index, caption in enumerate(captions)})
    texts = _captions(captions, encoder, cache)
    if captioned.alone:
        assert drawer is not None, "captions alone, and nothing that draws"
        moments = _drawn(captioned, size, encoder, drawer, cache, progress)
    else:
        moments = _pictures(captioned, size, encoder, cache, progress)
    condition, null, framing = _named(texts, "condition."), _named(texts, "null."), _named(moments, "framing.")
    return Latents(moments["mean"], moments["std"], rows, condition, null, framing, seed)


def _rows(choices: Sequence[Sequence[str]], row: Mapping[str, int]) -> Tensor:
    """The row of each picture's caption, ``(n,)``, or of its captions, ``(n, k)`` filled up with -1."""
    most = max(map(len, choices))
    rows = torch.tensor([[row[caption] for caption in own] + [-1] * (most - len(own)) for own in choices])
    return rows[:, 0] if most == 1 else rows


@torch.no_grad()
def _pictures(
    captioned: Captioned, size: int, encoder: Encoder, cache: Cache, progress: Progress | None
) -> dict[str, Table]:
    made_by = {"what": "pictures", "encoder": encoder.made_by()["pictures"], "size": str(size), "crop": CROP}
    shards = cache.shards(made_by, captioned.digests)
    files = dict(zip(captioned.digests, captioned.files, strict=True))
    missing = shards.missing
    if len(missing) < len(files):
        cache.talk(f"{len(files) - len(missing)} of {len(files)} pictures were encoded before: {cache.folder}")
    rows_at_once = max(1, min(16, _PIXELS_AT_ONCE // size**2))
    pixels = ahead(lambda key: framed_picture(files[key], size, key), missing, most=2 * rows_at_once + 8)
    with _Writer(shards) as writer:
        done = len(captioned.files) - len(missing)
        for keys in _chunks(missing, rows_at_once):
            part = _filled([next(pixels) for _ in keys], rows_at_once)
            mean, std = encoder.encode(torch.stack([picture for picture, _ in part]))
            _check_finite(mean, std, [files[key].name for key in keys])
            told = encoder.framing([frame for _, frame in part])
            writer.add(keys, {"mean": mean, "std": std} | {f"framing.{key}": value for key, value in told.items()})
            done += len(keys)
            if progress is not None:
                progress(done)
    return shards.tables(captioned.digests)


@torch.no_grad()
def _drawn(
    captioned: Captioned, size: int, encoder: Encoder, drawer: Drawer, cache: Cache, progress: Progress | None
) -> dict[str, Table]:
    """Latents of captions that have no pictures."""
    shards = cache.shards({"what": "drawn", "size": str(size), **drawer.made_by}, captioned.digests)
    words = dict(zip(captioned.digests, captioned.captions, strict=True))
    missing = shards.missing
    if len(missing) < len(words):
        cache.talk(f"{len(words) - len(missing)} of {len(words)} prompts were drawn before: {cache.folder}")
    with _Writer(shards) as writer:
        for number, keys in enumerate(_chunks(missing, _DRAWN_AT_ONCE), start=1):
            mean, std = drawer.draw(_filled([words[key] for key in keys], _DRAWN_AT_ONCE))
            _check_finite(mean, std, [words[key] for key in keys])
            writer.add(keys, {"mean": mean, "std": std})
            if progress is not None:
                progress(len(words) - len(missing) + min(number * _DRAWN_AT_ONCE, len(missing)))
    told = encoder.framing([Frame.whole(size, size)])
    return {**shards.tables(captioned.digests), **{f"framing.{key}": value for key, value in told.items()}}


@torch.no_grad()
def _captions(captions: Sequence[str], encoder: Encoder, cache: Cache) -> dict[str, Table]:
    """The tables of conditions and of their unconditional twins, one row a caption."""
    words = {hashlib.sha256(caption.encode()).digest(): caption for caption in captions}
    shards = cache.shards({"what": "captions", "encoder": encoder.made_by()["captions"]}, list(words))
    with _Writer(shards) as writer:
        for keys in _chunks(shards.missing, _CAPTIONS_AT_ONCE):
            condition = encoder.condition(_filled([words[key] for key in keys], _CAPTIONS_AT_ONCE))
            null = encoder.null(condition)
            tables = {f"condition.{key}": value for key, value in condition.items()}
            writer.add(keys, tables | {f"null.{key}": value for key, value in null.items()})
    return shards.tables(list(words))


@dataclass
class _Writer:
    """Collects rows and writes a file of them when it is worth one, and at the end."""

    shards: Shards
    keys: list[bytes] = field(default_factory=list)
    parts: list[dict[str, Tensor]] = field(default_factory=list)
    size: int = 0
    since: float = field(default_factory=time.monotonic)

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        """What was encoded before something went wrong is kept too."""
        self.flush()

    def add(self, keys: Sequence[bytes], tensors: Mapping[str, Tensor]) -> None:
        part = {name: tensor[: len(keys)].cpu() for name, tensor in tensors.items()}
        self.keys += keys
        self.parts.append(part)
        self.size += sum(tensor.numel() * tensor.element_size() for tensor in part.values())
        if self.size >= _FLUSH_BYTES or time.monotonic() - self.since >= _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self.keys:
            joined = {name: torch.cat([part[name] for part in self.parts]) for name in self.parts[0]}
            self.shards.add(self.keys, {name: _compact(table) for name, table in joined.items()})
        self.keys, self.parts, self.size, self.since = [], [], 0, time.monotonic()


def _check_finite(mean: Tensor, std: Tensor, names: Sequence[str]) -> None:
    if not (mean.isfinite().all() and std.isfinite().all()):
        hint = "check the VAE's weights; some VAEs overflow in float16, so encode in float32"
        raise refuse(
            "data",
            f"the latents of one of {names[0]} ... {names[-1]} are not finite",
            allowed="finite latents",
            hint=hint,
        )


def _gather(table: Table, index: Tensor) -> Tensor:
    return table[index if len(table) > 1 else torch.zeros_like(index)]


def _named(tables: Mapping[str, Table], prefix: str) -> dict[str, Table]:
    return {name.removeprefix(prefix): table for name, table in tables.items() if name.startswith(prefix)}


def _chunks(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _filled(items: list[_Item], size: int) -> list[_Item]:
    """The last item repeated up to ``size``: kernels round differently for other numbers of rows."""
    return items + items[-1:] * (size - len(items))


def _compact(table: Tensor) -> Tensor:
    """A single row where all rows are equal."""
    return table[:1].clone() if bool((table == table[:1]).all()) else table
