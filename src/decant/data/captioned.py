"""Captioned pictures, whatever source they come from: the one shape in which the rest of decant sees data."""

import hashlib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Protocol, TypeVar

from decant.data.picture import Content, Look, ahead, look
from decant.errors import refuse

_MAX_CAPTION_BYTES = 64 * 1024

Watch = Callable[[int, int], object]
_Value = TypeVar("_Value")


def unwatched(done: int, total: int) -> None:
    """A `Watch` that looks away."""


@dataclass(frozen=True)
class Skipped:
    """Something in a source that is not used: its name, or file and line, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Captioned:
    """Pictures that decode, each with its caption, in the order of their source; and what was left out.

    files: where the pictures' contents lie. A picture that a folder lists with several captions appears once for each.
    captions: one a picture. others: where a source gives a picture several captions, the further ones, of which (with
    the first) one is drawn in each epoch; empty where no picture has any. folder: what ``names`` are relative to.
    digests: sha256 of the contents. alone: the captions have no pictures, and a digest is of its caption.
    place: what --data named.
    """

    files: tuple[Content, ...]
    captions: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    folder: Path = Path()
    digests: tuple[bytes, ...] = ()
    others: tuple[tuple[str, ...], ...] = ()
    alone: bool = False
    place: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """What the pictures are called; files relative to the folder, with forward slashes."""
        return tuple(_name(file, self.folder) for file in self.files)

    @property
    def choices(self) -> tuple[tuple[str, ...], ...]:
        """All captions of each picture, one at least."""
        if not self.others:
            return tuple((caption,) for caption in self.captions)
        return tuple((first, *rest) for first, rest in zip(self.captions, self.others, strict=True))

    def first(self, most: int) -> "Captioned":
        """At most so many of the pictures, the first in order; nothing skipped."""
        return _part(self, [True] * most)

    def at(self, places: Container[int]) -> "Captioned":
        """The pictures at these places; nothing skipped."""
        return _part(self, [place in places for place in range(len(self.files))])


class Source(Protocol):
    """What ``--data`` names; each kind is one file beside this one, made by its ``find`` function."""

    @property
    def told(self) -> str:
        """What was found there, in words."""
        ...

    @property
    def needs(self) -> str:
        """What an entry needs to be used, in words."""
        ...

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders of this machine in which a run must not write."""
        ...

    def scan(self, watch: Watch, index: Path | None) -> Captioned:
        """Every picture looked at once; ``index`` is a folder that may keep what was seen. Raises ``UserError``."""
        ...

    def fingerprint(self) -> str:
        """Equal for equal names and contents, as hexadecimal."""
        ...


@dataclass(frozen=True)
class Entry:
    """What a source lists: a picture's name, where its contents lie, and its captions; or why it cannot be used.

    seen: what is known already of the contents.
    """

    name: str
    content: Content | None = None
    captions: tuple[object, ...] = ()
    problem: str = ""
    seen: Look | None = None


def gather(
    entries: Iterable[Entry], watch: Watch = unwatched, *, total: int = 0, folder: Path = Path(), place: str = ""
) -> Captioned:
    """Entries as pictures, each decoded once unless it was seen; what cannot be used is skipped, with its reason.

    Captions are tidied (white space is one blank) and must be text in UTF-8 of at most 64 KB; a picture needs one of
    them.
    """
    good: list[tuple[Entry, tuple[str, ...], bytes]] = []
    skipped: list[Skipped] = []
    for done, (entry, seen) in enumerate(ahead(_look, entries), start=1):
        captions, problems = _usable(entry)
        if entry.problem or seen.problem or not captions:
            reason = entry.problem or seen.problem or "; ".join(dict.fromkeys(problems)) or "no caption"
            skipped.append(Skipped(entry.name, reason))
        else:
            skipped += [Skipped(entry.name, problem) for problem in problems]
            good.append((entry, captions, seen.digest))
        watch(done, total)
    return replace(_captioned(good, skipped, folder), place=place or str(folder))


def caption_problem(caption: object) -> str:
    """Why something is no caption, or ""."""
    if caption is None:
        return "no caption"
    if not isinstance(caption, str):
        return f"the caption is not text ({type(caption).__name__})"
    if not tidy(caption):
        return "the caption is empty"
    try:
        size = len(caption.encode("utf-8"))
    except UnicodeEncodeError:
        return "the caption is not text in UTF-8"
    return "the caption is too long" if size > _MAX_CAPTION_BYTES else ""


