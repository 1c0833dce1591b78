"""The sd1 adapter against diffusers: the same conditions, latents and noisy latents, and one forward."""

from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline

from decant.errors import UserError
from decant.models.families.family import Family
from decant.models.families.sd1 import SD1
from decant.models.taps import tap


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
def test_corrupt_is_diffusers_add_noise(beta_schedule: str, pipeline: StableDiffusionPipeline) -> None:
    pipeline.scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=beta_schedule)
    family = SD1.of(pipeline)
    x_0, noise, t = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8), torch.tensor([0, 1, 500, 998, 999])
    expected = DDPMScheduler.from_config(pipeline.scheduler.config).add_noise(x_0, noise, t)
    torch.testing.assert_close(family.corrupt(x_0, noise, t), expected)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_prediction_is_the_schedulers(prediction: str, make_pipeline: Callable[..., StableDiffusionPipeline]) -> None:
    family: Family = SD1.of(make_pipeline(prediction))
    assert family.prediction == prediction


def test_flow_matching_is_another_family(pipeline: StableDiffusionPipeline) -> None:
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UserError, match="flow matching"):
        SD1.of(pipeline)


def test_condition_and_null_are_the_pipelines_own(pipeline: StableDiffusionPipeline) -> None:
    family = SD1.of(pipeline)
    captions = ["a red circle", "two blue squares, one left of the other " * 9]
    with torch.no_grad():
        text, empty = pipeline.encode_prompt(captions, "cpu", 1, True)
    condition = family.condition(captions)
    null = family.null(condition)
    torch.testing.assert_close(condition["encoder_hidden_states"], text)
    torch.testing.assert_close(null["encoder_hidden_states"], empty)
    assert condition.keys() == null.keys()
    assert not condition["encoder_hidden_states"].requires_grad
    wide = {"encoder_hidden_states": condition["encoder_hidden_states"].double()}
    assert family.null(wide)["encoder_hidden_states"].dtype == torch.float64


def test_encode_gives_the_scaled_posterior(pipeline: StableDiffusionPipeline) -> None:
    pictures = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, std = SD1.of(pipeline).encode(pictures)
    with torch.no_grad():
        posterior = pipeline.vae.encode(pictures).latent_dist
        sampled = posterior.sample(torch.Generator().manual_seed(1)) * pipeline.vae.config.scaling_factor
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(mean + std * noise, sampled)
    assert mean.shape == std.shape == (2, 4, 8, 8)
    assert not mean.requires_grad
    torch.testing.assert_close(mean, posterior.mode() * 0.5)


def test_denoise_is_one_forward_of_any_wrapping(pipeline: StableDiffusionPipeline) -> None:
    family = SD1.of(pipeline)
    condition = family.condition(["a", "b"])
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([4, 700])
    plain = family.denoise(pipeline.unet, x_t, t, condition)
    expected = pipeline.unet(x_t, t, condition["encoder_hidden_states"]).sample
    assert torch.equal(plain, expected)
    output, features = family.denoise(tap(pipeline.unet, ["mid_block"]), x_t, t, condition)
    assert torch.equal(output, expected)
    assert list(features) == ["mid_block"]
    assert plain.requires_grad
