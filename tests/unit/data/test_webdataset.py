"""WebDataset shards, written by tarfile and served by the standard library's server: order, damage, the network."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from decant.data import remote
from decant.data.captioned import Captioned
from decant.data.latents import Cache, encode_all
from decant.data.source import find, read
from decant.data.webdataset import WebDataset, expanded
from decant.errors import UserError

Served = Callable[..., AbstractContextManager[tuple[str, list[str]]]]


def _picture(index: int, kind: str = "PNG") -> bytes:
    image = Image.new("RGB", (24, 16), (index * 11 % 256, index // 23, 200))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def _shard(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def _members(numbers: range) -> list[tuple[str, bytes]]:
    return [
        member
        for number in numbers
        for member in ((f"{number:05d}.png", _picture(number)), (f"{number:05d}.txt", f"picture {number}".encode()))
    ]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of eight."""
    for number in range(3):
        _shard(tmp_path / "shards" / f"{number:05d}.tar", _members(range(number * 8, number * 8 + 8)))
    return tmp_path / "shards"


def _contents(found: Captioned) -> list[tuple[bytes, str]]:
    return [(file.read_bytes(), caption) for file, caption in zip(found.files, found.captions, strict=True)]


EXPECTED = [(_picture(number), f"picture {number}") for number in range(24)]


def test_a_folder_a_pattern_and_single_shards_give_every_picture_in_order(shards: Path) -> None:
    for data in (shards, f"{shards}/{{00000..00002}}.tar", f"{shards}/0000{{0,1,2}}.tar"):
        found = read(data)
        assert _contents(found) == EXPECTED and not found.skipped
        assert found.names[9] == "00001.tar/00009.png"
        assert found.digests[9] == hashlib.sha256(_picture(9)).digest()
    assert _contents(read(shards / "00001.tar")) == EXPECTED[8:16]
    assert find(shards).folders == (shards,)


