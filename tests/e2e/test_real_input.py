"""Pictures decant did not draw: glyphs of a font, named by Unicode, through the whole way."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from processes import here

GLYPHS = Path(__file__).parents[2] / "examples" / "glyphs.py"


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("glyphs", GLYPHS)
    assert spec is not None and spec.loader is not None
    glyphs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(glyphs)
    return glyphs


@pytest.mark.slow
def test_a_student_of_glyphs_halves_its_error_to_the_teacher(tmp_path: Path) -> None:
    """On held-out glyphs, the distilled student is at most half as far from its teacher as the cut it started from."""
    data, out = tmp_path / "glyphs", tmp_path / "run"
    example().main(data, 520)
    settings = ["steps=60", "batch_size=16", "accumulation=1", "learning_rate=5e-4", "schedule=one_cycle", "ema=0.95"]
    sets = [word for setting in settings for word in ("--set", f"tiny.{setting}")]
    quick = ["evaluate.images=2", "evaluate.steps=2", "evaluate.latency_repeats=1"]
    sets += [word for setting in quick for word in ("--set", setting)]
    places = ["--teacher", "scenes", "--data", str(data), "--out", str(out)]
    done = here("run", "bk-sdm-tiny", *places, *sets)
    assert done.returncode == 0, done.stderr
    held = json.loads((out / "02-tiny" / "decant.json").read_text())["held_out"]
    assert held["n"] >= 30
    assert held["output_error_after"] <= 0.5 * held["output_error_before"]
    report = json.loads((out / "report.json").read_text())
    errors = {model["name"]: model["scores"]["output_error"]["value"] for model in report["models"]}
    assert errors["teacher"] == 0
    assert errors["tiny"] == pytest.approx(held["output_error_after"], rel=1e-3)
    assert errors["cut"] == pytest.approx(held["output_error_before"], rel=1e-3)


def test_glyphs_are_different_pictures_with_different_names() -> None:
    glyphs = example()
    found = glyphs.named_characters(520)
    assert len(set(found)) == 520
    assert len({glyphs.glyph(character).tobytes() for character in found[:100]}) > 90
