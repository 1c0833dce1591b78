"""Consistency functions: where a point of a trajectory leads, and the step of the teacher's solver along it.

Song et al. 2023, "Consistency Models"; Luo et al. 2023, "Latent Consistency Models", arXiv 2310.04378.
"""

import torch
from torch import Tensor

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


def solver_grid(timesteps: int, count: int) -> Tensor:
    """The ``count`` timesteps that a solver of ``timesteps`` walks, ``(count,)`` int64, rising to the last of them."""
    assert 1 <= count <= timesteps, f"{count} of {timesteps} timesteps"
    stride = timesteps // count
    return torch.arange(1, count + 1) * stride - 1


def phase_end(t: Tensor, timesteps: int, phases: int) -> Tensor:
    """Where the phase of each of the timesteps ``t`` ``(B,)`` ends, when ``timesteps`` are cut into ``phases`` equal
    ones: the timestep that DDIM with trailing timesteps goes to from the phase's beginning, and 0 for the last phase.

    Wang et al. 2024, "Phased Consistency Models", arXiv 2405.18407, section 3.1.
    """
    assert timesteps % phases == 0, f"{phases} phases of {timesteps} timesteps"
    length = timesteps // phases
    return (t // length * length - 1).clamp(min=0)


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
