"""WebDataset shards: tar files of captioned pictures, here or on a web server, each read once and then at will.

A pass over a shard notes where every picture lies; what it noted is kept, so that the next run begins at once. Pictures
are then read one by one from their place, in any order.
"""

import hashlib
import json
import os
import re
import struct
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from urllib.parse import urlsplit

from decant.data import remote
from decant.data.captioned import Captioned, Entry, Skipped, Watch, gather, unwatched
from decant.data.folder import METADATA
from decant.data.packed import Packed, Text
from decant.data.picture import SUFFIXES, Content, Look, ahead
from decant.data.tar import Held, Index, index_of
from decant.errors import refuse

_FORMAT = 1  # raised whenever the same shard would be noted otherwise
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST = 1_000_000
_PLACE, _TEXT = struct.Struct("<IQQ"), Text()


class Shard(Protocol):
    """One tar file, wherever it lies."""

    @property
    def place(self) -> str:
        """Path or address."""
        ...

    @property
    def stamp(self) -> str:
        """Changes when the file does."""
        ...

    def index(self) -> Index:
        """A pass over it."""
        ...

    def read(self, offset: int, size: int) -> bytes:
        """A part of it. Raises ``OSError`` where it is shorter."""
        ...

    def digest(self) -> str:
        """Of its contents, as far as can be had without reading all of it over a network."""
        ...


@dataclass(frozen=True)
class Local:
    """A shard on this machine."""

    path: Path

    @property
    def place(self) -> str:
        """Its absolute path."""
        return str(self.path.absolute())

    @property
    def stamp(self) -> str:
        """Size and time of change."""
        found = self.path.stat()
        return f"{found.st_size} {found.st_mtime_ns}"

    def index(self) -> Index:
        """A pass over it."""
        with self.path.open("rb") as file:
            return index_of(file, self.path.name)

    def read(self, offset: int, size: int) -> bytes:
        """A part of it."""
        with self.path.open("rb", buffering=0) as file:
            content = os.pread(file.fileno(), size, offset)
        if len(content) != size:
            raise OSError(None, "the shard ends early")
        return content

    def digest(self) -> str:
        """Of its contents."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Distant:
    """A shard on a web server."""

    url: str

    @property
    def place(self) -> str:
        """Its address."""
        return self.url

    @property
    def stamp(self) -> str:
        """Size and tag, as the server says."""
        return f"{self._head.size} {self._head.tag}"

    def index(self) -> Index:
        """A pass over it, which goes on where the network breaks."""
        with closing(remote.Forward(self.url)) as stream:
            return index_of(stream, _last_part(self.url))

    def read(self, offset: int, size: int) -> bytes:
        """A part of it."""
        if self._head.ranges:
            return remote.read_range(self.url, offset, size)
        return remote.replayed(self.url).read(offset, size)

    def digest(self) -> str:
        """Of address, size and tag."""
        return hashlib.sha256(f"{self.url} {self.stamp}".encode()).hexdigest()

    @cached_property
    def _head(self) -> remote.Head:
        return remote.head(self.url)


@dataclass(frozen=True, slots=True)
class Member:
    """A picture inside a shard."""

    name: str
    shard: Shard
    offset: int
    size: int

    def read_bytes(self) -> bytes:
        """Its contents."""
        return self.shard.read(self.offset, self.size)

    def __str__(self) -> str:
        """As errors name it."""
        return self.name


@dataclass(frozen=True)
class _InShards:
    """Members of some shards as bytes: the shard's number, offset and size, then the name."""

    shards: tuple[Shard, ...]

    def pack(self, member: Content, /) -> bytes:
        assert isinstance(member, Member)
        number = next(place for place, shard in enumerate(self.shards) if shard is member.shard)
        return _PLACE.pack(number, member.offset, member.size) + _TEXT.pack(member.name)

    def unpack(self, packed: bytes, /) -> Content:
        number, offset, size = _PLACE.unpack_from(packed)
        return Member(_TEXT.unpack(packed[_PLACE.size :]), self.shards[number], offset, size)


@dataclass(frozen=True)
class WebDataset:
    """Some shards, in order. ``folder``: that holds them, where --data named one."""

    said: str
    shards: tuple[Shard, ...]
    folder: Path | None = None

    @property
    def told(self) -> str:
        """How many, and how they are read."""
        n = f"{len(self.shards)} WebDataset shard{'s' * (len(self.shards) > 1)}"
        return f"{n}, {self.said}: indexed once, then read at will"

    @property
    def needs(self) -> str:
        """What a picture needs."""
        return "each picture needs a .txt or .json of its key beside it in the shard"

    @property
    def folders(self) -> tuple[Path, ...]:
        """That of the shards."""
        return (self.folder,) if self.folder is not None else ()

    def scan(self, watch: Watch = unwatched, index: Path | None = None) -> Captioned:
        """Shard by shard, in order; ``watch`` counts shards, ``index`` keeps what was noted of each."""
        names = _names(self.shards)

        def entries() -> Iterator[Entry]:
            for done, (shard, name) in enumerate(zip(self.shards, names, strict=True), start=1):
                noted = _noted(shard, index)
                for item in noted.skipped:
                    yield Entry(_within(item.name, name), problem=item.reason)
                for held in noted.held:
                    member = Member(_within(held.name, name), shard, held.offset, held.size)
                    yield Entry(member.name, member, held.captions, seen=held.look)
                watch(done, len(self.shards))

        return gather(entries(), place=self.said, files=Packed(_InShards(self.shards)))

    def fingerprint(self) -> str:
        """Of the shards' contents; of those on a server, of addresses, sizes and tags."""
        return hashlib.sha256(" ".join(ahead(lambda shard: shard.digest(), self.shards)).encode()).hexdigest()


