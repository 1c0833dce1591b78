"""Pictures and captions, encoded once and kept on disk: training then runs neither the VAE nor the text encoder."""

import hashlib
import json
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from decant.data.batch import Batch
from decant.data.captioned import Captioned, Skipped
from decant.data.picture import CROP, ChangedError, Frame, View, ahead, framed_picture
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
_MOST_LOST = 0.1

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

    def shards(self, made_by: Mapping[str, str], keys: Iterable[bytes]) -> Shards:
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
    null. Where pictures have several ``views`` (crops, mirrored or not), mean, std and framing have ``views * n`` rows,
    all pictures of the first view first, and every epoch draws one. ``replaced``: pictures that others stand in for.
    """

    mean: Table
    std: Table
    rows: Tensor
    condition: Mapping[str, Table]
    null: Mapping[str, Table]
    framing: Mapping[str, Table] = field(default_factory=dict)
    seed: int = 0
    views: int = 1
    replaced: tuple[Skipped, ...] = ()

    @property
    def n(self) -> int:
        """How many pictures there are."""
        return len(self.rows)

    def batch(self, positions: tuple[int, ...]) -> Batch:
        """The pictures at these positions of the endless stream; position % n is the index of a picture."""
        index = torch.tensor([position % self.n for position in positions])
        seen = index if self.views == 1 else torch.tensor([self._viewed(position) for position in positions])
        rows = self.rows[index] if self.rows.ndim == 1 else torch.tensor([self._drawn(p) for p in positions])
        framing = {key: gather(table, seen) for key, table in self.framing.items()}
        condition = {key: gather(table, rows) for key, table in self.condition.items()} | framing
        null = {key: gather(table, rows) for key, table in self.null.items()} | framing
        return Batch(tuple(positions), gather(self.mean, seen), gather(self.std, seen), condition, null)

    def _viewed(self, position: int) -> int:
        """The row of the view that is a picture's in this epoch."""
        return seed_of(self.seed, "view", position) % self.views * self.n + position % self.n

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
    views: Sequence[View] = (View(),),
) -> Latents:
    """Every picture, at ``size`` pixels, and every different caption, encoded unless the cache has it.

    A row depends on its picture or caption and on what encodes it, not on the others or on what the cache held: the
    encoders always get the same number of rows, the last chunk filled up. ``progress(done)`` counts pictures. ``seed``
    decides which of its captions, and of ``views``, a picture has in an epoch. Captions alone get the latents of
    ``drawer``. A picture that has changed since it was looked at is stood in for by another, drawn from the seed, and
    named in ``Latents.replaced``. Raises ``UserError`` where the encoder gives numbers that are not finite, or more
    than a tenth of the pictures has changed.
    """
    assert captioned.files and len(captioned.digests) == len(captioned.files), "pictures that were looked at"
    captions = list(dict.fromkeys(caption for own in captioned.each_choices() for caption in own))
    rows = _rows(captioned.each_choices(), {caption: index for index, caption in enumerate(captions)})
    texts = _captions(captions, encoder, cache)
    condition, null = _named(texts, "condition."), _named(texts, "null.")
    if captioned.alone:
        assert drawer is not None, "captions alone, and nothing that draws"
        drawn = rows_of_captions(captioned, _drawing(drawer, size), cache, progress)
        told = encoder.framing([Frame.whole(size, size)])
        return Latents(drawn["mean"], drawn["std"], rows, condition, null, dict(told), seed)
    made = rows_of_pictures(captioned, _encoding(encoder, size), cache, progress, seed, views)
    rows = rows[list(made.places)] if made.replaced else rows
    moments = made.tables
    framing = _named(moments, "framing.")
    return Latents(moments["mean"], moments["std"], rows, condition, null, framing, seed, len(views), made.replaced)


