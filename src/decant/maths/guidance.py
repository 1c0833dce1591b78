"""Classifier-free guidance."""

from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """Ho and Salimans 2022, "Classifier-Free Diffusion Guidance", eq. 6 as Stable Diffusion counts the scale.

    1 is the conditional output, 0 the unconditional one. All ``(B, C, h, w)``; a scale of each sample ``(B, 1, 1, 1)``.
    """
    return unconditional + guidance_scale * (conditional - unconditional)
