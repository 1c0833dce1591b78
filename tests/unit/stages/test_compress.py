"""Zeroed and halved models: what plain diffusers opens, and what their records say of size and speed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from decant.errors import UserError
from decant.models.load import load
from decant.recipe.runner import run_stage
from decant.stages import adopt, quantize, sparsify
from decant.stages.record import surgery_map_of
from decant.stages.stage import Stage


def made(stage: Stage, kind: str, settings: dict[str, Any], out: Path, source: str | Path = "scenes") -> dict[str, Any]:
    return run_stage(
        kind, stage, settings, teacher="scenes", models={"model": source}, data=None, seed=0, out=out, talk=print
    )


def test_a_third_of_the_weights_is_zero_and_the_folder_as_large(tmp_path: Path) -> None:
    record = made(sparsify.STAGE, "sparsify", {"ratio": 0.3}, tmp_path / "pruned")
    opened = StableDiffusionPipeline.from_pretrained(tmp_path / "pruned")
    teacher = load("scenes").unet.state_dict()
    for name, weight in opened.unet.state_dict().items():
        if weight.ndim >= 2:
            share = float((weight == 0).float().mean())
            assert share == pytest.approx(0.3, abs=0.02 + 1 / weight.numel()), name
        else:
            assert torch.equal(weight.float(), teacher[name])
        kept = weight != 0
        assert torch.equal(weight.float()[kept], teacher[name][kept])
    effect = record["effect"]
    assert record["sparsity"]["ratio"] == pytest.approx(0.3, abs=0.01)
    assert effect["after"]["size_mb"] == pytest.approx(effect["before"]["size_mb"], rel=0.01)
    assert 0.3 < effect["speedup"] < 3


def test_half_precision_is_half_the_megabytes_and_its_rounding_is_told(tmp_path: Path) -> None:
    whole = tmp_path / "float32"
    load("scenes").save_pretrained(whole)
    record = made(quantize.STAGE, "quantize", {"dtype": "float16"}, tmp_path / "quant", whole)
    effect = record["effect"]
    assert effect["after"]["size_mb"] == pytest.approx(effect["before"]["size_mb"] / 2, rel=0.02)
    assert (effect["before"]["dtype"], effect["after"]["dtype"]) == ("torch.float32", "torch.float16")
    assert record["rounding"]["relative_rms"] < 1e-3  # the shipped teacher is stored in float16: nothing is rounded
    opened = StableDiffusionPipeline.from_pretrained(tmp_path / "quant", torch_dtype=torch.float16)
    assert opened.unet.dtype == torch.float16


def test_bfloat16_rounds_by_its_eight_bits(tmp_path: Path) -> None:
    record = made(quantize.STAGE, "quantize", {"dtype": "bfloat16"}, tmp_path / "quant")
    assert 2**-11 < record["rounding"]["relative_rms"] < 2**-8


def test_a_finished_student_is_adopted_with_its_map(tmp_path: Path) -> None:
    """A folder that plain diffusers wrote, of BK-SDM Tiny's layout: no record, and still its features can be paired."""
    from decant.models.surgery.presets import published
    from decant.models.surgery.surgery import build

    pipeline = load("scenes")
    surgery = published(dict(pipeline.unet.config), pipeline.unet.state_dict(), "bk-tiny")
    pipeline.unet = build(surgery)
    pipeline.save_pretrained(tmp_path / "foreign")
    record = made(adopt.STAGE, "adopt", {"model": str(tmp_path / "foreign")}, tmp_path / "student")
    assert record["changes"] == ["nothing changed"] and record["student"] == "bk-tiny"
    assert surgery_map_of(tmp_path / "student") == surgery.surgery_map
    weights = load(tmp_path / "student").unet.state_dict()
    assert all(torch.equal(weights[name], value.half().float()) for name, value in surgery.weights.items())
    assert json.loads((tmp_path / "student" / "decant.json").read_text())["settings"]["model"].endswith("foreign")


def test_a_student_of_another_kind_is_not_adopted(tmp_path: Path, sdxl_saved: Path) -> None:
    with pytest.raises(UserError, match=r"addition_embed_type(.|\n)*hint"):
        made(adopt.STAGE, "adopt", {"model": str(sdxl_saved)}, tmp_path / "student")