def test_patterns_are_expanded_as_the_shell_does() -> None:
    assert expanded("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert expanded("{a,b}/{0..1}.tar") == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]
    with pytest.raises(UserError, match="hint:"):
        expanded("{5..2}.tar")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_captions_of_every_convention_and_names_of_every_length(tmp_path: Path, form: int) -> None:
    deep = "folder/" + "n" * 80 + ("" if form == tarfile.USTAR_FORMAT else "é" * 200)
    members = [
        ("__key__.info", b"ignored"),
        (f"{deep}.JPG", _picture(1, "JPEG")),
        (f"{deep}.json", json.dumps({"caption": "from json", "url": "x"}).encode()),
        ("b.webp", _picture(2, "WEBP")),
        ("c.txt", b"of c"),  # before its picture, and apart from it
        ("b.json", json.dumps({"text": ["one", "two", 3]}).encode()),
        ("c.png", _picture(3)),
        ("c.json", b'{"caption": "the txt goes before"}'),
        ("c.seg.png", _picture(4)),
        ("d/c.png", _picture(5)),
        ("d/c.json", b'"a bare string"'),
    ]
    found = read(_shard(tmp_path / "x.tar", members, form), max_skipped=0.5)
    assert found.names == (f"x.tar/{deep}.JPG", "x.tar/b.webp", "x.tar/c.png", "x.tar/d/c.png")
    assert found.choices == (("from json",), ("one", "two"), ("of c",), ("a bare string",))
    assert [(item.name, item.reason) for item in found.skipped] == [("x.tar/b.webp", "the caption is not text (int)")]
    assert found.files[2].read_bytes() == _picture(3)


def test_what_a_shard_holds_and_cannot_be_used_is_named(tmp_path: Path) -> None:
    members = [
        *_members(range(20)),
        ("bad.png", _picture(1)[:-40]),
        ("bad.txt", b"x"),
        ("words.png", b"these are words"),
        ("words.txt", b"x"),
        ("mute.png", _picture(30)),
        ("lone.txt", b"no picture"),
        ("latin.png", _picture(31)),
        ("latin.txt", "é".encode("latin-1")),
        ("list.png", _picture(32)),
        ("list.json", b"[broken"),
        ("keys.png", _picture(33)),
        ("keys.json", b'{"url": "x"}'),
        ("null.png", _picture(34)),
        ("null.json", b'{"caption": null}'),
        ("two.png", _picture(35)),
        ("two.jpg", _picture(36, "JPEG")),
        ("two.txt", b"two"),
    ]
    found = read(_shard(tmp_path / "x.tar", members), max_skipped=0.5)
    assert len(found.files) == 21
    assert {item.name: item.reason for item in found.skipped} == {
        "x.tar/bad.png": "the picture is damaged or truncated",
        "x.tar/words.png": "not a picture in a known format",
        "x.tar/mute.png": "no .txt or .json of its key",
        "x.tar/lone.txt": "no picture of its key",
        "x.tar/latin.png": "its .txt is not text in UTF-8",
        "x.tar/list.png": "its .json is not JSON in UTF-8",
        "x.tar/keys.png": "its .json has no caption or text",
        "x.tar/null.png": "no caption",
        "x.tar/two.jpg": "its key has a picture already, x.tar/two.png",
    }


def test_a_shard_cut_anywhere_gives_what_is_before_the_cut(tmp_path: Path) -> None:
    """Every cut at a multiple of 100 bytes: the pictures that are whole with their captions, and one note at least."""
    whole = _shard(tmp_path / "whole.tar", _members(range(6))).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        ends = [info.offset_data + info.size for info in tar.getmembers() if info.name.endswith(".txt")]
        last = tar.getmembers()[-1]
    data_ends = last.offset_data + 512
    for cut in range(600, data_ends + 500, 100):
        file = tmp_path / "cut.tar"
        file.write_bytes(whole[:cut])
        usable = [number for number, end in enumerate(ends) if end <= cut]
        source = find(file)
        found = source.scan(lambda done, total: None, None)
        assert _contents(found) == EXPECTED[: len(usable)], cut
        assert bool(found.skipped) == (cut < data_ends + 512), (cut, found.skipped)
        assert all("cut" in item.reason or "no " in item.reason for item in found.skipped), found.skipped
    damaged = bytearray(whole)
    damaged[ends[2] // 512 * 512 + 512 : ends[2] // 512 * 512 + 1024] = b"x" * 512  # the next header
    file.write_bytes(bytes(damaged))
    found = find(file).scan(lambda done, total: None, None)
    assert _contents(found) == EXPECTED[:3]
    assert "damaged after 6 members" in found.skipped[0].reason


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("page.tar", b"<!DOCTYPE html>" * 100, "no tar file"),
        ("a.tar.gz", b"\x1f\x8b" + bytes(600), "no shard"),
        ("empty.tar", b"", "cannot be used"),
        ("nothing.tar", bytes(10240), "it is empty"),
    ],
)
def test_files_that_are_no_shards_are_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{said}[\s\S]*allowed:[\s\S]*hint:"):
        read(tmp_path / name)


def test_shards_that_are_not_there_are_refused(shards: Path) -> None:
    with pytest.raises(UserError, match=r"2 of 5 shards are not there, the first is \S*00003.tar[\s\S]*hint:"):
        read(f"{shards}/{{00000..00004}}.tar")


