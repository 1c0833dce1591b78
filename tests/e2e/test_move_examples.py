"""The examples of moving train, move and measure: a few steps and pictures, so that they stay runnable."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from diffusers import ControlNetModel, StableDiffusionPipeline

from decant.cli.main import main
from decant.scenes.checker import read, score
from decant.scenes.render import COLOUR_RGB, places, render
from decant.scenes.world import scenes

EXAMPLES = Path(__file__).parents[2] / "examples"


def _example(name: str) -> ModuleType:
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("students") / "tiny"
    with pytest.raises(SystemExit) as left:
        main(["prune", "--teacher", "scenes", "--student", "bk-tiny", "--out", str(folder)])
        raise SystemExit(0)
    assert not left.value.code
    return folder


def test_the_checker_reads_the_new_colour_and_the_old_ones_beside_it() -> None:
    """As drawn, amber is amber, and orange and yellow, its neighbours, stay what they are."""
    example = _example("move_lora")
    for make in (example.recoloured, scenes):
        told = list(make(40, "held-out", 1_000_000))
        assert all(
            score(read(render(scene, seed, example.COLOURS), example.COLOURS), scene).exact for seed, scene in told
        )
    assert not any("amber" in str(read(render(s, seed))) for seed, s in scenes(5, "train"))
    assert "amber" not in COLOUR_RGB


@pytest.mark.slow
def test_a_lora_is_trained_moved_and_measured(student: Path, tmp_path: Path) -> None:
    example: Any = _example("move_lora")
    first = example.train(tmp_path / "first", steps=2, rank=2, lr=1e-3, pictures=24)
    file = example.train(tmp_path / "lora", steps=1, rank=2, lr=1e-3, begin=first, pictures=24)
    assert file.stat().st_size < 2**20
    rows = example.measure(file, [student], tmp_path, 2)
    assert [row["model"] for row in rows] == ["teacher", "tiny"]
    assert rows[1]["moved"] == 72 and rows[1]["modules"] == 128
    assert example.table(rows, example.percent).count("\n") == 3
    StableDiffusionPipeline.from_pretrained(student).load_lora_weights(str(tmp_path / "tiny.safetensors"))


@pytest.mark.slow
def test_a_controlnet_is_trained_moved_and_measured(student: Path, tmp_path: Path) -> None:
    example: Any = _example("move_controlnet")
    folder = example.train(tmp_path, steps=1, lr=1e-4, pictures=16)
    rows = example.measure(folder, [student], tmp_path / "moved", 2)
    assert rows[1]["parameters"] < rows[1]["parameters_before"]
    assert example.table(rows).count("\n") == 3
    assert json.loads((tmp_path / "moved" / "tiny" / "config.json").read_text())["mid_block_type"] == "UNetMidBlock2D"
    ControlNetModel.from_pretrained(tmp_path / "moved" / "tiny")


def test_marks_are_where_things_are_drawn() -> None:
    example: Any = _example("move_controlnet")
    for seed, scene in scenes(20, "train"):
        for x, y in places(scene, seed):
            assert example.marks(scene, seed)[0, int(y), int(x)] == 1
        assert example._stands(read(render(scene, seed)), read(render(scene, seed)))
