"""Captioned pictures, whatever source they come from: the one shape in which the rest of decant sees data."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from decant.data.packed import Packed, Raw, Text, chosen
from decant.data.picture import Content, Look, ahead, look
from decant.errors import refuse

_MAX_CAPTION_BYTES = 64 * 1024

Watch = Callable[[int, int], object]


def unwatched(done: int, total: int) -> None:
    """A `Watch` that looks away."""


@dataclass(frozen=True, slots=True)
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
    place: what --data named. What there is one of for every picture may be packed, so that many take little memory.
    """

    files: Sequence[Content]
    captions: Sequence[str]
    skipped: tuple[Skipped, ...]
    folder: Path = Path()
    digests: Sequence[bytes] = ()
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
        return tuple(self.each_choices())

    def each_choices(self) -> Iterator[tuple[str, ...]]:
        """As `choices`, one picture's at a time."""
        for place, caption in enumerate(self.captions):
            yield (caption, *self.others[place]) if self.others else (caption,)

    def first(self, most: int) -> "Captioned":
        """At most so many of the pictures, the first in order; nothing skipped."""
        return self.at(range(min(most, len(self.files))))

    def at(self, places: Sequence[int] | NDArray[np.intp]) -> "Captioned":
        """The pictures at these places; nothing skipped."""
        files, captions = chosen(self.files, places), chosen(self.captions, places)
        digests = chosen(self.digests, places) if self.digests else ()
        others = tuple(self.others[place] for place in places) if self.others else ()
        return replace(self, files=files, captions=captions, skipped=(), digests=digests, others=others)


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


@dataclass(frozen=True, slots=True)
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
    entries: Iterable[Entry],
    watch: Watch = unwatched,
    *,
    total: int = 0,
    folder: Path = Path(),
    place: str = "",
    files: "Packed[Content] | None" = None,
) -> Captioned:
    """Entries as pictures, each decoded once unless it was seen; what cannot be used is skipped, with its reason.

    Captions are tidied (white space is one blank) and must be text in UTF-8 of at most 64 KB; a picture needs one of
    them. ``files`` takes the contents' places, where they can be packed.
    """
    found = _Found(files if files is not None else [])
    skipped: list[Skipped] = []
    for done, (entry, seen) in enumerate(ahead(_look, entries), start=1):
        captions, problems = _usable(entry)
        if entry.problem or seen.problem or not captions:
            reason = entry.problem or seen.problem or "; ".join(dict.fromkeys(problems)) or "no caption"
            skipped.append(Skipped(entry.name, reason))
        else:
            skipped += [Skipped(entry.name, problem) for problem in problems]
            found.add(entry, captions, seen.digest)
        watch(done, total)
    return found.captioned(skipped, folder, place or str(folder))


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
    places = np.array([_unit(_name(file, captioned.folder), seed) for file in captioned.files])
    held = places < held_out
    train, kept = captioned.at(np.flatnonzero(~held)), captioned.at(np.flatnonzero(held))
    if not train.files or (held_out > 0 and not kept.files):
        sizes = f"{len(train.files)} to train on and {len(kept.files)} held out"
        value = f"{held_out} of {len(held)} pictures leaves {sizes}"
        hint = "add pictures" + (f", or take {ceil(100 * sorted(places)[0]) / 100:.2f}" if len(held) > 1 else "")
        raise refuse("held_out", value, allowed="neither part empty", hint=hint)
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


@dataclass
class _Found:
    """The pictures that can be used, gathered one by one; a mark of each tells what is listed twice."""

    files: "Packed[Content] | list[Content]"
    captions: Packed[str] = field(default_factory=lambda: Packed(Text()))
    digests: Packed[bytes] = field(default_factory=lambda: Packed(Raw()))
    others: list[tuple[str, ...]] = field(default_factory=list)
    marks: bytearray = field(default_factory=bytearray)

    def add(self, entry: Entry, captions: tuple[str, ...], digest: bytes) -> None:
        assert entry.content is not None, "a picture"
        self.files.append(entry.content)
        self.captions.append(captions[0])
        self.digests.append(digest)
        self.others.append(captions[1:])
        words = "\0".join((entry.name, *captions)).encode("utf-8", "surrogatepass")
        self.marks += hashlib.blake2b(words, digest_size=16).digest()

    def captioned(self, skipped: list[Skipped], folder: Path, place: str) -> Captioned:
        """Each picture once with the same captions."""
        _, once = np.unique(np.frombuffer(self.marks, "V16"), return_index=True)
        again = set(range(len(self.files))) - set(once.tolist()) if len(once) < len(self.files) else ()
        skipped += [Skipped(_name(self.files[number], folder), "listed twice") for number in again]
        whole = Captioned(
            self.files if isinstance(self.files, Packed) else tuple(self.files),
            self.captions,
            tuple(sorted(skipped, key=lambda item: (item.name, item.reason))),
            folder,
            self.digests,
            tuple(self.others) if any(self.others) else (),
            place=place,
        )
        return replace(whole.at(np.sort(once)), skipped=whole.skipped) if again else whole


def _name(file: Content, folder: Path) -> str:
    if not isinstance(file, Path):
        return file.name
    return (file.relative_to(folder) if file.is_relative_to(folder) else file).as_posix()


def _unit(name: str, seed: int) -> float:
    """A number in [0, 1) that only the seed and the name decide."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
