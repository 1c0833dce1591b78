"""Distances between a network's outputs, one number per sample, computed in float32."""

from torch import Tensor
from torch.nn.functional import mse_loss


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of every sample: ``(B, ...)``, ``(B, ...)`` -> ``(B,)``. Ho et al. 2020, eq. 14."""
    assert prediction.shape == target.shape, f"{tuple(prediction.shape)} against {tuple(target.shape)}"
    return mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)


def huber(prediction: Tensor, target: Tensor, c: float = 1e-3) -> Tensor:
    """Pseudo-Huber distance of every sample: the mean of sqrt(d^2 + c^2) - c, ``(B, ...)`` twice -> ``(B,)``.

    Elementwise, as latent consistency training uses it (Luo et al. 2023); quadratic below c, linear above.
    """
    assert prediction.shape == target.shape, f"{tuple(prediction.shape)} against {tuple(target.shape)}"
    difference = prediction.float() - target.float()
    return ((difference.square() + c**2).sqrt() - c).flatten(1).mean(1)
