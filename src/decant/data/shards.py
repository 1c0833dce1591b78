"""Rows of tensors on disk: safetensors files that are written whole, named by their own sha256, and never changed.

A folder of them grows by new files alone, so that two processes may fill one at once, and a file whose name is not
its checksum is damaged. Rows are read by their position, not mapped: what was read does not stay in the process.
"""

import contextlib
import hashlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from decant.data.packed import Keys, table_of
from decant.errors import refuse

_KEYS = "keys"
_KEY_BYTES = 32
_HOUR = 3600
_OPEN_FILES = 64
_PART = 256
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class _Table:
    """Where one tensor lies in a file: ``rows`` rows of ``shape``, the first at byte ``start``."""

    start: int
    rows: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class _Files:
    """Open files, the last used ones kept, read by one thread at a time."""

    opened: Callable[[Path], FileIO] = field(default_factory=lambda: lru_cache(_OPEN_FILES)(_open))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, path: Path, start: int, into: memoryview) -> None:
        try:
            with self.lock:
                file = self.opened(path)
                file.seek(start)
                _fill(file, into)
        except OSError as error:
            hint = "was the cache removed while the run went on? the same command makes it again and goes on"
            raise refuse(f"cache {path}", error, allowed="the file as it was when the run began", hint=hint) from error


