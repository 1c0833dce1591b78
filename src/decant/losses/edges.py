"""How far apart the edges of two pictures are, one number per sample, computed in float32."""

from torch import Tensor


def edges(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbours, right and below: ``(B, C, H, W)`` twice -> ``(B,)``.

    Mathieu et al. 2016, arXiv 1511.05440, eq. 6 at exponent 1: an error that blurs an edge costs more than one that
    shifts a colour.
    """
    assert prediction.shape == target.shape, f"{tuple(prediction.shape)} against {tuple(target.shape)}"
    apart = prediction.float() - target.float()
    right, below = apart.diff(dim=-1).abs(), apart.diff(dim=-2).abs()
    return (right.flatten(1).mean(1) + below.flatten(1).mean(1)) / 2