def tidy(caption: str) -> str:
    """White space as one blank."""
    return " ".join(caption.split())


def check_share(captioned: Captioned, max_skipped: float, named_in: str = "", needs: str = "") -> None:
    """Refuse where more than the fraction ``max_skipped`` of the entries cannot be used.

    ``named_in`` is a file that names them, ``needs`` what an entry needs.
    """
    total = len(captioned.files) + len(captioned.skipped)
    if captioned.files and len(captioned.skipped) <= max_skipped * total:
        return
    first = "; ".join(f"{item.name}: {item.reason}" for item in captioned.skipped[:3])
    count = f"{len(captioned.skipped)} of {total} entries of {captioned.place}"
    allowed = f"at most {max_skipped:.0%} skipped, and at least one used"
    hint = f"all are named in {named_in}" if named_in else "mend them"
    hint += ", or raise max_skipped" if captioned.files else f"; {needs or 'each picture needs a caption'}"
    raise refuse("data", f"{count} cannot be used ({first or 'it is empty'})", allowed=allowed, hint=hint)


def split(captioned: Captioned, held_out: float, seed: int) -> tuple[Captioned, Captioned]:
    """(training part, held-out part), disjoint: about the fraction ``held_out`` of the names is held out.

    A picture's side is a hash of the seed and its name: neither the order nor the other pictures matter, so a
    held-out picture stays held out as the set grows. Raises ``UserError`` where a part comes out empty.
    """
    if not 0 <= held_out < 1:
        hint = "0.1 holds out one picture in ten"
        raise refuse("held_out", held_out, allowed="a fraction from 0 up to, not including, 1", hint=hint)
    held = [_unit(name, seed) < held_out for name in captioned.names]
    train, kept = _part(captioned, [not side for side in held]), _part(captioned, held)
    if not train.files or (held_out > 0 and not kept.files):
        sizes = f"{len(train.files)} to train on and {len(kept.files)} held out"
        value = f"{held_out} of {len(held)} pictures leaves {sizes}"
        raise refuse("held_out", value, allowed="neither part empty", hint="add pictures, or change the fraction")
    return train, kept


def _look(entry: Entry) -> tuple[Entry, Look]:
    if entry.seen is not None or entry.content is None or entry.problem:
        return entry, entry.seen or Look(b"")
    return entry, look(entry.content)


def _usable(entry: Entry) -> tuple[tuple[str, ...], list[str]]:
    """An entry's captions, tidied and each once, and what is wrong with the others."""
    checked = [(caption, caption_problem(caption)) for caption in entry.captions]
    captions = tuple(dict.fromkeys(tidy(str(caption)) for caption, problem in checked if not problem))
    return captions, [problem for _, problem in checked if problem]


def _captioned(good: Sequence[tuple[Entry, tuple[str, ...], bytes]], skipped: list[Skipped], folder: Path) -> Captioned:
    counts = Counter((entry.name, captions) for entry, captions, _ in good)
    skipped += [Skipped(name, "listed twice") for (name, _), n in counts.items() for _ in range(n - 1)]
    rows = {(entry.name, captions): (entry.content, digest) for entry, captions, digest in good}
    several = any(len(captions) > 1 for _, captions in rows)
    return Captioned(
        tuple(content for content, _ in rows.values() if content is not None),
        tuple(captions[0] for _, captions in rows),
        tuple(sorted(skipped, key=lambda item: (item.name, item.reason))),
        folder,
        tuple(digest for _, digest in rows.values()),
        tuple(captions[1:] for _, captions in rows) if several else (),
    )


def _name(file: Content, folder: Path) -> str:
    if not isinstance(file, Path):
        return file.name
    return (file.relative_to(folder) if file.is_relative_to(folder) else file).as_posix()


def _unit(name: str, seed: int) -> float:
    """A number in [0, 1) that only the seed and the name decide."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _part(captioned: Captioned, keep: Sequence[bool]) -> Captioned:
    def kept(values: Sequence[_Value]) -> tuple[_Value, ...]:
        return tuple(compress(values, keep))

    files, captions, digests = kept(captioned.files), kept(captioned.captions), kept(captioned.digests)
    return Captioned(
        files, captions, (), captioned.folder, digests, kept(captioned.others), captioned.alone, captioned.place
    )
