"""The sampler call against diffusers' own, and that a picture is a matter of its own seed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, PNDMScheduler, StableDiffusionPipeline

from decant.errors import UserError
from decant.models.generate import Sampler, generate

PROMPTS = ["a red circle", "a blue square", "a star left of a ring", "", "two green triangles"]
SEEDS = [7, 1, 2**40, 0, 3]
SAMPLERS: tuple[Sampler, ...] = ("ddim", "lcm", "euler", "dpm++", "as-is")


def draw(pipeline: StableDiffusionPipeline, **options: Any) -> np.ndarray:
    return np.stack(list(generate(pipeline, PROMPTS, SEEDS, **{"steps": 3, **options})))


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_ddim_is_the_plain_pipeline_call(pipeline: StableDiffusionPipeline, guidance_scale: float) -> None:
    mine = draw(pipeline, guidance_scale=guidance_scale)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    plain = pipeline(PROMPTS, num_inference_steps=3, guidance_scale=guidance_scale, generator=generators).images
    assert np.array_equal(mine, np.stack([np.asarray(picture) for picture in plain]))


def test_lcm_noise_between_steps_is_the_plain_pipelines(pipeline: StableDiffusionPipeline) -> None:
    mine = draw(pipeline, sampler="lcm", guidance_scale=1.0)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    plain = pipeline(PROMPTS, num_inference_steps=3, guidance_scale=1.0, generator=generators).images
    assert np.array_equal(mine, np.stack([np.asarray(picture) for picture in plain]))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_does_not_depend_on_its_batch(pipeline: StableDiffusionPipeline, sampler: Sampler) -> None:
    alone = draw(pipeline, sampler=sampler, batch_size=1).astype(int)
    together = draw(pipeline, sampler=sampler, batch_size=5).astype(int)
    difference = np.abs(alone - together)
    assert (difference <= 1).mean() >= 0.999
    assert difference.max() <= 2
    again = draw(pipeline, sampler=sampler, batch_size=5).astype(int)
    assert np.array_equal(together, again)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_seed_and_prompt_both_matter(pipeline: StableDiffusionPipeline, sampler: Sampler) -> None:
    first, second, other = generate(pipeline, ["a circle", "a circle", "squares"], [1, 2, 1], steps=3, sampler=sampler)
    assert (first != second).any() and (first != other).any()


def test_pictures_are_rgb_bytes_of_the_asked_size(pipeline: StableDiffusionPipeline) -> None:
    own = draw(pipeline, steps=1)
    assert own.shape == (5, 64, 64, 3) and own.dtype == np.uint8
    assert next(generate(pipeline, ["a"], [1], steps=1, size=32)).shape == (32, 32, 3)
    assert next(generate(pipeline, ["a"], [1], steps=1, size=(32, 48))).shape == (32, 48, 3)


def test_no_unconditional_half_without_guidance(pipeline: StableDiffusionPipeline) -> None:
    batches: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    draw(pipeline, steps=2, guidance_scale=1.0)
    draw(pipeline, steps=2, guidance_scale=2.0)
    assert batches == [5, 5, 10, 10]


def test_the_pipeline_is_left_as_it_was(pipeline: StableDiffusionPipeline, capfd: pytest.CaptureFixture[str]) -> None:
    scheduler, config = pipeline.scheduler, dict(pipeline.scheduler.config)
    for sampler in SAMPLERS:
        draw(pipeline, sampler=sampler)
    assert pipeline.scheduler is scheduler
    assert dict(scheduler.config) == config
    assert not hasattr(pipeline, "_progress_bar_config")
    captured = capfd.readouterr()
    assert not captured.out and "it/s" not in captured.err


def test_as_is_takes_the_pipelines_own_scheduler(pipeline: StableDiffusionPipeline) -> None:
    ddim = draw(pipeline, sampler="as-is")
    assert np.array_equal(ddim, draw(pipeline, sampler="as-is"))
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config, skip_prk_steps=True)
    assert (draw(pipeline, sampler="as-is") != ddim).any()


def test_velocity_networks_draw_too(make_pipeline: Callable[..., StableDiffusionPipeline]) -> None:
    epsilon, velocity = make_pipeline("epsilon"), make_pipeline("v_prediction")
    for sampler in SAMPLERS:
        assert (draw(epsilon, sampler=sampler) != draw(velocity, sampler=sampler)).any()


REFUSED: dict[str, tuple[list[str], list[int], dict[str, Any], str]] = {
    "no prompts": ([], [], {}, "at least one"),
    "a seed too few": (["a", "b"], [1], {}, "1 seeds for 2 prompts"),
    "a seed too big": (["a"], [2**64], {}, "64 bits"),
    "no steps": (["a"], [1], {"steps": 0}, "steps: 0"),
    "more steps than timesteps": (["a"], [1], {"steps": 1001}, "1 to 1000"),
    "more steps than LCM has": (["a"], [1], {"steps": 51, "sampler": "lcm"}, "1 to 50"),
    "no batch": (["a"], [1], {"batch_size": 0}, "batch_size"),
    "odd size": (["a"], [1], {"size": 63}, "multiples of 8"),
    "no size": (["a"], [1], {"size": 0}, "multiples of 8"),
}


@pytest.mark.parametrize(("prompts", "seeds", "options", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_drawn_is_refused_at_once(
    pipeline: StableDiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    options: dict[str, Any],
    says: str,
) -> None:
    with pytest.raises(UserError, match=says):
        generate(pipeline, prompts, seeds, **options)
