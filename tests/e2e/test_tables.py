"""The commands that write the tables of docs: all of each once, small."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from decant.cli.work import run_and_report
from decant.scenes.folder import draw_folder
from processes import Begun

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


METHOD = "consistency, then distribution matching"


def look_quickly(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations of two sampler steps, without the times that no table has."""
    whole = table.run_stage

    def quick(name: str, stage: Any, settings: dict[str, Any], **places: Any) -> dict[str, Any]:
        return whole(name, stage, {**settings, "steps": 2, "latency_repeats": 0}, **places)

    monkeypatch.setattr(table, "run_stage", quick)


@pytest.mark.slow
def test_what_each_part_buys_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of row: terms, floors, rounds, prompts, random latents, teachers in turn."""
    table = example("terms_table")
    look_quickly(table, monkeypatch)
    monkeypatch.setattr(table, "PICTURES", 110)
    monkeypatch.setattr(
        table, "TERMS", {"task + output + layer features": table.TERMS["task + output + layer features"]}
    )
    monkeypatch.setattr(table, "XL_STUDENTS", {"ssd-1b": "SSD-1B"})
    monkeypatch.setattr(table, "XL_TERMS", tuple(table.TERMS))
    for key, value in {"batch_size": 2, "warmup": 0, "held_out_most": 2, "prompt_steps": 2}.items():
        monkeypatch.setitem(table.COMMON, key, value)
    words = ["--steps", "3", "--tune-steps", "1", "--images", "2"]
    table.main([*words, "--out", str(tmp_path / "out"), "--page", str(tmp_path / "page.md")])
    rows = [
        line
        for line in (tmp_path / "page.md").read_text().splitlines()
        if line.startswith("| ") and not line.startswith("| what")
    ]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [
        "teacher",
        "the cut, undistilled",
        "random weights, output",
        "task + output + layer features",
        "three rounds of cut and distil",
        "the teacher's samples of prompts",
        "random latents",
        "teacher of v_prediction, made of the first by its outputs",
        "student of the teacher of v_prediction",
        "three teachers in turn",
        "teacher",
        "SSD-1B, the cut, undistilled",
        "SSD-1B, task + output + layer features",
    ]


@pytest.mark.slow
def test_presets_are_measured_beside_their_floors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = example("presets_table")
    look_quickly(table, monkeypatch)

    def forked(words: list[str], **how: Any) -> None:
        assert words[:3] == [sys.executable, "-m", "decant"] and how["check"]
        child = Begun(words[3:], tmp_path / "said")
        assert child.wait() == 0, child.said

    monkeypatch.setattr(table, "subprocess", SimpleNamespace(run=forked, DEVNULL=None))
    whole = table.presets

    def one(family: str) -> dict[str, Any]:
        few = [f"distill.{each}=2" for each in ("batch_size", "held_out_most", "evaluate_images", "sample_steps")]
        few += ["distill.warmup=0"]
        return {
            name: table.override(each, few) for name, each in whole(family).items() if name in ("bk-sdm-tiny", "v2.2")
        }

    monkeypatch.setattr(table, "presets", one)
    monkeypatch.setattr(table, "PICTURES", 110)
    words = ["--steps", "1", "--longer", "2", "--images", "2", "--families", "sd1"]
    table.main([*words, "--out", str(tmp_path / "out"), "--page", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    for name in (
        "teacher, `scenes`",
        "v2.2",
        "v2.2, 2 steps",
        "bk-sdm-tiny",
        "bk-sdm-tiny, cut alone",
        "bk-sdm-tiny, from random weights",
    ):
        assert f"\n| {name} | " in page
    assert str(tmp_path) not in page


def test_methods_of_few_steps_are_compared_with_their_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two methods, one of them in two stages; the samplers are chosen, and the teacher stands beside at equal steps."""
    table = example("few_steps_table")
    small = {"batch_size": 2, "warmup": 0, "held_out_most": 2}
    whole = table.methods

    def two(updates: int) -> list[Any]:
        chosen = [method for method in whole(updates) if {"guided LoRA, rank 4", METHOD} & {*method[1].values()}]
        for stages, _ in chosen:
            for stage in stages:
                stage["settings"] |= small
        return chosen

    monkeypatch.setattr(table, "methods", two)
    monkeypatch.setattr(table, "PICTURES", 110)
    monkeypatch.setattr(table, "STEPS", (2, 1))
    words = ["--updates", "4", "--prompts", "2", "--images", "2", "--validation", "2", "--repeats", "1"]
    table.main([*words, "--out", str(tmp_path / "out"), "--page", str(tmp_path / "page.md")])
    rows = [line.split(" | ") for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| ")][1:]
    names = ["teacher, guided", "teacher, unguided", "guided LoRA, rank 4", METHOD]
    assert {row[0].removeprefix("| ") for row in rows} == set(names)
    steps = {name: [int(row[1]) for row in rows if row[0] == f"| {name}"] for name in names}
    assert steps == {names[0]: [25, 2, 1], names[1]: [25, 2, 1], names[2]: [25, 2, 1], METHOD: [2, 1]}
    assert all(row[2] in (*table.SAMPLERS, "ddim") for row in rows)


@pytest.mark.slow
def test_the_composed_student_is_measured_beside_its_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of `quickstart --full`, with a step a stage; its page has every model's own steps."""
    table, data = example("composed_table"), tmp_path / "data"
    draw_folder(data, 110, "train")
    small = {
        "distill": ("steps=1", "warmup=0", "batch_size=2", "held_out_most=2"),
        "consistency": ("steps=1", "warmup=0", "batch_size=2", "held_out_most=2"),
        "decoder": ("steps=2", "batch_size=2", "samples=3", "held_out_most=2", "latency_repeats=0"),
        "evaluate": ("images=2", "steps=1", "latency_repeats=0"),
    }
    sets = [f"{stage}.{each}" for stage, words in small.items() for each in words]
    said: list[str] = []
    run_and_report("quickstart-full", teacher="scenes", data=data, out=tmp_path / "run", sets=sets, talk=said.append)
    monkeypatch.setattr(table, "COMPILED", ())  # it takes minutes, which `decant bench --compile` is there for
    table.main([str(tmp_path / "run"), "--repeats", "1", "--page", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    rows = {
        cells[0].removeprefix("| "): cells
        for cells in (line.split(" | ") for line in page.splitlines() if line.startswith("| "))
    }
    assert [rows[name][1:3] for name in table.SHOWN] == [["25", "4"], ["25", "4"], ["3", "none"], ["3", "none"]]
    assert float(rows["composed"][-1].removesuffix(" |")) > 4, "three steps without guidance"
    assert str(tmp_path) not in page
