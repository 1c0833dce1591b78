"""The consistency function's pieces against diffusers' own sampler, solver and pipeline."""

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline

from decant.maths.consistency import boundary, bridges, ddim_step, guidance_embedding, phase_edges
from decant.maths.prediction import Prediction, to_epsilon, to_x_0
from decant.maths.schedules import variance_preserving

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_boundary_is_the_samplers_own() -> None:
    sampler = LCMScheduler(**BETAS)
    for t in (0, 1, 19, 499, 999):
        c_skip, c_out = boundary(torch.tensor([t]), 4)
        theirs = sampler.get_scalings_for_boundary_condition_discrete(t)
        assert (c_skip.item(), c_out.item()) == pytest.approx((float(theirs[0]), float(theirs[1])), abs=1e-7)
        assert c_skip.shape == (1, 1, 1, 1)
    c_skip, c_out = boundary(torch.tensor([0]), 2)
    assert (c_skip.item(), c_out.item()) == (1.0, 0.0), "at the end of the way the point is its own end"


@pytest.mark.parametrize("count", [1, 4, 50, 1000])
def test_the_grid_is_where_lcms_sampler_comes_from(count: int) -> None:
    sampler = LCMScheduler(**BETAS, original_inference_steps=count)
    sampler.set_timesteps(count)
    begin, end, until = bridges(1000, count)
    assert begin.tolist() == sampler.timesteps.tolist()
    assert end.tolist() == [*begin[1:].tolist(), 0] and not until.any()


@pytest.mark.parametrize(("steps", "phases"), [(40, 2), (50, 4), (50, 3), (7, 7), (200, 8)])
def test_phases_begin_and_end_where_ddim_stops(steps: int, phases: int) -> None:
    sampler = DDIMScheduler(**BETAS, timestep_spacing="trailing")
    sampler.set_timesteps(phases)
    edges = phase_edges(1000, phases)
    assert edges.tolist() == [*sampler.timesteps.tolist(), -1]
    begin, end, until = bridges(1000, steps, phases)
    assert len(begin) % phases == 0 and steps <= len(begin) < steps + phases
    assert (begin > end).all() and (end >= until).all(), "a step goes down, and never out of its phase"
    assert set(edges[:-1].tolist()) <= set(begin.tolist()) and set(until.tolist()) <= {*end.tolist()}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_step_is_ddims(prediction: Prediction) -> None:
    sampler = DDIMScheduler(**BETAS, prediction_type=prediction, clip_sample=False, set_alpha_to_one=False)
    sampler.set_timesteps(50)
    schedule = variance_preserving(sampler.alphas_cumprod)
    x_t, output = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for t in (980, 500, 20):
        theirs = sampler.step(output, t, x_t).prev_sample
        here, there = (schedule.at(torch.tensor([each] * 3), 4) for each in (t, t - 20))
        x_0, noise = (way(prediction, output, x_t, *here) for way in (to_x_0, to_epsilon))
        torch.testing.assert_close(ddim_step(x_0, noise, *there), theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("width", [256, 7])
def test_guidance_is_told_as_pipelines_tell_it(width: int) -> None:
    scales = torch.tensor([1.0, 4.0, 7.5])
    theirs = StableDiffusionPipeline.get_guidance_scale_embedding(None, scales - 1, embedding_dim=width)  # type: ignore[arg-type]
    torch.testing.assert_close(guidance_embedding(scales, width), theirs, atol=2e-4, rtol=0)
