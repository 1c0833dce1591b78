"""Tables through the datasets library: parquet as that library writes it, and what the hub's absence looks like."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from decant.data.latents import Cache, encode_all
from decant.data.source import find, read
from decant.errors import UserError


def _png(index: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (index * 11 % 256, 7, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def _parquet(file: Path, images: list[Any], texts: list[Any], names: tuple[str, str] = ("image", "text")) -> Path:
    """As `Dataset.push_to_hub` writes it: pictures inside, with the library's own types in the metadata."""
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = {names[0]: [{"bytes": image, "path": None} for image in images], names[1]: texts}
    table = datasets.Dataset.from_dict({**columns, "url": ["x"] * len(texts)})
    table.cast_column(names[0], datasets.Image()).to_parquet(str(file))
    return file


def test_a_file_and_a_folder_give_pictures_and_captions_in_order(tmp_path: Path) -> None:
    images, texts = [_png(index) for index in range(8)], [f"picture {index}" for index in range(8)]
    _parquet(tmp_path / "set/data/train-00000-of-00002.parquet", images[:5], texts[:5])
    _parquet(tmp_path / "set/data/train-00001-of-00002.parquet", images[5:], texts[5:])
    _parquet(tmp_path / "set/data/test-00000-of-00001.parquet", [_png(20)], ["a test"])
    found = read(tmp_path / "set", index=tmp_path / "index")
    assert [file.read_bytes() for file in found.files] == images and found.captions == tuple(texts)
    assert found.names[6] == "00000006" and not found.skipped
    assert read(f"{tmp_path}/set?split=test").captions == ("a test",)
    one = tmp_path / "set/data/train-00001-of-00002.parquet"
    assert read(one).captions == tuple(texts[5:])
    assert find(tmp_path / "set").folders == (tmp_path / "set/data",)


def test_columns_are_known_by_type_and_name_or_named(tmp_path: Path) -> None:
    images = [_png(index) for index in range(3)]
    several = _parquet(
        tmp_path / "a.parquet", images, [["one", "two"], ["three"], ["four", "five"]], ("jpg", "captions")
    )
    assert read(several).choices == (("one", "two"), ("three",), ("four", "five"))
    odd = _parquet(tmp_path / "b.parquet", images, ["x", "y", "z"], ("photo", "words"))
    with pytest.raises(UserError, match=r"no column of texts[\s\S]*allowed: photo, words, url[\s\S]*\?text=COLUMN"):
        read(odd)
    assert read(f"{odd}?text=words").captions == ("x", "y", "z")
    with pytest.raises(UserError, match=r"no column 'wrods'[\s\S]*did you mean 'words'"):
        read(f"{odd}?text=wrods")
    with pytest.raises(UserError, match=r"unknown 'txt'[\s\S]*did you mean 'text'"):
        find(f"{odd}?txt=words")
    plain = tmp_path / "c.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"png": images, "caption": ["x", "y", "z"]}), plain)
    assert [file.read_bytes() for file in read(plain).files] == images


def test_rows_that_cannot_be_used_are_skipped_with_their_number_and_reason(tmp_path: Path) -> None:
    images: list[Any] = [_png(index) for index in range(12)]
    texts: list[Any] = [f"picture {index}" for index in range(12)]
    images[2], images[5], texts[7], texts[9] = images[2][:-40], None, None, " "
    found = read(_parquet(tmp_path / "a.parquet", images, texts), max_skipped=0.5)
    assert {item.name: item.reason.split(" (")[0] for item in found.skipped} == {
        "00000002": "the picture is damaged or truncated",
        "00000005": "the file cannot be read",
        "00000007": "no caption",
        "00000009": "the caption is empty",
    }
    numbers = _parquet(tmp_path / "b.parquet", images[:2], [1, 2])
    with pytest.raises(UserError, match=r"2 of 2 entries[\s\S]*not text \(int\)"):
        read(numbers)


