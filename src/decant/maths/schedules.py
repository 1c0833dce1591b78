"""Noise schedules as the pair (alpha_t, sigma_t) of ``x_t = alpha_t x_0 + sigma_t noise``.

Variance preserving: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", eq. 4, with alpha_t the
square root of its alpha-bar (``alphas_cumprod``). Flow: Lipman et al. 2023, "Flow Matching for Generative
Modeling", the straight path.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Schedule:
    """Tables of signal and noise for the timesteps 0..T-1; the noise grows with t.

    alpha: ``(T,)`` signal level. sigma: ``(T,)`` noise level. Both float32 on the CPU.
    """

    alpha: Tensor
    sigma: Tensor

    def __post_init__(self) -> None:
        assert self.alpha.ndim == 1 and self.alpha.shape == self.sigma.shape, "alpha and sigma are both (T,)"

    def __len__(self) -> int:
        """T, the number of timesteps."""
        return len(self.alpha)

    def at(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t of ``t`` ``(B,)``, each ``(B, 1, ..., 1)`` of ``ndim`` axes, on its device."""
        shape = (-1, *(1,) * (ndim - 1))
        return self.alpha.to(t.device)[t].view(shape), self.sigma.to(t.device)[t].view(shape)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha_t^2 / sigma_t^2 of timesteps ``t`` ``(B,)``: ``(B,)``."""
        alpha, sigma = self.at(t, 1)
        return (alpha / sigma) ** 2


def variance_preserving(alphas_cumprod: Tensor) -> Schedule:
    """alpha_t = sqrt(a), sigma_t = sqrt(1 - a), with a the scheduler's ``alphas_cumprod`` ``(T,)``."""
    alphas_cumprod = alphas_cumprod.detach().float().cpu()
    return Schedule(alphas_cumprod**0.5, (1.0 - alphas_cumprod) ** 0.5)


def scaled_linear(beta_start: float, beta_end: float, steps: int) -> Schedule:
    """Stable Diffusion's schedule: betas linear in their square root (Rombach et al. 2022)."""
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float32) ** 2
    return variance_preserving(torch.cumprod(1.0 - betas, dim=0))


def flow(steps: int) -> Schedule:
    """The straight path of flow matching: sigma_t = (t + 1) / T, alpha_t = 1 - sigma_t.

    Index t is what networks of this kind are told as the timestep ``t + 1`` (= T sigma_t); the last index is
    pure noise.
    """
    sigma = torch.arange(1, steps + 1, dtype=torch.float32) / steps
    return Schedule(1.0 - sigma, sigma)
