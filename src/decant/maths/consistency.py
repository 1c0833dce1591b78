"""Consistency functions: where a point of a trajectory leads, and the step of the teacher's solver along it.

Song et al. 2023, "Consistency Models"; Luo et al. 2023, "Latent Consistency Models", arXiv 2310.04378.
"""

import math

import torch
from torch import Tensor

from decant.maths.timesteps import trailing

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


def boundary(t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of timesteps ``t`` ``(B,)``, each ``(B, 1, ..., 1)`` of ``ndim`` axes.

    f(x_t, t) = c_skip x_t + c_out x_0: at t = 0 the point itself, as a consistency function must. Luo et al. 2023,
    appendix C, with its scaling of timesteps by 10, which LCM's sampler in diffusers has too.
    """
    scaled = TIMESTEP_SCALING * t.float().view(-1, *(1,) * (ndim - 1))
    c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    return c_skip, scaled / (scaled**2 + SIGMA_DATA**2).sqrt()


def phase_edges(timesteps: int, phases: int) -> Tensor:
    """Where each of ``phases`` equal parts of ``timesteps`` begins, and -1, the picture: ``(phases + 1,)`` int64.

    They are the timesteps of DDIM with trailing spacing. Wang et al. 2024, "Phased Consistency Models", arXiv
    2405.18407, section 3.1.
    """
    return torch.cat([trailing(timesteps, phases), torch.tensor([-1])])


def bridges(timesteps: int, steps: int, phases: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The steps of a solver of about ``steps``, as many in every phase: from, to, and the end of the phase.

    Each ``(N,)`` int64, from the noisiest on; N is ``steps`` where ``phases`` divides it, else the next such number.
    Luo et al. 2023, "Latent Consistency Models", section 4.3, skips as many timesteps in one step.
    """
    assert phases <= steps <= timesteps, f"{phases} phases in {steps} steps of {timesteps} timesteps"
    edges, each = phase_edges(timesteps, phases).double(), math.ceil(steps / phases)
    part = torch.arange(each, dtype=torch.float64) / each
    lengths = (edges[:-1] - edges[1:]).view(-1, 1)
    begin = (edges[:-1].view(-1, 1) - lengths * part).round().flatten().to(torch.int64)
    end = torch.cat([begin[1:], torch.tensor([0])])
    return begin, end, edges[1:].clamp(min=0).to(torch.int64).repeat_interleave(each)


def ddim_step(x_0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The point of the same trajectory at (alpha, sigma). Song et al. 2021, "DDIM", eq. 12 with no added noise.

    All ``(B, C, h, w)``, alpha and sigma broadcast to it.
    """
    return alpha * x_0 + sigma * noise


def guidance_embedding(guidance_scale: Tensor, width: int) -> Tensor:
    """What a network that knows its guidance is told: scales ``(B,)`` -> ``(B, width)``.

    Sines and cosines of 1000 (scale - 1), as diffusers' pipelines make them of ``guidance_scale``; Luo et al. 2023,
    section 4.2, and Vaswani et al. 2017.
    """
    half = width // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = 1000.0 * (guidance_scale.float() - 1.0).view(-1, 1) * rates.to(guidance_scale.device)
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, width % 2))
