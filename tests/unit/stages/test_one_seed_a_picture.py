"""Scores do not depend on how many pictures are drawn together: one seed a picture."""

from pathlib import Path
from typing import Any

import pytest

from decant.models.load import load, save, with_unet
from decant.models.surgery.presets import published
from decant.models.surgery.surgery import build
from decant.stages.evaluate import Evaluate, run
from decant.stages.stage import Inputs


def evaluated(student: Path, batch_size: int, out: Path) -> dict[str, Any]:
    settings = Evaluate(
        captions="scenes", images=40, steps=6, guidance_scale=4.0, batch_size=batch_size, shown=0, latency_repeats=0
    )
    inputs = Inputs("scenes", {"teacher": "scenes", "student": student}, None, 0, out / "work")
    return {model["name"]: model["scores"] for model in run(settings, inputs, out)["models"]}


@pytest.mark.slow
def test_scores_are_the_same_at_batch_1_and_64(tmp_path: Path) -> None:
    """Of the shipped teacher, right or wrong in several captions at so few steps, and of a cut that draws nothing."""
    teacher = load("scenes")
    cut = build(published(dict(teacher.unet.config), teacher.unet.state_dict(), "bk-base"))
    save(with_unet(teacher, cut), tmp_path / "student")
    single, together = (evaluated(tmp_path / "student", n, tmp_path / str(n)) for n in (1, 64))
    assert 0.5 < single["teacher"]["scene_accuracy"]["value"] < 1
    for name, scores in single.items():
        assert scores.keys() == together[name].keys() >= {"scene_accuracy", "fid_scenes_classifier"}
        for key, figure in scores.items():
            other = together[name][key]
            if figure.get("unit") == "number":
                assert other["value"] == pytest.approx(figure["value"], rel=1e-3, abs=1e-3), (name, key)
            else:
                assert other == figure, (name, key)