def find(data: str) -> WebDataset | None:
    """One ``.tar``, several by ``{00000..00009}`` or ``{a,b}``, paths or http addresses, or a folder of them.

    Raises ``UserError`` where one that is named is not there.
    """
    if data.startswith(("http://", "https://")):
        return WebDataset(data, tuple(Distant(url) for url in _tars(expanded(data), data)))
    folder = Path(data)
    if folder.is_dir():
        found = sorted(folder.glob("*.tar")) if not _is_folder_of_pictures(folder) else []
        return WebDataset(data, tuple(map(Local, found)), folder) if found else None
    if not data.endswith((".tar", ".tar.gz", ".tgz")) or (not folder.exists() and not _BRACES.search(data)):
        return None
    return WebDataset(data, tuple(Local(Path(path)) for path in _there(_tars(expanded(data), data))))


def expanded(pattern: str) -> list[str]:
    """``a{00..02}.tar`` as a00.tar, a01.tar, a02.tar; ``{x,y}`` too, and several of them in one pattern."""
    parts: list[list[str]] = []
    for number, part in enumerate(_BRACES.split(pattern)):
        parts.append(_alternatives(part, pattern) if number % 2 else [part])
    return ["".join(chosen) for chosen in product(*parts)]


def _alternatives(inner: str, pattern: str) -> list[str]:
    found = _RANGE.fullmatch(inner)
    if found is None:
        return inner.split(",")
    first, last = found.groups()
    if not int(first) <= int(last) < int(first) + _MOST:
        allowed = f"{{first..last}}, last not before first, at most {_MOST:,} shards"
        raise refuse("--data", pattern, allowed=allowed, hint="{00000..00009} is ten shards")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def _tars(places: list[str], said: str) -> list[str]:
    for place in places:
        if not urlsplit(place).path.endswith(".tar"):
            hint = "unpack compressed shards once: gunzip; a single compressed byte cannot be found again"
            allowed = "names that end in .tar"
            raise refuse("--data", f"{place} is no shard ({said})", allowed=allowed, hint=hint)
    return places


def _there(paths: list[str]) -> list[str]:
    absent = [path for path in paths if not Path(path).is_file()]
    if absent:
        value = f"{len(absent)} of {len(paths)} shards are not there, the first is {absent[0]}"
        raise refuse("--data", value, allowed="shards that are there", hint="change the numbers in the braces")
    return paths


def _is_folder_of_pictures(folder: Path) -> bool:
    names = METADATA if any((folder / name).is_file() for name in METADATA) else ()
    return bool(names) or any(file.suffix.lower() in SUFFIXES for file in folder.iterdir())


def _last_part(place: str) -> str:
    return PurePosixPath(urlsplit(place).path).name


def _names(shards: Sequence[Shard]) -> list[str]:
    """Short names, or the whole places where short ones would be equal."""
    short = [_last_part(shard.place) for shard in shards]
    return short if len(set(short)) == len(short) else [shard.place for shard in shards]


def _within(name: str, shard: str) -> str:
    """What a pass called ``00000.tar/key.jpg``, under the shard's own name."""
    _, slash, inside = name.partition("/")
    return shard + slash + inside


def _noted(shard: Shard, folder: Path | None) -> Index:
    """What a pass over a shard noted, now or in an earlier run."""
    if folder is None:
        return shard.index()
    key = hashlib.sha256(json.dumps([_FORMAT, shard.place, shard.stamp]).encode()).hexdigest()[:32]
    file = folder / f"{key}.json"
    kept = _read(file)
    if kept is not None:
        return kept
    made = shard.index()
    with suppress(OSError):  # an index that cannot be kept is made again
        _write(file, made)
    return made


def _write(file: Path, index: Index) -> None:
    held = [
        [each.name, each.offset, each.size, each.look.digest.hex(), each.look.problem, list(each.captions)]
        for each in index.held
    ]
    skipped = [[item.name, item.reason] for item in index.skipped]
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        temporary.write_text(json.dumps({"held": held, "skipped": skipped}), encoding="utf-8")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _read(file: Path) -> Index | None:
    """An index that is whole, or None."""
    try:
        value: Any = json.loads(file.read_text(encoding="utf-8"))
        held = tuple(
            Held(str(name), int(offset), int(size), Look(bytes.fromhex(digest), str(problem)), tuple(captions))
            for name, offset, size, digest, problem, captions in value["held"]
        )
        return Index(held, tuple(Skipped(str(name), str(reason)) for name, reason in value["skipped"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
