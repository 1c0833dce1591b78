"""Prompts alone: latents are what the teacher draws, once; or random ones, every time."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from decant.data.latents import Latents
from decant.data.source import read
from decant.errors import UserError
from decant.maths.seeds import seed_of
from decant.models.families.of import family_of
from decant.models.generate import generate
from decant.models.layout import Pipeline
from decant.models.load import load
from decant.recipe.runner import run_recipe
from decant.recipe.schema import Recipe
from decant.scenes.folder import captions_of
from decant.stages import distill, evaluate, prune
from decant.stages.encode import encode_data
from decant.stages.samples import Sampling, drawer
from decant.stages.stage import Inputs

STAGES = {"prune": prune.STAGE, "distill": distill.STAGE, "evaluate": evaluate.STAGE}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "captions.json"
    file.write_text(json.dumps([{"text": caption} for _, caption in captions_of(20, "train")]))
    return file


@contextmanager
def _calls() -> Iterator[list[int]]:
    """Counts forwards of every UNet."""
    seen: list[int] = []

    def note(module: torch.nn.Module, inputs: object) -> None:
        if isinstance(module, UNet2DConditionModel):
            seen.append(1)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def _latents(teacher: Pipeline, prompts: Path, work: Path, most: int = 20, **sampling: object) -> Latents:
    inputs = Inputs("scenes", {}, prompts, 5, work)
    draws = drawer(teacher, 64, Sampling(seed=5, **{"steps": 2, **sampling}), CPU)  # type: ignore[arg-type]
    return encode_data(family_of(teacher), read(prompts).first(most), 64, inputs, CPU, drawer=draws)


def test_latents_are_those_of_the_teachers_own_pictures(prompts: Path, tmp_path: Path) -> None:
    """Decoded they are what the sampler draws for the prompt's own seed; and they have no spread."""
    teacher = load("scenes")
    latents = _latents(teacher, prompts, tmp_path, 5)
    batch = latents.batch(tuple(range(5)))
    captions = read(prompts).captions[:5]
    seeds = [seed_of(5, "prompt", caption) % 2**63 for caption in captions]
    pictures = np.stack(list(generate(teacher, captions, seeds, steps=2)))
    with torch.no_grad():
        decoded = teacher.vae.decode(batch.latents(torch.randn_like(batch.mean)) / teacher.vae.config.scaling_factor)
    shown = ((decoded.sample.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1) * 255).round().numpy()
    assert np.abs(shown - pictures).max() <= 1


def test_they_are_drawn_once_and_depend_on_nothing_but_their_own_prompt(prompts: Path, tmp_path: Path) -> None:
    teacher = load("scenes")
    with _calls() as calls:
        first = _latents(teacher, prompts, tmp_path / "a", 5).batch(tuple(range(5)))
        drawn = len(calls)
        again = _latents(teacher, prompts, tmp_path / "a", 20).batch(tuple(range(20)))
        assert 0 < drawn < len(calls)
        calls.clear()
        _latents(load("scenes"), prompts, tmp_path / "a", 20)
        assert not calls
    whole = _latents(teacher, prompts, tmp_path / "b", 20).batch(tuple(range(20)))
    assert again.mean.equal(whole.mean) and first.mean.equal(whole.mean[:5])
    for other in ({"steps": 3}, {"guidance_scale": 2.0}):
        assert not _latents(teacher, prompts, tmp_path / "a", 5, **other).batch((0,)).mean.equal(whole.mean[:1])


def test_random_latents_are_normal_and_need_no_network(prompts: Path, tmp_path: Path) -> None:
    with _calls() as calls:
        batch = _latents(load("scenes"), prompts, tmp_path, how="random").batch(tuple(range(20)))
    assert not calls
    noise = torch.randn_like(batch.mean)
    assert batch.latents(noise).equal(noise)


@pytest.mark.parametrize("how", ["samples", "random"])
def test_a_student_is_distilled_and_evaluated_from_prompts_alone(prompts: Path, tmp_path: Path, how: str) -> None:
    settings = {"steps": 4, "batch_size": 2, "held_out": 0.3, "checkpoint_every": 2, "prompts": how, "prompt_steps": 2}
    measured = {"images": 2, "steps": 2, "latency_repeats": 0, "held_out": 0.3}
    stages = [
        {"stage": "prune", "name": "cut", "from": "teacher", "settings": {"student": "bk-tiny"}},
        {"stage": "distill", "name": "tiny", "from": "cut", "settings": settings},
        {"stage": "evaluate", "name": "proof", "of": ["teacher", "tiny"], "settings": measured},
    ]
    recipe = Recipe.model_validate({"name": "test", "stages": stages})
    said: list[str] = []
    run_recipe(recipe, teacher="scenes", data=str(prompts), out=tmp_path / "run", stages=STAGES, talk=said.append)
    assert any("prompts alone" in line for line in said)
    record = json.loads((tmp_path / "run/02-tiny/decant.json").read_text())
    assert record["data"]["used"] + record["data"]["held_out"] == 20
    scores = json.loads((tmp_path / "run/03-proof/decant.json").read_text())["models"][1]["scores"]
    assert scores["output_error"]["value"] > 0
    assert load_file(tmp_path / "run/02-tiny/unet/diffusion_pytorch_model.safetensors")


def test_what_must_be_measured_on_pictures_says_so(prompts: Path, tmp_path: Path) -> None:
    teacher = load("scenes")
    with pytest.raises(UserError, match=r"prompts alone[\s\S]*hint:"):
        encode_data(family_of(teacher), read(prompts), 64, Inputs("scenes", {}, prompts, 0, tmp_path), CPU)
