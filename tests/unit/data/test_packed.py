"""Packed values and keys against lists and dicts; and what a picture of a shard costs in memory."""

import io
import pickle
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decant.data.captioned import Captioned
from decant.data.latents import Cache, encode_all
from decant.data.packed import Keys, Packed, Raw, Text, chosen, table_of
from decant.data.source import read

WORDS = st.lists(st.text(st.characters(), max_size=12))  # lone surrogates too
KEYS = st.lists(st.integers(0, 12).map(lambda number: bytes([number % 3, *[0] * 30, number])))


@given(WORDS, st.data())
def test_packed_values_are_those_of_a_list(words: list[str], data: st.DataObject) -> None:
    packed = Packed(Text(), words)
    assert packed == words and list(packed) == words and len(packed) == len(words)
    assert pickle.loads(pickle.dumps(packed)) == packed
    assert packed != [*words, "x"] and (not words or packed != [*words[:-1], words[-1] + "x"])
    places = data.draw(st.lists(st.integers(-len(words), len(words) - 1))) if words else []
    assert [packed[place] for place in places] == [words[place] for place in places]
    within = [place % len(words) for place in places]
    assert chosen(packed, within) == chosen(words, within) == packed.at(within)
    part = data.draw(st.slices(len(words)))
    assert packed[part] == tuple(words[part])
    with pytest.raises(IndexError):
        packed[len(words)]


@given(KEYS, KEYS)
def test_keys_are_found_as_a_dict_finds_them(given_keys: list[bytes], asked: list[bytes]) -> None:
    keys, known = Keys(table_of(given_keys)), list(dict.fromkeys(given_keys))
    assert keys.table.tolist() == known and len(keys) == len(known)
    assert keys.first.tolist() == [given_keys.index(key) for key in known]
    expected = [known.index(key) if key in known else -1 for key in asked]
    assert keys.find(table_of(asked)).tolist() == expected


def _shards(folder: Path, pictures: int) -> Path:
    """Pictures of one pixel, no two alike, 500 in a shard."""
    folder.mkdir()
    for first in range(0, pictures, 500):
        with tarfile.open(folder / f"{first:06d}.tar", "w") as tar:
            for number in range(first, min(first + 500, pictures)):
                pixel = b"P6 1 1 255\n" + number.to_bytes(3, "big")
                for kind, content in (("ppm", pixel), ("txt", f"picture {number % 100}".encode())):
                    info = tarfile.TarInfo(f"{number:08d}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def _peak(call: Callable[[], object]) -> int:
    """Bytes of Python's own objects, at most."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_picture_of_a_shard_costs_some_hundred_bytes(tmp_path: Path, spelled: Any) -> None:
    """Listed in a kept index and encoded before: what a run pays for each of many pictures."""
    cache = Cache(tmp_path / "cache", tmp_path / "cache", lambda line: None)

    def use(shards: Path) -> Captioned:
        found = read(shards, index=tmp_path / "index")
        encode_all(found, 8, spelled, cache)
        return found

    peaks = {}
    for pictures in (2000, 6000):
        shards = _shards(tmp_path / str(pictures), pictures)
        assert len(use(shards).files) == pictures
        # The least of three: what other tests' threads allocate meanwhile is counted too, and only ever adds.
        peaks[pictures] = min(_peak(lambda shards=shards: use(shards)) for _ in range(3))
    assert (peaks[6000] - peaks[2000]) / 4000 < 400, peaks


def test_packed_bytes_stay_bytes() -> None:
    assert Packed(Raw(), [b"a", b"", b"\0"])[1:] == (b"", b"\0")
