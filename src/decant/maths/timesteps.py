"""Timestep distributions: functions of a uniform number, which the draw alone makes."""

import torch
from torch import Tensor


def uniform(u: Tensor, steps: int) -> Tensor:
    """Every timestep 0..steps-1 equally likely, from ``u`` ``(B,)`` in [0, 1): ``(B,)`` int64."""
    return (u.double() * steps).to(torch.int64).clamp(0, steps - 1)


def trailing(steps: int, count: int) -> Tensor:
    """The ``count`` timesteps of a chain shortened from ``steps``, ``(count,)`` int64, from the noisiest on.

    Equally spaced and ending in pure noise: "trailing" in Lin et al. 2023, "Common Diffusion Noise Schedules and Sample
    Steps are Flawed", table 2; what a few-step sampler walks.
    """
    assert 1 <= count <= steps, f"{count} of {steps} timesteps"
    return (torch.arange(count, 0, -1, dtype=torch.float64) * steps / count).round().to(torch.int64) - 1


def on_grid(u: Tensor, grid: Tensor) -> Tensor:
    """Every timestep of ``grid`` ``(N,)`` equally likely, from ``u`` ``(B,)`` in [0, 1): ``(B,)`` int64."""
    return grid.to(u.device)[uniform(u, len(grid))]


def log_normal(u: Tensor, snr: Tensor, mean: float, std: float) -> Tensor:
    """Timesteps whose noise level sigma / alpha is log-normal, from ``u`` ``(B,)`` in [0, 1): ``(B,)`` int64.

    Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", table 1: ln(sigma) is
    normal with this mean and std (theirs are -1.2 and 1.2). ``snr`` ``(T,)`` falls with t; the timestep next in level
    is taken.
    """
    normal = torch.special.ndtri(u.double().clamp(1e-7, 1 - 1e-7))
    wanted = mean + std * normal
    levels = -0.5 * snr.double().clamp(1e-20, 1e20).log()  # rises with t
    middles = (levels[1:] + levels[:-1]) / 2
    return torch.searchsorted(middles.to(u.device), wanted)
