"""Timestep distributions: functions of a uniform number, which the draw alone makes."""

import torch
from torch import Tensor


def uniform(u: Tensor, steps: int) -> Tensor:
    """Every timestep 0..steps-1 equally likely, from ``u`` ``(B,)`` in [0, 1): ``(B,)`` int64."""
    return (u.double() * steps).to(torch.int64).clamp(0, steps - 1)