def test_files_that_are_no_parquet_or_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    file = _parquet(tmp_path / "a.parquet", [_png(0)], ["x"])
    (tmp_path / "cut.parquet").write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"cut.parquet: no parquet file[\s\S]*hint:"):
        read(tmp_path / "cut.parquet")
    (tmp_path / "cut.parquet").unlink()
    pyarrow.parquet.write_table(pyarrow.table({"other": [1]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"allowed:[\s\S]*hint:"):
        read(tmp_path)


def test_a_dataset_of_the_hub_without_a_network_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"data hf:owner/name[\s\S]*HF_HUB_OFFLINE[\s\S]*hint:[\s\S]*hf download"):
        read("hf:owner/name")
    with pytest.raises(UserError, match=r"allowed:[\s\S]*hint:"):
        read("hf:no/such/name")


AWAY = """
import os, socket, sys, time
os.environ.pop("HF_HUB_OFFLINE", None)
server = socket.create_server(("127.0.0.1", 0))
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.getsockname()[1]}"
if sys.argv[1] == "refusing":
    server.close()
import datasets
from decant.data.source import read
begin = time.monotonic()
try:
    print(read("hf:owner/name").captions)
except ValueError as error:
    print(error)
print(f"took {time.monotonic() - begin:.1f}")
"""


def _asked(hub: str, home: Path) -> str:
    words, own = [sys.executable, "-c", AWAY, hub], {**os.environ, "HF_HOME": str(home)}
    said = subprocess.run(words, capture_output=True, text=True, check=True, env=own).stdout
    assert float(said.split("took ")[1]) < 15, said
    return said


@pytest.mark.parametrize("hub", ["refusing", "silent"])
def test_a_hub_that_is_away_is_not_waited_for(tmp_path: Path, hub: str) -> None:
    """It refuses connections, or takes them and never answers; its clients alone would try for half a minute."""
    said = _asked(hub, tmp_path)
    assert "it does not answer" in said and "hf download --repo-type dataset owner/name" in said


def test_where_the_hub_is_away_what_its_cache_holds_is_used(tmp_path: Path) -> None:
    file, kept = _parquet(tmp_path / "a.parquet", [_png(0)], ["x"]), tmp_path / "home" / "datasets"
    datasets.load_dataset("parquet", data_files=str(file), cache_dir=str(kept))
    (kept / "owner___name").mkdir()  # as the library names what came from the hub
    next((kept / "parquet").iterdir()).rename(kept / "owner___name" / "default")
    for table in kept.rglob("parquet-train.arrow"):
        table.rename(table.with_name("name-train.arrow"))
    assert "('x',)" in _asked("refusing", tmp_path / "home")


def test_without_the_library_the_command_that_installs_it_is_named(tmp_path: Path) -> None:
    """In a process that cannot find it."""
    file = _parquet(tmp_path / "a.parquet", [_png(0)], ["x"])
    code = "import sys; sys.modules['datasets'] = None\nfrom decant.data.source import read\nread(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False)
    assert "pip install 'decant[datasets]'" in done.stderr


def test_the_fingerprint_follows_contents_and_columns(tmp_path: Path) -> None:
    file = _parquet(tmp_path / "a.parquet", [_png(0)], ["x"])
    first = find(file).fingerprint()
    assert find(f"{file}?text=url").fingerprint() != first
    _parquet(file, [_png(0)], ["y"])
    assert find(file).fingerprint() != first


def test_latents_are_those_of_the_same_pictures_in_a_folder(tmp_path: Path, spelled: Any) -> None:
    images, texts = [_png(index) for index in range(5)], [f"picture {index}" for index in range(5)]
    file, folder, cache = _parquet(tmp_path / "a.parquet", images, texts), tmp_path / "folder", tmp_path / "cache"
    folder.mkdir()
    for index, (image, text) in enumerate(zip(images, texts, strict=True)):
        (folder / f"{index}.png").write_bytes(image)
        (folder / f"{index}.txt").write_text(text)
    batches = [
        encode_all(read(data), 16, spelled, Cache(cache, cache, lambda line: None)).batch(tuple(range(5)))
        for data in (file, folder)
    ]
    assert batches[0].mean.equal(batches[1].mean) and spelled.pictures == 5
