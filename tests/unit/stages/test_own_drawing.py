"""A student of few steps is drawn as its record says, wherever nothing else is said."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from decant.models.generate import generate
from decant.models.load import load, save
from decant.models.samplers import Drawing
from decant.scenes.folder import draw_folder
from decant.stages.bench import How, bench, drawn_as
from decant.stages.draw import draw_to
from decant.stages.record import drawing_of
from processes import here

SAID = {"steps": 2, "guidance_scale": 1.0, "sampler": "lcm"}
PROMPT = "a large red circle on a white background"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "few"
    save(load("scenes-xl"), folder)
    (folder / "decant.json").write_text(json.dumps({"stage": "consistency", "sampling": SAID}))
    return folder


def test_a_picture_follows_the_record_and_what_is_said_goes_before(student: Path, tmp_path: Path) -> None:
    (found,) = draw_to(str(student), [PROMPT], [], 7, tmp_path / "own", "cpu")
    assert found["steps"] == 2
    (same,) = generate(load(student), [PROMPT], [7], steps=2, guidance_scale=1.0, sampler="lcm")
    assert np.array_equal(np.asarray(Image.open(found["file"])), same)
    (other,) = draw_to(str(student), [PROMPT], [3], 7, tmp_path / "said", "cpu", guidance_scale=4.0, sampler="ddim")
    (same,) = generate(load(student), [PROMPT], [7], steps=3, guidance_scale=4.0, sampler="ddim")
    assert np.array_equal(np.asarray(Image.open(other["file"])), same)


def test_a_measurement_follows_it_beside_one_that_does_not(student: Path) -> None:
    how = How(steps=3, guidance_scale=4.0, repeats=1, warmup=0, device="cpu")
    said = drawing_of(student)
    assert said is not None and drawing_of("scenes-xl") is None
    found = bench({"teacher": "scenes-xl", "few": student}, how, print, {"few": drawn_as(how, said)})
    told = {name: (entry["steps"], entry["guidance_scale"], entry["sampler"]) for name, entry in found.items()}
    assert told == {"teacher": (3, 4.0, "ddim"), "few": (2, 1.0, "lcm")}
    assert found["few"]["measured"]["steps"] == 2 and "measured_as" not in found["few"]


def test_a_cut_of_it_is_drawn_so_too(student: Path, tmp_path: Path) -> None:
    done = here("prune", "--teacher", student, "--student", "vega", "--rule", "even", "--out", tmp_path / "cut")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "cut" / "decant.json").read_text())["sampling"] == SAID


def test_a_student_of_a_teachers_outputs_is_drawn_as_that(student: Path, tmp_path: Path) -> None:
    """It gets the teacher's scheduler, so that what its parent was made for holds no longer, and the teacher's does."""
    pictures = draw_folder(tmp_path / "pictures", 30, "train")
    few = ("steps=1", "batch_size=2", "feature=0", "held_out=0.2", "held_out_most=2", "device=cpu")
    sets = [word for each in few for word in ("--set", each)]
    drawn = {}
    for name, source, teacher in (("usual", student, "scenes-xl"), ("few", "scenes-xl", student)):
        out = tmp_path / name
        done = here("distill", source, "--teacher", teacher, "--data", pictures, "--out", out, *sets)
        assert done.returncode == 0, done.stderr
        drawn[name] = drawing_of(out)
    assert drawn == {"usual": None, "few": Drawing(**SAID)}