@dataclass(frozen=True)
class OfPictures:
    """What makes a row of tables from each picture. ``made_by``: all that it depends on beside the picture.

    ``rows(keys, pictures, frames)`` gets B of each, pictures ``(B, 3, size, size)`` in [-1, 1], and gives tables of B
    rows, each of which depends on its own picture and key alone.
    """

    size: int
    made_by: Mapping[str, str]
    rows: Callable[[Sequence[bytes], Tensor, Sequence[Frame]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class OfCaptions:
    """What makes a row of tables from each caption. ``made_by``: all that it depends on beside the caption."""

    made_by: Mapping[str, str]
    rows: Callable[[Sequence[str]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Made:
    """Tables of n rows for each view, all pictures of the first view first.

    ``places``: of which picture each of the n is, its own unless it was lost; ``replaced``: those that were.
    """

    tables: Mapping[str, Table]
    places: Sequence[int]
    replaced: tuple[Skipped, ...]


def rows_of_pictures(
    captioned: Captioned,
    maker: OfPictures,
    cache: Cache,
    progress: Progress | None = None,
    seed: int = 0,
    views: Sequence[View] = (View(),),
) -> Made:
    """A row for every view of every picture, made unless the cache has it. Otherwise as `encode_all`."""
    lost: dict[bytes, str] = {}
    shards = _pictures(captioned, maker, cache, views, progress, lost)
    places = _stand_ins(captioned, lost, seed)
    keys = (view.key(captioned.digests[place]) for view in views for place in places)
    return Made(shards.tables(keys), places, _told(captioned, lost))


def _encoding(encoder: Encoder, size: int) -> OfPictures:
    def rows(keys: Sequence[bytes], pictures: Tensor, frames: Sequence[Frame]) -> dict[str, Tensor]:
        mean, std = encoder.encode(pictures)
        told = encoder.framing(frames)
        return {"mean": mean, "std": std} | {f"framing.{key}": value for key, value in told.items()}

    made_by = {"what": "pictures", "encoder": encoder.made_by()["pictures"], "size": str(size), "crop": CROP}
    return OfPictures(size, made_by, rows)


def _drawing(drawer: Drawer, size: int) -> OfCaptions:
    def rows(captions: Sequence[str]) -> dict[str, Tensor]:
        mean, std = drawer.draw(captions)
        return {"mean": mean, "std": std}

    return OfCaptions({"what": "drawn", "size": str(size), **drawer.made_by}, rows)


def _rows(choices: Iterable[Sequence[str]], row: Mapping[str, int]) -> Tensor:
    """The row of each picture's caption, ``(n,)``, or of its captions, ``(n, k)`` filled up with -1."""
    flat, counts = array("q"), array("q")
    for own in choices:
        flat.extend(row[caption] for caption in own)
        counts.append(len(own))
    most = max(counts)
    rows = torch.full((len(counts), most), -1)
    rows[torch.arange(most) < torch.frombuffer(counts, dtype=torch.int64)[:, None]] = torch.frombuffer(
        flat, dtype=torch.int64
    )
    return rows[:, 0].clone() if most == 1 else rows


def _stand_ins(captioned: Captioned, lost: Mapping[bytes, str], seed: int) -> Sequence[int]:
    """For each picture its own place, or for one that was lost that of another, drawn from the seed and its name."""
    if not lost:
        return range(len(captioned.digests))
    good = [place for place, digest in enumerate(captioned.digests) if digest not in lost]
    n = len(captioned.digests)
    if not good or n - len(good) > max(1, _MOST_LOST * n):
        first = next(iter(lost.values())).splitlines()[0]
        value = f"{n - len(good)} of {n} pictures are no longer what they were when they were looked at ({first})"
        raise refuse("data", value, allowed=f"at most {_MOST_LOST:.0%}, or one", hint="run again, on data at rest")
    return [
        place if digest not in lost else good[seed_of(seed, "stand-in", name) % len(good)]
        for place, (digest, name) in enumerate(zip(captioned.digests, captioned.names, strict=True))
    ]


def _told(captioned: Captioned, lost: Mapping[bytes, str]) -> tuple[Skipped, ...]:
    if not lost:
        return ()
    pairs = zip(captioned.digests, captioned.names, strict=True)
    return tuple(Skipped(name, lost[digest].splitlines()[0]) for digest, name in pairs if digest in lost)


@torch.no_grad()
def _pictures(
    captioned: Captioned,
    maker: OfPictures,
    cache: Cache,
    views: Sequence[View],
    progress: Progress | None,
    lost: dict[bytes, str],
) -> Shards:
    """Every view of every picture as a row; ``lost`` takes the digests of those that have changed, and why."""
    digests, files, size = captioned.digests, captioned.files, maker.size
    shards = cache.shards(maker.made_by, (view.key(digest) for view in views for digest in digests))
    if shards.left < shards.total:
        done = (shards.total - shards.left) // len(views)
        cache.talk(f"{done} of {shards.total // len(views)} pictures were encoded before: {cache.folder}")

    def framed(stood: int) -> tuple[Tensor, Frame] | ChangedError:
        view, place = divmod(stood, len(files))
        try:
            return framed_picture(files[place], size, digests[place], views[view])
        except ChangedError as error:
            return error

    rows_at_once = max(1, min(16, _PIXELS_AT_ONCE // size**2))
    for turn, tick in _turns(shards, len(captioned.files), progress):
        stood = dict(zip(turn, shards.places(turn), strict=True))
        pixels = ahead(framed, stood.values(), most=2 * rows_at_once + 8)
        with _Writer(shards) as writer:
            for keys in _chunks(turn, rows_at_once):
                seen = dict(zip(keys, pixels, strict=False))
                place = {key: stood[key] % len(files) for key in keys}
                lost.update(
                    {digests[place[key]]: str(each) for key, each in seen.items() if isinstance(each, ChangedError)}
                )
                part = {key: each for key, each in seen.items() if not isinstance(each, ChangedError)}
                if part:
                    _make(part, maker, writer, rows_at_once, files[place[next(iter(part))]].name)
                tick(len(keys))
    return shards


def _turns(
    shards: Shards, n: int, progress: Progress | None
) -> Iterator[tuple[Sequence[bytes], Callable[[int], object]]]:
    """What is missing, part by part, and what counts it as a share of n pictures."""
    total, done = shards.left, 0

    def tick(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(n - (total - done) * n // shards.total)

    for turn in shards.turns():
        done = total - shards.left  # others may have made some
        yield turn, tick


def _make(
    part: Mapping[bytes, tuple[Tensor, Frame]], maker: OfPictures, writer: "_Writer", rows: int, name: str
) -> None:
    filled, keys = _filled(list(part.values()), rows), _filled(list(part), rows)
    pictures, frames = torch.stack([picture for picture, _ in filled]), [frame for _, frame in filled]
    made = maker.rows(keys, pictures, frames)
    _check_finite(made, f"{name} or one after it")
    writer.add(list(part), made)


@torch.no_grad()
def rows_of_captions(
    captioned: Captioned, maker: OfCaptions, cache: Cache, progress: Progress | None = None
) -> dict[str, Table]:
    """A row for every caption, whose key is its place's digest, made unless the cache has it."""
    shards = cache.shards(maker.made_by, captioned.digests)
    words = dict(zip(captioned.digests, captioned.captions, strict=True))
    if shards.left < shards.total:
        cache.talk(f"{shards.total - shards.left} of {shards.total} prompts were drawn before: {cache.folder}")
    for turn, tick in _turns(shards, len(words), progress):
        with _Writer(shards) as writer:
            for keys in _chunks(turn, _DRAWN_AT_ONCE):
                made = maker.rows(_filled([words[key] for key in keys], _DRAWN_AT_ONCE))
                _check_finite(made, f"{words[keys[0]]!r} or one after it")
                writer.add(keys, made)
                tick(len(keys))
    return shards.tables(captioned.digests)


@torch.no_grad()
def _captions(captions: Sequence[str], encoder: Encoder, cache: Cache) -> dict[str, Table]:
    """The tables of conditions and of their unconditional twins, one row a caption."""
    words = {hashlib.sha256(caption.encode()).digest(): caption for caption in captions}
    shards = cache.shards({"what": "captions", "encoder": encoder.made_by()["captions"]}, list(words))
    for turn in shards.turns():
        with _Writer(shards) as writer:
            for keys in _chunks(turn, _CAPTIONS_AT_ONCE):
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


def _check_finite(made: Mapping[str, Tensor], name: str) -> None:
    if not all(tensor.isfinite().all() for tensor in made.values()):
        hint = "check the VAE's weights; some VAEs overflow in float16, so encode in float32"
        raise refuse("data", f"the latents of {name} are not finite", allowed="finite latents", hint=hint)


def gather(table: Table, index: Tensor) -> Tensor:
    """Rows ``(B, ...)`` of a table at ``index`` ``(B,)``; one that is a single row has it everywhere."""
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
