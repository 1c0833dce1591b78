"""Rounds: a student is cut out of a distilled student, and still belongs to the first teacher."""

import json
from pathlib import Path

import pytest

from decant.models.load import load
from decant.models.surgery.presets import Student, published
from decant.stages.evaluate import role_of
from decant.stages.prune import STAGE, Prune
from decant.stages.record import surgery_map_of
from decant.stages.stage import Inputs


def cut(student: Student, source: str | Path, out: Path, stage: str = "prune") -> Path:
    """A folder as the runner would leave it."""
    out.mkdir()
    inputs = Inputs(teacher="scenes", models={"model": source}, data=None, seed=0, work=out.parent / "work")
    record = STAGE.run(Prune(student=student), inputs, out)
    (out / "decant.json").write_text(json.dumps({**record, "stage": stage}))
    return out


def test_the_map_of_every_round_leads_to_the_teacher(tmp_path: Path) -> None:
    base = cut("bk-base", "scenes", tmp_path / "base")
    small = cut("bk-small", base, tmp_path / "small")
    tiny = cut("bk-tiny", small, tmp_path / "tiny")
    unet = load("scenes").unet
    for student, folder in (("bk-small", small), ("bk-tiny", tiny)):
        once = published(dict(unet.config), unet.state_dict(), student)
        assert surgery_map_of(folder) == once.surgery_map
        weights = load(folder).unet.state_dict()
        assert all(weights[name].equal(tensor) for name, tensor in once.weights.items())


def test_a_student_s_map_alone_leads_to_itself(tmp_path: Path) -> None:
    """Cut with the student as the teacher, the map leads to that student."""
    base = cut("bk-base", "scenes", tmp_path / "base")
    inputs = Inputs(teacher=str(base), models={"model": base}, data=None, seed=0, work=tmp_path / "work")
    record = STAGE.run(Prune(student="bk-tiny"), inputs, tmp_path / "tiny")
    assert set(record["surgery_map"]["parameters"].values()) <= load(base).unet.state_dict().keys()
    assert record["surgery_map"]["features"]["down_blocks.2.attentions.0.proj_out"].endswith("attentions.0.proj_out")


@pytest.mark.parametrize("source", ["teacher", "round before"])
def test_a_cut_is_the_control_of_the_student_of_its_kind(source: str, tmp_path: Path) -> None:
    """Wherever the student itself was cut from."""
    before = cut("bk-base", "scenes", tmp_path / "base", stage="distill")
    start = "scenes" if source == "teacher" else before
    models = {
        "teacher": "scenes",
        "base": before,
        "small": cut("bk-small", start, tmp_path / "small", stage="distill"),
        "small-cut": cut("bk-small", "scenes", tmp_path / "small-cut"),
        "tiny-cut": cut("bk-tiny", "scenes", tmp_path / "tiny-cut"),
    }
    assert {name: role_of(name, models) for name in models} == {
        "teacher": ("teacher", None),
        "base": ("student", None),
        "small": ("student", None),
        "small-cut": ("control", "small"),
        "tiny-cut": ("student", None),
    }
