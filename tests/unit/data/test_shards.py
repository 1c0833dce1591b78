"""Files of rows: whole or absent, checked, shared, and read without being kept in memory."""

import hashlib
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from decant.data.shards import Rows, Shards
from decant.errors import UserError


def _key(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def _keys(numbers: Sequence[int]) -> list[bytes]:
    return [_key(number) for number in numbers]


def _rows(numbers: Sequence[int]) -> dict[str, torch.Tensor]:
    base = torch.tensor(numbers, dtype=torch.float32)
    return {"mean": base[:, None] * torch.ones(3), "half": (base[:, None, None] + torch.zeros(2, 2)).bfloat16()}


def _open(folder: Path, numbers: Sequence[int], said: list[str] | None = None) -> Shards:
    return Shards([folder], _keys(numbers), said.append if said is not None else lambda line: None)


def _write(folder: Path, numbers: Sequence[int]) -> Path:
    before = set(folder.glob("*"))
    _open(folder, numbers).add(_keys(numbers), _rows(numbers))
    return next(iter(set(folder.glob("*")) - before), folder)


@settings(max_examples=30)
@given(files=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=9), min_size=1, max_size=5), data=st.data())
def test_rows_come_back_under_their_keys(
    files: list[list[int]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """From any files, some keys in several of them, in any order and as often as asked."""
    folder = tmp_path_factory.mktemp("shards")
    for numbers in files:
        _write(folder, list(dict.fromkeys(numbers)))
    known = sorted({number for numbers in files for number in numbers})
    wanted = data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=30))
    tables = _open(folder, wanted).tables(_keys(wanted))
    index = torch.tensor(data.draw(st.lists(st.integers(0, len(wanted) - 1), min_size=1, max_size=9)))
    for name, expected in _rows(wanted).items():
        table = tables[name]
        row = index if len(table) > 1 else torch.zeros_like(index)
        assert torch.equal(table[row], expected[index]) and table[row].dtype == expected.dtype


def test_a_file_is_plain_safetensors_under_its_own_checksum(tmp_path: Path) -> None:
    path = _write(tmp_path, range(5))
    assert path.name == hashlib.sha256(path.read_bytes()).hexdigest() + ".safetensors"
    assert torch.equal(load_file(path)["mean"], _rows(range(5))["mean"])


def test_only_what_no_file_holds_is_missing(tmp_path: Path) -> None:
    _write(tmp_path, range(5))
    assert _open(tmp_path, [9, 3, 7, 9]).missing == _keys([9, 7])


def test_one_row_for_all_is_kept_once(tmp_path: Path) -> None:
    for first in (0, 10):
        shards = _open(tmp_path, [])
        shards.add(_keys(range(first, first + 4)), {"a": _rows(range(4))["mean"], "null": torch.ones(1, 3)})
    tables = _open(tmp_path, [2, 12]).tables(_keys([2, 12]))
    assert torch.equal(torch.as_tensor(tables["null"]), torch.ones(1, 3))
    shards = _open(tmp_path, [])
    shards.add(_keys([20, 21]), {"a": _rows([0, 1])["mean"], "null": torch.zeros(1, 3)})
    mixed = _open(tmp_path, [2, 20, 21]).tables(_keys([21, 2, 20]))["null"]
    assert isinstance(mixed, Rows)
    assert mixed[torch.tensor([0, 1, 2])][:, 0].tolist() == [0, 1, 0]


@pytest.mark.parametrize("damage", ["flip in a row", "flip in the header", "flip in a key", "cut", "empty", "grown"])
def test_a_damaged_file_is_told_of_and_made_anew(tmp_path: Path, damage: str) -> None:
    whole, damaged = _write(tmp_path, range(4)), _write(tmp_path, range(4, 8))
    content = bytearray(damaged.read_bytes())
    match damage:
        case "flip in a row":
            content[-2] ^= 4
        case "flip in the header":
            content[30] ^= 1
        case "flip in a key":
            content[content.index(_key(5)) + 3] ^= 16
        case "cut":
            del content[-20:]
        case "empty":
            content.clear()
        case "grown":
            content += b"\0"
    damaged.write_bytes(content)
    said: list[str] = []
    shards = _open(tmp_path, range(8), said)
    assert shards.missing == _keys(range(4, 8))
    assert len(said) == 1 and "damaged" in said[0] and damaged.name in said[0]
    assert whole.exists() and not damaged.exists()
    shards.add(shards.missing, _rows(range(4, 8)))
    again = _open(tmp_path, range(8), said).tables(_keys(range(8)))["mean"]
    assert torch.equal(again[torch.arange(8)], _rows(range(8))["mean"]) and len(said) == 1


def test_a_writer_that_is_killed_leaves_nothing_that_counts(tmp_path: Path) -> None:
    """Killed between the bytes and the rename, in a process of its own."""
    code = f"""
import os, signal, sys
from pathlib import Path
import torch
from decant.data import shards
Path.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
shards.Shards([Path({str(tmp_path)!r})], [], print).add([bytes(32)], {{"mean": torch.ones(1, 3)}})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert [path.name[:5] for path in tmp_path.iterdir()] == [".tmp-"]
    assert Shards([tmp_path], [bytes(32)], print).missing == [bytes(32)]
    rest = next(tmp_path.iterdir())
    _write(tmp_path, range(2))
    assert rest.exists(), "it may be another process's"
    os.utime(rest, (0, 0))
    _write(tmp_path, range(2, 4))
    assert not rest.exists()


def test_a_folder_that_cannot_be_written_gives_way_to_the_next(tmp_path: Path) -> None:
    good, bad, said = tmp_path / "good", tmp_path / "file" / "cache", []
    (tmp_path / "file").write_text("a file stands where the folder would be made")
    shards = Shards([bad, good], _keys(range(6)), said.append)
    shards.add(_keys(range(3)), _rows(range(3)))
    shards.add(_keys(range(3, 6)), _rows(range(3, 6)))
    assert len(said) == 1 and str(bad) in said[0] and str(good) in said[0]
    table = shards.tables(_keys(range(6)))["mean"]
    assert torch.equal(table[torch.arange(6)], _rows(range(6))["mean"])
    with pytest.raises(UserError, match=r"cannot be written[\s\S]*hint:.*--cache"):
        Shards([bad], _keys([1]), said.append).add(_keys([1]), _rows([1]))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_is_read(tmp_path: Path) -> None:
    cache, spare, said = tmp_path / "cache", tmp_path / "spare", []
    _write(cache, range(3))
    cache.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        shards = Shards([cache, spare], _keys(range(5)), said.append)
        assert shards.missing == _keys([3, 4])
        shards.add(_keys([3, 4]), _rows([3, 4]))
    finally:
        cache.chmod(stat.S_IRWXU)
    assert len(list(cache.iterdir())) == len(list(spare.iterdir())) == len(said) == 1


@pytest.mark.parametrize("fault", ["short write", "rename"])
def test_a_failed_write_leaves_the_folder_as_it_was(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, range(3))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    shards, limits = _open(tmp_path, range(9)), resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"No space left|File too large"):
        if fault == "rename":
            patch.setattr(Path, "replace", fail)
        else:  # the system itself writes 100 bytes and no more
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            shards.add(_keys(range(3, 9)), _rows(range(3, 9)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_that_vanishes_while_it_is_used_is_a_clear_refusal(tmp_path: Path) -> None:
    path = _write(tmp_path, range(3))
    table = _open(tmp_path, range(3)).tables(_keys(range(3)))["mean"]
    path.unlink()
    with pytest.raises(UserError, match=r"cache[\s\S]*hint:"):
        table[torch.tensor([0])]
