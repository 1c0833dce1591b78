"""Evaluation while a student is trained: it changes nothing of the training, and the best student is shipped."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file

from decant.errors import UserError
from decant.models.load import architecture, load
from decant.recipe.runner import run_stage
from decant.scenes.folder import draw_folder
from decant.stages import distill, prune
from decant.stages.lora import LoraSettings, is_lora
from decant.stages.midway import _better

FEW: dict[str, Any] = {
    "steps": 3, "batch_size": 4, "feature": 0, "learning_rate": 1e-3, "held_out": 0.1, "held_out_most": 2,
    "sample_steps": 3, "evaluate_images": 4, "evaluate_guidance_scale": 4.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Pictures, and a cut student."""
    folder = tmp_path_factory.mktemp("midway")
    draw_folder(folder / "pictures", 60, "train", 0)
    asked: dict[str, Any] = {"teacher": "scenes", "models": {"teacher": "scenes"}, "data": None, "seed": 0}
    run_stage("prune", prune.STAGE, {"student": "bk-tiny"}, **asked, out=folder / "cut", talk=print)
    return folder / "pictures", folder / "cut"


def trained(places: tuple[Path, Path], out: Path, **settings: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {"teacher": "scenes", "models": {"cut": places[1]}, "data": places[0], "seed": 0}
    return run_stage("distill", distill.STAGE, {**FEW, **settings}, **asked, out=out, talk=print)


@pytest.mark.slow
def test_watching_changes_no_weight_and_the_best_is_shipped(places: tuple[Path, Path], tmp_path: Path) -> None:
    record = trained(places, tmp_path / "watched", evaluate_every=2)
    steps = [entry["step"] for entry in record["evaluations"]]
    assert steps == [2, 3] and record["step"] in steps, "and at the end"
    best = record["evaluations"][steps.index(record["step"])]
    assert not any(_better(entry, best) for entry in record["evaluations"])
    assert {"scene_accuracy", "agreement_with_teacher", "distance_to_teacher"} <= best["scores"].keys()
    unwatched = trained(places, tmp_path / "unwatched", steps=record["step"])
    assert "evaluations" not in unwatched
    own, other = (load(tmp_path / name).unet.state_dict() for name in ("watched", "unwatched"))
    assert all(torch.equal(own[name], other[name]) for name in own)


@pytest.mark.parametrize(
    ("own", "other", "better"),
    [
        (
            {"scene_accuracy": 0.5, "distance_to_teacher": 9.0},
            {"scene_accuracy": 0.4, "distance_to_teacher": 1.0},
            True,
        ),
        ({"scene_accuracy": 0.4}, {"scene_accuracy": 0.4}, False),
        ({"distance_to_teacher": 0.1}, {"distance_to_teacher": 0.2}, True),
        (
            {"fid_inception": 30.0, "distance_to_teacher": 0.1},
            {"fid_inception": 20.0, "distance_to_teacher": 0.2},
            False,
        ),
    ],
)
def test_which_of_two_is_better(own: dict[str, float], other: dict[str, float], better: bool) -> None:
    entries = [{"scores": {name: {"value": value} for name, value in each.items()}} for each in (own, other)]
    assert _better(*entries) is better
    json.dumps(entries)


def test_a_lora_alone_is_trained_and_shipped_alone_and_merged(places: tuple[Path, Path], tmp_path: Path) -> None:
    """Of SD 1.5's shape rank 4 on these four has 797,184 parameters; here the file and the merged folder draw alike."""
    lora = {"rank": 4, "alpha": 8.0}
    record = trained(places, tmp_path / "student", lora=lora, ema=0.9)
    out = tmp_path / "student"
    cut, student = load(places[1]).unet.state_dict(), load(out).unet.state_dict()
    changed = {name for name in cut if not torch.equal(cut[name], student[name])}
    assert changed and all(".attn" in name and name.endswith(".weight") for name in changed)
    for file in ("pytorch_lora_weights.safetensors", "kohya_lora.safetensors"):
        pipeline = StableDiffusionPipeline.from_pretrained(places[1], torch_dtype=torch.float32)
        pipeline.load_lora_weights(str(out), weight_name=file)
        pipeline.fuse_lora(components=["unet"])
        pipeline.unload_lora_weights()
        for name, value in pipeline.unet.state_dict().items():
            torch.testing.assert_close(value, student[name], rtol=2e-3, atol=2e-4)
    matrices = [value for name, value in load_file(out / "pytorch_lora_weights.safetensors").items()]
    assert record["lora"]["parameters"] == sum(value.numel() for value in matrices)


def test_a_lora_of_rank_four_has_the_published_count() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(architecture("sd15"))
        unet.add_adapter(LoraConfig(r=4, target_modules=list(LoraSettings().targets)))
    assert sum(p.numel() for name, p in unet.named_parameters() if is_lora(name)) == 797_184


def test_a_target_that_is_nowhere_is_refused(places: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lora.targets: to_qq(.|\n)*hint"):
        trained(places, tmp_path / "student", lora={"targets": ["to_qq"]})
