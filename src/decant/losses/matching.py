"""Distribution matching's gradient as a loss."""

from torch import Tensor

_LEAST = 1e-6


def matching(x_0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """A loss of every sample, ``(B, C, h, w)`` three times -> ``(B,)``, whose gradient to ``x_0`` moves it from where
    the fake score leads towards where the real one does.

    Yin et al. 2024, "One-step Diffusion with Distribution Matching Distillation", eqs. 7-8: half the squared distance
    to x_0 - (fake - real) / mean |x_0 - real|, taken for constant; the divisor is each sample's own.
    """
    assert x_0.shape == real.shape == fake.shape, f"{tuple(x_0.shape)}, {tuple(real.shape)} and {tuple(fake.shape)}"
    x_0, real, fake = x_0.float(), real.detach().float(), fake.detach().float()
    size = (x_0.detach() - real).abs().flatten(1).mean(1).clamp(min=_LEAST).view(-1, *(1,) * (x_0.ndim - 1))
    goal = x_0.detach() - (fake - real) / size
    squared: Tensor = 0.5 * (x_0 - goal).square().flatten(1).mean(1)
    return squared
