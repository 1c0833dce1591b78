"""The evaluation as a stage: sizes that the checker cannot read, and a model without students."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from decant.cli.work import one_stage
from decant.errors import UserError
from decant.report.collect import collect
from decant.scenes.folder import draw_folder
from decant.stages.evaluate import Evaluate, aspect_of, run
from decant.stages.stage import Inputs


def cut(out: Path) -> str:
    one_stage("prune", {"student": "bk-tiny"}, teacher="scenes", models={"teacher": "scenes"}, out=out, talk=print)
    return str(out)


FEW = {"images": 2, "steps": 1, "latency_repeats": 0, "shown": 1}


def test_captions_of_scenes_beside_larger_pictures_are_evaluated_without_the_checker(tmp_path: Path) -> None:
    """A user's own folder may hold scenes at 256 px: drawn and compared, and it is said why nothing was read."""
    folder = draw_folder(tmp_path / "data", 12, "train")
    for file in folder.glob("*.png"):
        Image.open(file).resize((256, 256)).save(file)
    settings = Evaluate(size=256, held_out=0.4, held_out_most=2, **FEW)
    result = run(settings, Inputs("scenes", {"teacher": "scenes"}, folder, 0, tmp_path), tmp_path / "out")
    (teacher,) = result["models"]
    assert {"output_error", "distance_to_teacher"} <= teacher["scores"].keys()
    assert not any(name.startswith(("scene_accuracy", "fid_scenes", "kid_scenes")) for name in teacher["scores"])
    reasons = {item["score"]: item["reason"] for item in result["left_out"]}
    assert "not 256 x 256" in reasons["scene_accuracy"] and "fid_scenes_classifier" in reasons
    assert np.asarray(Image.open(tmp_path / "out/pictures/teacher/0.png")).shape == (256, 256, 3)
    assert result["pictures"][0]["models"]["teacher"]["correct"] is None


def test_the_aspect_is_that_of_the_students_distillation(tmp_path: Path) -> None:
    """Found in the record or in the lineage; of two kinds of students it must be named."""

    def student(name: str, **record: object) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "decant.json").write_text(json.dumps(record))
        return str(tmp_path / name)

    tall = {"stage": "distill", "settings": {"aspect": "letterbox"}}
    models = {"teacher": "scenes", "cut": student("cut", stage="prune")}
    assert aspect_of(models) == "crop"
    models["half"] = student("half", stage="quantize", lineage=[{"stage": "prune"}, tall])
    assert aspect_of({**models, "teacher": student("old", stage="distill", settings={})}) == "letterbox"
    models["first"] = student("first", stage="distill", settings={"steps": 3})
    with pytest.raises(UserError, match=r"half letterbox, first crop[\s\S]*hint:"):
        aspect_of(models)


def test_held_out_pictures_are_seen_as_training_saw_them(tmp_path: Path) -> None:
    """The output error of another aspect is that of other latents; captions and pictures drawn are the same."""
    folder = draw_folder(tmp_path / "data", 12, "train")
    for file in folder.glob("*.png"):
        Image.open(file).resize((192, 64)).save(file)
    models = {"teacher": "scenes", "student": cut(tmp_path / "cut")}
    errors = {}
    for aspect in ("crop", "stretch"):
        settings = Evaluate(held_out=0.4, held_out_most=2, aspect=aspect, **FEW)
        result = run(settings, Inputs("scenes", models, folder, 0, tmp_path / "work"), tmp_path / aspect)
        errors[aspect] = result["models"][1]["scores"]["output_error"]["value"]
    assert errors["crop"] != errors["stretch"] and min(errors.values()) > 0


def test_a_model_alone_is_its_own_teacher(tmp_path: Path) -> None:
    result = run(Evaluate(**FEW), Inputs("scenes", {}, None, 0, tmp_path), tmp_path)
    (alone,) = result["models"]
    assert alone["role"] == "teacher" and alone["scores"]["scene_accuracy"]["n"] == 2
    assert alone["parameters"] == 11_273_924 and alone["latency_ms"] == {}
    (tmp_path / "decant.json").write_text(json.dumps({"stage": "evaluate", "name": "evaluate", **result}))
    report = json.loads(collect(tmp_path).read_text())
    assert report["left_out"] == result["left_out"] and report["peak_memory_mb"] > 100