def test_the_index_is_kept_and_follows_the_file(shards: Path, tmp_path: Path) -> None:
    """A second scan reads nothing of the shards (they are swapped for ones of equal size, which nobody may notice)."""
    kept = tmp_path / "index"
    first = read(shards, index=kept)
    assert len(list(kept.iterdir())) == 3
    file = shards / "00001.tar"
    times = file.stat()
    content = file.read_bytes()
    file.write_bytes(bytes(len(content)))
    import os

    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    again = read(shards, index=kept)
    assert again == first
    file.write_bytes(content)  # now its time has changed
    assert _contents(read(shards, index=kept)) == EXPECTED and len(list(kept.iterdir())) == 4
    for damaged in kept.iterdir():
        damaged.write_text(damaged.read_text()[:50])
    assert _contents(read(shards, index=kept)) == EXPECTED


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait a hundredth as long before trying again."""
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.005)


@pytest.mark.parametrize("ranges", [True, False])
def test_shards_of_a_server_are_those_of_the_disk(
    shards: Path, tmp_path: Path, ranges: bool, soon: None, served: Served
) -> None:
    """The connection breaks twice and the server fails twice; then in any order."""
    with served(shards, ranges=ranges, breaks=[3000, 100], fails=[503, 429]) as (url, asked):
        found = read(f"{url}/{{00000..00002}}.tar", index=tmp_path / "index")
        assert _contents(found) == EXPECTED and found.names[9] == "00001.tar/00009.png"
        order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
        assert [found.files[place].read_bytes() for place in order] == [EXPECTED[place][0] for place in order]
        asked.clear()
        again = read(f"{url}/{{00000..00002}}.tar", index=tmp_path / "index")
        assert again.digests == found.digests
        assert asked == ["bytes=0-0"] * 3  # one question a shard, whether it has changed
        assert again.files[20].read_bytes() == EXPECTED[20][0]
        fingerprint = find(f"{url}/00001.tar").fingerprint()
        _shard(shards / "00001.tar", _members(range(5)))
        assert find(f"{url}/00001.tar").fingerprint() != fingerprint


def test_a_server_without_ranges_is_read_once_forward(shards: Path, soon: None, served: Served) -> None:
    """Pictures asked for in order cost one connection a shard, and going back another."""
    with served(shards, ranges=False) as (url, asked):
        source = find(f"{url}/{{00000..00002}}.tar")
        assert isinstance(source, WebDataset)
        found = source.scan()
        remote.replayed.cache_clear()
        asked.clear()
        assert _contents(found) == EXPECTED
        assert len([each for each in asked if each != "bytes=0-0"]) == 3
        assert found.files[0].read_bytes() == EXPECTED[0][0]


def test_latents_from_a_server_are_those_from_the_disk(
    shards: Path, tmp_path: Path, spelled: Any, soon: None, served: Served
) -> None:
    def batch(data: str | Path, cache: Path) -> Any:
        latents = encode_all(read(data), 16, spelled, Cache(cache, cache, lambda line: None))
        return latents.batch(tuple(range(24)))

    with served(shards, ranges=False) as (url, _):
        there, here = batch(f"{url}/{{00000..00002}}.tar", tmp_path / "a"), batch(shards, tmp_path / "b")
    assert there.mean.equal(here.mean) and there.condition["words"].equal(here.condition["words"])


def test_a_server_that_does_not_answer_is_refused(shards: Path, soon: None, served: Served) -> None:
    with served(shards, fails=[500] * 50) as (url, asked):
        with pytest.raises(UserError, match=r"HTTP 500 .* 6 times[\s\S]*hint: when the server is back"):
            read(f"{url}/00000.tar")
        assert len(asked) == 6
    with served(shards) as (url, asked):
        with pytest.raises(UserError, match=r"HTTP 404[\s\S]*hint: check the address"):
            read(f"{url}/00007.tar")
        assert len(asked) == 1
    with pytest.raises(UserError, match=r"6 times[\s\S]*hint:"):
        read(f"{url}/00000.tar")  # nobody listens any more
    with pytest.raises(UserError, match=r"no shard[\s\S]*hint:"):
        read(f"{url}/pictures.zip")


@pytest.mark.parametrize(
    ("habits", "pauses"),
    [
        ({"fails": [503] * 5}, [0.5, 1, 2, 4, 8]),
        ({"fails": [429, 503], "retry_after": 3}, [3, 3]),
        ({"fails": [503], "retry_after": 7200}, [60]),
        ({"fails": [500], "retry_after": "Wed, 21 Oct 2026 07:28:00 GMT"}, [0.5]),
    ],
)
def test_pauses_grow_follow_the_server_and_are_capped(
    shards: Path, served: Served, habits: dict[str, Any], pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every failure is counted by what it said, once."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    remote.failures()
    with served(shards, **habits) as (url, asked):
        assert remote.head(f"{url}/00000.tar").ranges
    assert waited == pauses and len(asked) == len(pauses) + 1
    counted = remote.failures()
    assert sum(counted.values()) == len(pauses) and all(said.startswith("HTTP ") for said in counted), counted
    assert not remote.failures()


def test_a_shard_cut_on_the_server_gives_what_is_before_the_cut(shards: Path, soon: None, served: Served) -> None:
    content = (shards / "00000.tar").read_bytes()
    (shards / "00000.tar").write_bytes(content[: len(content) // 2])
    with served(shards) as (url, _):
        found = find(f"{url}/00000.tar").scan(lambda done, total: None, None)
        assert 0 < len(found.files) < 8 and _contents(found) == EXPECTED[: len(found.files)]
    assert any("cut off" in item.reason for item in found.skipped)
