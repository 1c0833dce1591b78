"""Folders of pictures damaged in many ways: a run finishes, and says exactly what it skipped and why."""

import importlib.util
import io
import json
import os
import re
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import AutoencoderKL
from PIL import Image

from processes import here

RECIPE = {
    "name": "damaged",
    "stages": [
        {"stage": "prune", "name": "cut", "from": "teacher", "settings": {"student": "bk-tiny"}},
        {"stage": "distill", "name": "tiny", "from": "cut", "settings": {"steps": 3, "batch_size": 4}},
    ],
}


def _content(index: int, kind: str = "PNG") -> bytes:
    """A picture of 64 x 64 that no other index gives."""
    image = Image.new("RGB", (64, 64), (index % 256, index // 256, 90))
    image.paste((255, 255, 255), (8, 8, 16 + index % 40, 40))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def _png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises width x height pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def _flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


CONTENTS: dict[str, tuple[Callable[[int], bytes], str]] = {
    "no bytes": (lambda i: b"", "format"),
    "words": (lambda i: b"these are words %d" % i, "format"),
    "an error page": (lambda i: b"<!DOCTYPE html><html><body>404 Not Found %d</body></html>" % i, "format"),
    "a program": (lambda i: b"%%!PS-Adobe-3.0 EPSF-3.0\n%%%%BoundingBox: 0 0 9 9\nshowpage %d\n" % i, "format"),
    "cut in half": (lambda i: _content(i)[: len(_content(i)) // 2], "truncated"),
    "cut in its header": (lambda i: _content(i)[:20], ""),
    "cut before its end": (lambda i: _content(i)[:-40], "truncated"),
    "a cut JPEG": (lambda i: _content(i, "JPEG")[:-60], "truncated"),
    "a flipped bit in its header": (lambda i: _flipped(_content(i), 22), ""),
    "a flipped bit in its pixels": (lambda i: _flipped(_content(i), 60), "damaged"),
    "a bomb": (lambda i: _png(30_000 + i, 30_000), "bomb"),
    "a smaller bomb": (lambda i: _png(9_500 + i, 9_500), "bomb"),
    "no pixels": (lambda i: _png(0, 5 + i), ""),
}
LISTED: dict[str, tuple[str, str]] = {
    "listed but absent": ('{"file_name": "NAME", "text": "x"}', "no such file"),
    "out of the folder": ('{"file_name": "../NAME", "text": "x"}', "leaves the folder"),
    "broken JSON": ('{"file_name": "NAME", "text": "x"', "JSON"),
    "not UTF-8": ('{"file_name": "NAME", "text": "caf\udce9"}', "UTF-8"),
}
CAPTIONS: dict[str, tuple[object, str]] = {
    "an empty caption": (" \n", "empty"),
    "no text": (None, "no caption"),
    "a number for a caption": (7, "not text"),
}
PLACES = {"a folder": "folder", "a link in a circle": "nowhere", "a link out": "link", "not listed": "not in the"}
WAYS = [*CONTENTS, *LISTED, *CAPTIONS, *PLACES, "listed twice", "an unread format"]
if os.geteuid() != 0:
    WAYS.append("locked")


def _damage(folder: Path, way: str, index: int, lines: list[str]) -> tuple[str, str]:
    """Damage the entry of one picture; the name that must be skipped, and a word of the reason."""
    name = f"{index:05d}.png"
    line = json.dumps({"file_name": name, "text": f"picture {index}"})
    file = folder / name
    match way:
        case _ if way in CONTENTS:
            make, word = CONTENTS[way]
            file.write_bytes(make(index))
        case _ if way in LISTED:
            text, word = LISTED[way]
            line = text.replace("NAME", name)
            name = f"metadata.jsonl:{len(lines) + 1}" if way in ("broken JSON", "not UTF-8") else name
            name = f"../{name}" if way == "out of the folder" else name
        case _ if way in CAPTIONS:
            caption, word = CAPTIONS[way]
            file.write_bytes(_content(index))
            line = json.dumps({"file_name": name, "text": caption})
        case "a folder":
            file.mkdir()
            word = "folder"
        case "a link in a circle":
            file.symlink_to(file)
            word = "nowhere"
        case "a link out":
            file.symlink_to(folder.parent / "recipe.yaml")
            word = "link"
        case "not listed":
            file.write_bytes(_content(index))
            line, word = "", "not in the metadata"
        case "listed twice":
            name, line, word = "00000.png", json.dumps({"file_name": "00000.png", "text": "picture 0"}), "twice"
        case "an unread format":
            name = f"{index:05d}.heic"
            (folder / name).write_bytes(b"....ftypheic")
            line, word = "", "convert it"
        case "locked":
            file.write_bytes(_content(index))
            file.chmod(0)
            word = "Permission"
        case _:
            raise AssertionError(way)
    lines.append(line)
    return name, word


def _folder(folder: Path, entries: int, damaged: int) -> list[tuple[str, str]]:
    """``entries`` entries, ``damaged`` of them damaged, all ways alike often; what must be skipped, and why."""
    folder.mkdir()
    lines: list[str] = []
    expected = []
    every = entries // damaged
    for index in range(entries):
        if index % every == every - 1 and len(expected) < damaged:
            expected.append(_damage(folder, WAYS[len(expected) % len(WAYS)], index, lines))
        else:
            (folder / f"{index:05d}.png").write_bytes(_content(index))
            lines.append(json.dumps({"file_name": f"{index:05d}.png", "text": f"picture {index % 500}"}))
    (folder / "metadata.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    return sorted(expected)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest pipeline of the layout, written by diffusers."""
    file = Path(__file__).parents[1] / "unit" / "models" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tiny_pipeline", file)
    assert spec is not None and spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    pipeline = tiny._pipeline()
    pipeline.vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
    )
    where = tmp_path_factory.mktemp("teacher") / "tiny"
    pipeline.save_pretrained(where)
    return where


def _run(folder: Path, teacher: Path) -> subprocess.CompletedProcess[str]:
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
    words = ["run", folder / "recipe.yaml", "--teacher", teacher, "--data", folder / "data", "--out", folder / "out"]
    return here(*words)


@pytest.mark.parametrize(("entries", "damaged"), [(300, 28), pytest.param(10_000, 200, marks=pytest.mark.slow)])
def test_a_run_skips_what_is_damaged_and_names_it(tmp_path: Path, teacher: Path, entries: int, damaged: int) -> None:
    expected = _folder(tmp_path / "data", entries, damaged)
    done = _run(tmp_path, teacher)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "out/02-tiny/decant.json").read_text())["data"]
    skipped = told["skipped"]
    assert [item["name"] for item in skipped] == [name for name, _ in expected]
    wrong = [(item, word) for item, (_, word) in zip(skipped, expected, strict=True) if word not in item["reason"]]
    assert not wrong
    assert len(expected) == damaged and told["used"] > 0.85 * (entries - damaged)
    assert f"skipped {damaged} of {entries} entries" in done.stderr
    named = re.findall(r"skipped (\S+): ", done.stderr)
    assert named == [name for name, _ in expected[:20]] and f"and {damaged - 20} more" in done.stderr
    lines = (tmp_path / "out/02-tiny/skipped.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [name for name, _ in expected]


def test_more_than_a_tenth_is_refused_before_anything_is_trained(tmp_path: Path, teacher: Path) -> None:
    expected = _folder(tmp_path / "data", 120, 30)
    done = _run(tmp_path, teacher)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "30 of 120 entries" in done.stderr and "hint:" in done.stderr
    named = Path(re.search(r"all are named in (\S+\.tsv)", done.stderr)[1])  # type: ignore[index]
    assert len(named.read_text().splitlines()) == len(expected) == 30
    assert not list((tmp_path / "out").rglob("step-*")) and not (tmp_path / "out/02-tiny").exists()


def test_a_folder_without_metadata_names_what_it_cannot_read(tmp_path: Path, teacher: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for index in range(60):
        (data / f"{index:02d}.png").write_bytes(_content(index))
        (data / f"{index:02d}.txt").write_text("word " * (120 if index % 10 == 0 else 3))
    (data / "circle.png").symlink_to(data / "circle.png")
    (data / "folder.jpg").mkdir()
    (data / "phone.heic").write_bytes(b"....ftypheic")
    (data / "01.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (data / "02.txt").unlink()
    done = _run(tmp_path, teacher)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "out/02-tiny/decant.json").read_text())["data"]
    names = ["01.png", "02.png", "circle.png", "folder.jpg", "phone.heic"]
    assert [item["name"] for item in told["skipped"]] == names
    assert told["captions_cut"] == 6 and "6 of 58 captions are longer than the 77 tokens" in done.stderr