@dataclass(frozen=True, eq=False)
class Rows:
    """A table of n rows that stays on disk: ``rows[index]`` reads the B rows asked for, ``(B, ...)``, and no others.

    tables: the tensor in each file. file, row: which of the files, and which of its rows, ``(n,)`` each.
    """

    tables: tuple[tuple[Path, _Table], ...]
    file: Tensor
    row: Tensor
    files: _Files = field(default_factory=_Files)

    def __len__(self) -> int:
        """n, the number of rows."""
        return len(self.row)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Rows ``(B, ...)`` at ``index`` ``(B,)``. Raises ``UserError`` where a file is gone."""
        first = self.tables[0][1]
        rows = torch.empty(len(index), *first.shape, dtype=first.dtype)
        raw = rows.reshape(len(index), -1).view(torch.uint8).numpy()
        places = zip(self.file[index].tolist(), self.row[index].tolist(), strict=True)
        for number, (file, row) in enumerate(places):
            path, table = self.tables[file]
            self.files.read(path, table.start + row * table.row_bytes, memoryview(raw[number]))
        return rows


@dataclass(frozen=True)
class _Shard:
    path: Path
    tables: dict[str, _Table]


class Shards:
    """The rows of some keys in some folders.

    ``folders``: all are read; new rows go into the first that can be written. ``keys``: the sha256 of what each row
    was made from; those that no whole file holds are ``missing``. A damaged file is told of through ``talk`` and
    removed.
    """

    def __init__(self, folders: Sequence[Path], keys: Iterable[bytes], talk: Callable[[str], None]) -> None:
        self._folders, self._writable, self._talk = list(folders), list(folders), talk
        self._keys = Keys(table_of(keys))
        self._file, self._row = (np.full(len(self._keys), -1, np.int32) for _ in range(2))
        self._shards: list[_Shard] = []
        self._known: set[Path] = set()
        self._look()

    def _look(self) -> None:
        """Take what is there that was not there before; a damaged file is removed."""
        listed = (path for folder in self._folders for path in sorted(folder.glob("*.safetensors")))
        found = [path for path in listed if path not in self._known]
        self._known.update(found)
        read = [(path, _read_shard(path)) for path in found]
        # A file that holds nothing asked for need not be whole.
        wanted = [(path, shard) for path, shard in read if shard is None or (self._keys.find(shard[1]) >= 0).any()]
        with ThreadPoolExecutor(4) as pool:
            whole = list(pool.map(_is_whole, (path for path, _ in wanted)))
        for (path, shard), fine in zip(wanted, whole, strict=True):
            if shard is not None and fine:
                self._take(path, *shard)
            elif path.exists() and not _is_whole(path):  # another process may have seen it too, and made it anew
                self._talk(f"cache: {path} is damaged; what it held is made anew")
                with contextlib.suppress(OSError):
                    path.unlink()

    @property
    def total(self) -> int:
        """How many keys there are."""
        return len(self._keys)

    @property
    def left(self) -> int:
        """How many keys have no row."""
        return int((self._file < 0).sum())

    @property
    def missing(self) -> list[bytes]:
        """The keys without a row, in order of first mention."""
        return list(self._keys.table[self._file < 0].tolist())

    def places(self, keys: Sequence[bytes]) -> list[int]:
        """Where each of these stood first among the keys that were given."""
        return list(self._keys.first[self._keys.find(table_of(keys))].tolist())

    def turns(self) -> Iterator[list[bytes]]:
        """The keys without a row, a part at a time, each part while no other process works on it.

        What is yielded must be added before the next is asked for. Parts that another process has come last, once it
        is done or dead, as far as it left rows missing; so several processes share the work of one cache.
        """
        parts = [slice(start, start + _PART) for start in range(0, self.total, _PART)]
        for wait in (False, True):
            later = []
            for part in parts:
                if (self._file[part] >= 0).all():
                    continue
                with self._alone(self._keys.table[part].tobytes(), wait) as mine:
                    if not mine:
                        later.append(part)
                        continue
                    self._look()
                    missing = self._keys.table[part][self._file[part] < 0]
                    if len(missing):
                        yield missing.tolist()
            parts = later

    @contextlib.contextmanager
    def _alone(self, part: bytes, wait: bool) -> Iterator[bool]:
        """Whether no other process has this part; it ends with the process. Without locks, nobody else has it."""
        try:
            import fcntl

            self._writable[0].mkdir(parents=True, exist_ok=True)
            path = self._writable[0] / f".lock-{hashlib.sha256(part).hexdigest()[:16]}"
            lock = path.open("w")
        except (ImportError, OSError):  # no such locks on Windows, or a folder that can only be read
            yield True
            return
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            yield True
            with contextlib.suppress(OSError):
                path.unlink()

    def add(self, keys: Sequence[bytes], tensors: Mapping[str, Tensor]) -> None:
        """Write one file of ``len(keys)`` rows, whole or not at all.

        A tensor of a single row stands for the same row under every key. Raises ``UserError`` where no folder can
        be written.
        """
        assert all(len(tensor) in (1, len(keys)) for tensor in tensors.values()), "a row for every key, or one for all"
        table = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).reshape(len(keys), _KEY_BYTES)
        path = self._write(save({_KEYS: table, **{name: tensor.contiguous() for name, tensor in tensors.items()}}))
        shard = _read_shard(path)
        assert shard is not None, f"{path} was just written"
        self._known.add(path)
        self._take(path, *shard)

    def tables(self, keys: Iterable[bytes]) -> dict[str, Tensor | Rows]:
        """Every table with one row for each of ``keys``; one that is the same row everywhere as that row, (1, ...)."""
        places = self._keys.find(table_of(keys))
        assert len(places) and (places >= 0).all() and (self._file[places] >= 0).all(), "rows that were never made"
        files = _Files()
        shard, row = torch.from_numpy(self._file[places]), torch.from_numpy(self._row[places])
        used = [self._shards[number] for number in shard.unique().tolist()]
        same = {name: _the_same(used, name, files) for name in used[0].tables}
        return {name: self._rows(name, shard, row, files) if one is None else one for name, one in same.items()}

    def _rows(self, name: str, shard: Tensor, row: Tensor, files: _Files) -> Rows:
        tables = tuple((part.path, part.tables[name]) for part in self._shards)
        single = torch.tensor([table.rows == 1 for _, table in tables])
        return Rows(tables, shard, torch.where(single[shard], 0, row), files)

    def _take(self, path: Path, tables: dict[str, _Table], keys: NDArray[np.void]) -> None:
        self._shards.append(_Shard(path, tables))
        found = self._keys.find(keys)
        rows = np.flatnonzero(found >= 0)
        rows = rows[self._file[found[rows]] < 0]
        self._file[found[rows]], self._row[found[rows]] = len(self._shards) - 1, rows

    def _write(self, content: bytes) -> Path:
        while True:
            try:
                return _write_whole(self._writable[0], content)
            except OSError as error:
                folder, *rest = self._writable
                value = f"{folder} cannot be written ({error.strerror or error})"
                if not rest:
                    hint = f"free {len(content) / 2**20:.0f} MB there, or name another folder: --cache DIR"
                    raise refuse("cache", value, allowed="a folder with room for it", hint=hint) from error
                self._talk(f"cache: {value}; what is missing there is kept in {rest[0]}, for this run alone")
                self._writable = rest


def _the_same(shards: Sequence[_Shard], name: str, files: _Files) -> Tensor | None:
    """The one row, (1, ...), of a table that is a single row, equal in all files; else None."""
    if any(shard.tables[name].rows > 1 for shard in shards):
        return None
    start = torch.zeros(1, dtype=torch.int32)
    rows = [Rows(((shard.path, shard.tables[name]),), start, start, files)[start] for shard in shards]
    return rows[0] if all(row.equal(rows[0]) for row in rows) else None


def _read_shard(path: Path) -> tuple[dict[str, _Table], NDArray[np.void]] | None:
    """The tables of a safetensors file and its keys, or None where it is none. No other rows are read."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                return None
            header = json.loads(file.read(length))
            tables = {name: _table(8 + length, entry) for name, entry in header.items() if name != "__metadata__"}
            keys = tables.pop(_KEYS)
            file.seek(keys.start)
            raw = file.read(keys.rows * _KEY_BYTES)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return tables, table_of([raw[: len(raw) // _KEY_BYTES * _KEY_BYTES]])


def _table(base: int, entry: Mapping[str, list[int]]) -> _Table:
    rows, *shape = entry["shape"]
    return _Table(base + entry["data_offsets"][0], rows, tuple(shape), _DTYPES[str(entry["dtype"])])


def _is_whole(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == path.stem
    except OSError:
        return False


def _write_whole(folder: Path, content: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    final = folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
    temporary = folder / f".tmp-{uuid.uuid4().hex}"
    try:
        temporary.write_bytes(content)
        temporary.replace(final)  # not synced: after a power cut the checksum tells
    finally:
        temporary.unlink(missing_ok=True)
    return final


def _sweep(folder: Path) -> None:
    """Remove what a process that was killed had half written; a living one writes a file in far less than an hour."""
    for rest in folder.glob(".tmp-*"):
        with contextlib.suppress(OSError):
            if time.time() - rest.stat().st_mtime > _HOUR:
                rest.unlink()


def _open(path: Path) -> FileIO:
    return FileIO(path)


def _fill(file: FileIO, into: memoryview) -> None:
    done = 0
    while done < len(into):
        got = file.readinto(into[done:])
        if not got:
            raise OSError("the file ends early")
        done += got
