"""Distances between features inside two networks, one number per sample, computed in float32."""

from torch import Tensor
from torch.nn.functional import mse_loss


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of two features ``(B, C, H, W)`` or ``(B, L, C)``: ``(B,)``.

    Kim et al. 2023, "BK-SDM", eq. 3, for one block. Both must have one shape: pairs come from the surgery
    map.
    """
    assert student.shape == teacher.shape, f"features of {tuple(student.shape)} against {tuple(teacher.shape)}"
    return mse_loss(student.float(), teacher.float(), reduction="none").flatten(1).mean(1)
