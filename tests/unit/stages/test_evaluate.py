"""The evaluation as a stage: sizes that the checker cannot read, and a model without students."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from decant.report.collect import collect
from decant.scenes.folder import draw_folder
from decant.stages.evaluate import Evaluate, run
from decant.stages.stage import Inputs

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


def test_a_model_alone_is_its_own_teacher(tmp_path: Path) -> None:
    result = run(Evaluate(**FEW), Inputs("scenes", {}, None, 0, tmp_path), tmp_path)
    (alone,) = result["models"]
    assert alone["role"] == "teacher" and alone["scores"]["scene_accuracy"]["n"] == 2
    assert alone["parameters"] == 11_273_924 and alone["latency_ms"] == {}
    (tmp_path / "decant.json").write_text(json.dumps({"stage": "evaluate", "name": "evaluate", **result}))
    report = json.loads(collect(tmp_path).read_text())
    assert report["left_out"] == result["left_out"] and report["peak_memory_mb"] > 100
