"""How models are named on the command line, and what their own files say of how they are sampled."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler
from safetensors.torch import save_file

from decant.errors import UserError
from decant.models.generate import sampled_by
from decant.models.load import load, save
from decant.stages.contenders import Contender, Sampling, contenders


def lora(folder: Path, name: str = "style.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
    return folder / name


def test_models_and_loras_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    style = lora(tmp_path / "a+b", "c+d.safetensors")
    lora(tmp_path / "run", "pytorch_lora_weights.safetensors")
    (tmp_path / "x=y+z").mkdir()
    given = [f"scenes+{style}", "fast=teacher+run", "x=y+z", "runs/tiny", f"two={style.parent}/m+{style}", "runs/tiny"]
    teacher, *found = contenders("scenes", given)
    assert teacher == Contender("teacher", "scenes")
    assert [(m.name, m.source, m.lora) for m in found] == [
        ("scenes+c+d", "scenes", style),
        ("fast", "scenes", Path("run")),
        ("x-y+z", "x=y+z", None),
        ("tiny", "runs/tiny", None),
        ("two", f"{style.parent}/m", style),
        ("tiny-2", "runs/tiny", None),
    ]


def test_what_is_not_there_or_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file absent\.safetensors[\s\S]*hint:"):
        contenders("scenes", ["scenes+absent.safetensors"])
    with pytest.raises(UserError, match="stands twice"):
        contenders("scenes", ["a=scenes", "a=scenes"])
    with pytest.raises(UserError, match="stands twice"):
        contenders("scenes", ["teacher=scenes"])
    other = lora(tmp_path / "loras", "one.safetensors")
    with pytest.raises(UserError, match=f"name the file: {other}"):
        contenders("scenes", [f"scenes+{tmp_path / 'loras'}"])


def test_a_record_says_how_its_model_is_sampled(tmp_path: Path) -> None:
    """That of the LoRA before that of the model; what is set by hand before both."""
    pipeline = load("scenes")
    assert Contender("a", "scenes").told(pipeline) == Sampling()
    file = lora(tmp_path / "run")
    model = Contender("b", "scenes", file)
    assert model.told(pipeline) == Sampling()
    (tmp_path / "run" / "decant.json").write_text(json.dumps({"sampling": {"guidance_scale": 1, "sampler": "lcm"}}))
    assert model.told(pipeline) == Sampling("lcm", 1.0)
    assert Sampling(guidance_scale=0.0).over(model.told(pipeline)) == Sampling("lcm", 0.0)
    record = {"sampling": {"steps": 4, "guidance_scale": 1.0, "sampler": "as-is"}}
    (tmp_path / "run" / "decant.json").write_text(json.dumps(record))
    assert model.told(pipeline) == Sampling("as-is", 1.0)
    (tmp_path / "run" / "decant.json").write_text(json.dumps({"sampling": {"sampler": "lmc"}}))
    with pytest.raises(UserError, match="did you mean 'lcm'"):
        model.told(pipeline)


def test_a_students_lora_brings_the_scheduler_that_it_was_made_for(tmp_path: Path) -> None:
    """A finished student's folder holds model, LoRA, record and scheduler: its LoRA on the teacher is drawn by that."""
    student = tmp_path / "student"
    pipeline = sampled_by(load("scenes"), "lcm-trailing")
    save(pipeline, student)
    (student / "decant.json").write_text(json.dumps({"sampling": {"guidance_scale": 1.0, "sampler": "as-is"}}))
    layer = {
        "unet.conv_in.lora_A.weight": torch.zeros(1, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.zeros(64, 1, 1, 1),
    }
    save_file(layer, student / "pytorch_lora_weights.safetensors")
    plain, own = Contender("a", "scenes"), Contender("b", "scenes", student)
    assert type(plain.open(torch.float32).scheduler) is not LCMScheduler
    found = own.open(torch.float32)
    assert isinstance(found.scheduler, LCMScheduler) and own.told(found).guidance_scale == 1
    for each in (found, pipeline):
        each.scheduler.set_timesteps(4)
    assert found.scheduler.timesteps.tolist() == pipeline.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert own.fingerprints().keys() == {"model", "lora", "scheduler"}
