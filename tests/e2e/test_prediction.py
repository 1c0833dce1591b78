"""A student that answers v, of a teacher that answers epsilon: whatever opens it is told so."""

import json
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from decant.cli.main import main
from decant.scenes.folder import draw_folder

LESSON = ["steps=25", "batch_size=8", "task=0", "feature=0", "learning_rate=1e-3", "held_out=0.2", "held_out_most=8"]


def decant(words: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert not stop.value.code


@pytest.mark.slow
def test_a_v_teacher_is_made_of_the_shipped_one_and_teaches_on(tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data", 60, "train")
    made, student, looked = tmp_path / "v", tmp_path / "student", tmp_path / "looked"
    words = ["--data", str(data), "--set", *LESSON]
    decant(["distill", "scenes", "--teacher", "scenes", "--out", str(made), *words, "prediction=v_prediction"])
    held_out = json.loads((made / "decant.json").read_text())["held_out"]
    assert held_out["output_error_after"] < 0.75 * held_out["output_error_before"], "compared as epsilon"
    scheduler = StableDiffusionPipeline.from_pretrained(made).scheduler
    assert scheduler.config["prediction_type"] == "v_prediction"
    # What it answers is read from its folder: by a run that goes on with it, towards the same teacher.
    decant(["distill", str(made), "--teacher", "scenes", "--out", str(student), *words, "steps=2"])
    after = json.loads((student / "decant.json").read_text())["held_out"]
    assert after["output_error_before"] == pytest.approx(held_out["output_error_after"], rel=1e-3)
    assert StableDiffusionPipeline.from_pretrained(student).scheduler.config["prediction_type"] == "v_prediction"
    how = ["images=2", "steps=2", "held_out=0.2", "held_out_most=8", "latency_repeats=0"]
    decant(["evaluate", str(made), "--teacher", "scenes", "--data", str(data), "--out", str(looked), "--set", *how])
    scores = json.loads((looked / "report.json").read_text())["models"][1]["scores"]
    assert scores["output_error"]["value"] == pytest.approx(held_out["output_error_after"], rel=1e-2)
