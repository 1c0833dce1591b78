"""Schedules, corruption and targets against diffusers' own schedulers."""

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from decant.maths.prediction import target, to_epsilon, to_x_0
from decant.maths.schedules import Schedule, flow, scaled_linear, variance_preserving

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def samples() -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 5, 4, 8, 8, generator=made)
    return x_0, noise, torch.tensor([0, 1, 499, 998, 999])


def corrupt(schedule: Schedule, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    alpha, sigma = schedule.at(t, x_0.ndim)
    return alpha * x_0 + sigma * noise


def test_scaled_linear_is_stable_diffusions() -> None:
    theirs, ours = DDPMScheduler(**SD), scaled_linear(0.00085, 0.012, 1000)
    assert torch.equal(ours.alpha, theirs.alphas_cumprod**0.5)
    assert torch.equal(ours.sigma, (1 - theirs.alphas_cumprod) ** 0.5)
    assert len(ours) == 1000


def test_corruption_and_velocity_are_diffusers() -> None:
    theirs = DDPMScheduler(**SD)
    ours = variance_preserving(theirs.alphas_cumprod)
    x_0, noise, t = samples()
    alpha, sigma = ours.at(t, 4)
    torch.testing.assert_close(corrupt(ours, x_0, noise, t), theirs.add_noise(x_0, noise, t))
    velocity = target("v_prediction", x_0, noise, alpha, sigma)
    torch.testing.assert_close(velocity, theirs.get_velocity(x_0, noise, t))


def test_x_0_is_what_the_scheduler_reads_from_an_output() -> None:
    output, x_t, _ = samples()
    for kind in ("epsilon", "v_prediction", "sample"):
        theirs = DDPMScheduler(**SD, prediction_type=kind, clip_sample=False)
        ours = variance_preserving(theirs.alphas_cumprod)
        for t in (1, 500, 999):
            alpha, sigma = ours.at(torch.tensor([t]), 4)
            read = theirs.step(output, t, x_t).pred_original_sample
            torch.testing.assert_close(to_x_0(kind, output, x_t, alpha, sigma), read, rtol=1e-4, atol=1e-4)


def test_flow_is_flow_matching_eulers() -> None:
    theirs, ours = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000), flow(1000)
    x_0, noise, t = samples()
    times = t.float() + 1  # the timestep that a network is told at index t
    torch.testing.assert_close(corrupt(ours, x_0, noise, t), theirs.scale_noise(x_0, times, noise))
    torch.testing.assert_close(ours.sigma.flip(0), theirs.sigmas[:1000])


def test_a_perfect_flow_takes_euler_to_x_0_in_one_step() -> None:
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    theirs.set_timesteps(1)
    x_0, noise, _ = samples()
    velocity = target("flow", x_0, noise, torch.tensor(0.0), torch.tensor(1.0))
    done = theirs.step(velocity, theirs.timesteps[0], noise).prev_sample
    torch.testing.assert_close(done, x_0, rtol=1e-4, atol=1e-4)
    alpha, sigma = flow(1000).at(torch.tensor([999]), 4)
    torch.testing.assert_close(to_epsilon("flow", velocity, noise, alpha, sigma), noise)


def test_snr_is_the_published_ratio() -> None:
    theirs, t = DDPMScheduler(**SD), torch.tensor([0, 10, 500, 999])
    ratio = theirs.alphas_cumprod[t] / (1 - theirs.alphas_cumprod[t])
    torch.testing.assert_close(variance_preserving(theirs.alphas_cumprod).snr(t), ratio)
