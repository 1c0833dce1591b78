"""The command that compares all kinds of students: which transformer blocks its rules keep, and all of it, small."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from decant.models.load import unet_config
from decant.models.surgery.cut import cut
from decant.models.surgery.parts import removable
from decant.models.surgery.surgery import layer_map, skeleton
from decant.stages.description import Description
from decant.stages.stage import validate


@pytest.fixture(scope="module")
def students() -> ModuleType:
    file = Path(__file__).parents[2] / "examples" / "students.py"
    spec = importlib.util.spec_from_file_location("students", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parts(cost: float = 1.0) -> list[dict[str, Any]]:
    """The scenes teacher's, the later the more damage."""
    return [
        {"name": part.name, "kind": part.kind, "damage": float(number), "latency_ms": {"median": cost}}
        for number, part in enumerate(removable(unet_config("scenes")))
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_a_spread_order_names_everything_once_and_its_ends_first(students: ModuleType, count: int) -> None:
    order = students.spread(count)
    assert sorted(order) == list(range(count))
    assert count < 3 or set(order[:2]) == {0, count - 1}


@pytest.mark.parametrize("rule", ["first", "even", "sensitive"])
def test_half_of_the_time_stays_and_the_description_keeps_just_that(students: ModuleType, rule: str) -> None:
    measured = parts()
    blocks = [part["name"] for part in measured if part["kind"] == "transformer block"]
    stay = students.blocks_kept(measured, rule)
    assert len(stay) == len(blocks) // 2
    assert rule != "first" or stay == blocks[:8]
    assert rule != "sensitive" or set(stay) == set(blocks[8:])
    described = validate(Description, students.described(measured, stay), "keep")
    config = unet_config("scenes")
    surgery = cut(config, skeleton(config).state_dict(), described.keep("first", "first"))
    kept = {".".join(source.split(".")[:6]) for source in surgery.surgery_map.parameters.values()}
    kept |= {".".join(source.split(".")[:5]) for source in surgery.surgery_map.parameters.values()}
    assert {name for name in blocks if name in kept} == set(stay)
    assert layer_map(surgery.surgery_map)["mid_block.attentions.0"] == "mid_block.attentions.0"


@pytest.mark.slow
def test_the_table_is_made_by_the_command(
    students: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five students and one step instead of eighteen and two hundred, drawn in two sampler steps and timed once."""
    monkeypatch.setattr(students, "WIDTHS", {"narrow": [32, 64, 96, 96]})
    monkeypatch.setattr(students, "CHANNEL_RULES", ("taylor",))
    monkeypatch.setattr(students, "BLOCK_RULES", ("sensitive",))
    for name, value in {"PICTURES": 120, "CALIBRATION": 2, "REPEATS": 1}.items():
        monkeypatch.setattr(students, name, value)
    monkeypatch.setitem(students.DISTILL, "warmup", 0)
    whole = students.recipe

    def quick(*asked: Any) -> dict[str, Any]:
        recipe: dict[str, Any] = whole(*asked)
        recipe["stages"][-1]["settings"] |= {"steps": 2, "latency_repeats": 1}
        return recipe

    monkeypatch.setattr(students, "recipe", quick)
    words = ["--out", str(tmp_path / "out"), "--steps", "1", "--images", "2", "--page", str(tmp_path / "page.md")]
    students.main(words)
    page = (tmp_path / "page.md").read_text()
    report = json.loads((tmp_path / "out" / "run" / "report.json").read_text())
    for model in report["models"]:
        assert f"| {model['name']} | {model['parameters']:,} |" in page
    assert "| narrow-taylor | " in page and "| blocks-sensitive | " in page and "| bk-tiny | 4,878,308 | " in page
