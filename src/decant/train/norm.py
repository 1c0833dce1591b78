"""The norm of all gradients, or all parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all numbers in the tensors, which lie on one device: not finite where one of them is not."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))
