"""Zeroing small weights: fewer numbers that matter, as many that are stored and multiplied."""

from collections.abc import Mapping

import torch
from torch import Tensor


def without_smallest(weights: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """Every matrix and kernel with the part ``ratio`` of its numbers that are smallest in magnitude set to zero.

    Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", per tensor. Vectors (biases,
    norms) stay. Of a tensor of n numbers, floor(ratio n) become zero, and those that equal the largest of them.
    """
    assert 0 <= ratio < 1, f"a ratio is in [0, 1), not {ratio}"
    return {name: _thinned(weight, ratio) if weight.ndim >= 2 else weight.clone() for name, weight in weights.items()}


def zeros(weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """(numbers that are zero, all numbers) of the matrices and kernels."""
    matrices = [weight for weight in weights.values() if weight.ndim >= 2]
    return sum(int((weight == 0).sum()) for weight in matrices), sum(weight.numel() for weight in matrices)


def _thinned(weight: Tensor, ratio: float) -> Tensor:
    count = int(ratio * weight.numel())
    if not count:
        return weight.clone()
    # Not `torch.quantile`, which refuses more than 2**24 numbers in versions still in use: SD 1.5 has such tensors.
    magnitude = weight.abs()
    # Half precision widens without loss; wider numbers stay as they are.
    magnitude = magnitude.float() if magnitude.dtype in (torch.float16, torch.bfloat16) else magnitude
    threshold = magnitude.flatten().kthvalue(count).values
    return torch.where(magnitude <= threshold, 0, weight)
