"""The command line on every kind of data: a run from each, and a refusal with a hint for each that is bad."""

import contextlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from safetensors.torch import load_file

from decant.cli.main import main
from decant.scenes.folder import draw_folder

N = 24


def _rows(pictures: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]


def _coco(pictures: Path, out: Path) -> Path:
    rows = _rows(pictures)
    notes = [{"image_id": n, "caption": words} for n, row in enumerate(rows) for words in (row["text"], "a scene")]
    images = [{"id": n, "file_name": row["file_name"]} for n, row in enumerate(rows)]
    file = out / "captions_mine.json"
    file.write_text(json.dumps({"images": images, "annotations": notes}))
    (out / "mine").symlink_to(pictures)
    return file


def _shards(pictures: Path, out: Path) -> Path:
    for shard in range(2):
        with tarfile.open(out / f"{shard:05d}.tar", "w") as tar:
            for row in _rows(pictures)[shard::2]:
                tar.add(pictures / row["file_name"], row["file_name"])
                info = tarfile.TarInfo(row["file_name"].replace(".png", ".txt"))
                info.size = len(row["text"])
                tar.addfile(info, io.BytesIO(row["text"].encode()))
    return out


def _parquet(pictures: Path, out: Path) -> Path:
    rows = _rows(pictures)
    images = [{"bytes": (pictures / row["file_name"]).read_bytes(), "path": None} for row in rows]
    table = datasets.Dataset.from_dict({"image": images, "text": [row["text"] for row in rows]})
    table.cast_column("image", datasets.Image()).to_parquet(str(out / "table.parquet"))
    return out / "table.parquet"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("drawn") / "pictures", N, "train")


def _status(*words: str | Path) -> tuple[int, str]:
    """Exit status of a command, and what it said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            return int(end.code or 0), said.getvalue()
    return 0, said.getvalue()


def _run(data: Path, out: Path) -> Path:
    recipe = out.with_suffix(".yaml")
    settings = {"steps": 2, "batch_size": 2, "held_out": 0.3, "flip": True}
    cut = {"stage": "prune", "name": "cut", "from": "teacher", "settings": {"student": "bk-tiny"}}
    tiny = {"stage": "distill", "name": "tiny", "from": "cut", "settings": settings}
    recipe.write_text(json.dumps({"name": "sources", "stages": [cut, tiny]}))
    status, said = _status("run", recipe, "--teacher", "scenes", "--data", data, "--out", out)
    assert status == 0, said
    assert "data: " in said
    return out / "02-tiny"


@pytest.mark.parametrize("make", [_coco, _shards, _parquet], ids=lambda make: make.__name__.strip("_"))
def test_a_student_from_each_source_twice_the_same(
    pictures: Path, tmp_path: Path, make: Callable[[Path, Path], Path]
) -> None:
    """The second run has another cache, so the order and every draw are functions of the seed."""
    (tmp_path / "data").mkdir()
    data = make(pictures, tmp_path / "data")
    students = [_run(data, tmp_path / name) for name in ("a", "b")]
    record = json.loads((students[0] / "decant.json").read_text())
    assert record["data"]["used"] + record["data"]["held_out"] == N
    assert record["data"]["skipped"] == record["data"]["replaced"] == []
    first, again = [load_file(folder / "unet/diffusion_pytorch_model.safetensors") for folder in students]
    assert all(first[name].equal(again[name]) for name in first)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions_x.json", b'{"images": ['),
        ("captions.json", b"[1, 2, 3]"),
        ("captions.json", b"[]"),
        ("shard.tar", b"<html>404</html>" * 100),
        ("shard.tar.gz", b"\x1f\x8b" + bytes(600)),
        ("table.parquet", b"PAR1" + bytes(40)),
        ("pictures.zip", b"PK"),
    ],
)
def test_bad_data_is_exit_status_2_with_a_hint_and_costs_nothing(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    words = ["run", "bk-sdm-tiny", "--teacher", "scenes", "--data", tmp_path / name, "--out", tmp_path / "out"]
    status, said = _status(*words, "--dry-run")
    assert status == 2 and "hint:" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", ["absent", "{0..3}.tar", "hf:nobody/nothing", "http://127.0.0.1:9/x.zip"])
def test_data_that_is_not_there_is_exit_status_2_with_a_hint(tmp_path: Path, data: str) -> None:
    status, said = _status("run", "bk-sdm-tiny", "--teacher", "scenes", "--data", data, "--out", tmp_path / "out")
    assert status == 2 and "hint:" in said and "Traceback" not in said
