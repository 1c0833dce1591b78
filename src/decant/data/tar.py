"""What a tar shard of captioned pictures holds, seen in one pass: members of one key are a picture and its caption.

The convention is WebDataset's: a member's key is its name up to the first dot of its last part, and what follows says
what it is (``0007.jpg``, ``0007.txt`` or ``0007.json``).
"""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from decant.data.captioned import Skipped
from decant.data.picture import MOST_BYTES, SUFFIXES, TOO_LARGE, Look, ahead, look_at
from decant.errors import UserError, refuse

_BLOCK = 512
_TAIL = 24 * 1024  # more than tarfile reads ahead
_MOST_WORDS_BYTES = 2**20
_IN_FLIGHT = 16
_TEXT_KEYS = ("caption", "text")


class Readable(Protocol):
    """Read from its start to its end."""

    def read(self, size: int, /) -> bytes:
        """At most so many of the next bytes."""
        ...


@dataclass(frozen=True, slots=True)
class Held:
    """A picture in a shard: where its bytes lie, what they are, and its captions as they are written there."""

    name: str
    offset: int
    size: int
    look: Look
    captions: tuple[object, ...]


@dataclass(frozen=True)
class Index:
    """The pictures of a shard, in its order, and what in it is not used."""

    held: tuple[Held, ...]
    skipped: tuple[Skipped, ...]


def index_of(file: Readable, name: str) -> Index:
    """Read a shard once, to its end or to where it is cut; pictures are decoded, and few are in memory.

    Raises:
        UserError: it is no tar file.
    """
    notes: list[Skipped] = []
    groups: dict[str, _Group] = {}
    for member in ahead(_seen, _members(_Tailed(file), name, notes), most=_IN_FLIGHT):
        _take(groups.setdefault(member.key, _Group()), member, notes)
    held = []
    for group in groups.values():
        if group.picture is None:
            notes.append(Skipped(group.words_name, "no picture of its key"))
        elif group.problem or not group.words_name:
            notes.append(Skipped(group.picture.name, group.problem or "no .txt or .json of its key"))
        else:
            place = group.picture
            held.append(Held(place.name, place.offset, place.size, place.look, group.captions))
    return Index(tuple(sorted(held, key=lambda each: each.offset)), tuple(notes))


@dataclass(frozen=True, slots=True)
class _Member:
    """A member of a shard that may be of use: its content is let go once it was seen."""

    key: str
    kind: str
    name: str
    offset: int
    size: int
    content: bytes = b""
    look: Look = field(default_factory=lambda: Look(b""))


@dataclass(slots=True)
class _Group:
    picture: _Member | None = None
    captions: tuple[object, ...] = ()
    words_name: str = ""
    problem: str = ""


@dataclass
class _Tailed:
    """Remembers the last of what was read, so that the end of the archive can be told from a cut."""

    file: Readable
    place: int = 0
    tail: bytes = b""

    def read(self, size: int) -> bytes:
        content = self.file.read(size)
        self.place += len(content)
        self.tail = (self.tail + content)[-_TAIL:]
        return content

    def block(self, offset: int) -> bytes:
        """The block at an offset that was read not long ago, shorter where the file ends."""
        begin = offset - (self.place - len(self.tail))
        return self.tail[begin : begin + _BLOCK]


def _members(file: _Tailed, name: str, notes: list[Skipped]) -> Iterator[_Member]:
    """Pictures and words, each with its content; a cut or damage ends the shard, and is noted."""
    end, n = 0, 0
    try:
        # Streamed, so that nothing is sought; a list of all members would grow with the shard.
        with tarfile.open(fileobj=file, mode="r|", errors="backslashreplace") as tar:  # type: ignore[call-overload]
            while (info := tar.next()) is not None:
                tar.members = []
                if info.isreg():
                    yield from _member(tar, info, name, notes)
                end, n = info.offset_data + -(-info.size // _BLOCK) * _BLOCK, n + 1
    except UserError:
        raise
    except (tarfile.TarError, EOFError, ValueError) as error:
        if n == 0 and file.place >= _BLOCK:
            hint = "a shard is an uncompressed .tar, as WebDataset writes it"
            raise refuse(f"data {name}", f"no tar file ({error})", allowed="a tar file", hint=hint) from None
        notes.append(Skipped(name, f"cut off after {n} members: what comes before is used"))
        return
    mark = file.block(end)
    if len(mark) < _BLOCK:
        notes.append(Skipped(name, f"cut off after {n} members: what comes before is used"))
    elif any(mark):
        notes.append(Skipped(name, f"damaged after {n} members, at byte {end}: what comes before is used"))


def _member(tar: tarfile.TarFile, info: tarfile.TarInfo, shard: str, notes: list[Skipped]) -> Iterator[_Member]:
    folder, _, last = info.name.rpartition("/")
    stem, _, kind = last.partition(".")
    kind, name = f".{kind.lower()}", f"{shard}/{info.name}"
    if not stem or not (kind in SUFFIXES or kind in (".txt", ".json")):
        return
    most = MOST_BYTES if kind in SUFFIXES else _MOST_WORDS_BYTES
    if info.size > most:
        notes.append(Skipped(name, TOO_LARGE if kind in SUFFIXES else "the caption file is too large"))
        return
    opened = tar.extractfile(info)
    assert opened is not None, "a regular file"
    try:
        content = opened.read()
    except tarfile.TarError:
        notes.append(Skipped(name, "the shard is cut off inside it"))
        raise
    yield _Member(f"{folder}/{stem}", kind, name, info.offset_data, info.size, content)


def _seen(member: _Member) -> _Member:
    if member.kind not in SUFFIXES:
        return member
    return _Member(member.key, member.kind, member.name, member.offset, member.size, look=look_at(member.content))


def _take(group: _Group, member: _Member, notes: list[Skipped]) -> None:
    if member.kind in SUFFIXES:
        if group.picture is None:
            group.picture = member
        else:
            notes.append(Skipped(member.name, f"its key has a picture already, {group.picture.name}"))
    elif not group.words_name or member.kind == ".txt":  # a .txt goes before a .json
        group.captions, group.problem = _captions(member.content, member.kind)
        group.words_name = member.name


def _captions(content: bytes, kind: str) -> tuple[tuple[object, ...], str]:
    """(captions, problem) of a .txt or .json: there ``caption`` or ``text``, one or a list."""
    try:
        text = content.decode("utf-8-sig")
        value: Any = json.loads(text) if kind == ".json" else text
    except (ValueError, RecursionError):
        return (), f"its {kind} is not {'JSON' if kind == '.json' else 'text'} in UTF-8"
    if isinstance(value, dict):
        key = next((key for key in _TEXT_KEYS if key in value), None)
        if key is None:
            return (), "its .json has no caption or text"
        value = value[key]
    return tuple(value) if isinstance(value, list) else (value,), ""
