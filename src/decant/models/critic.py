"""A network with a discriminator on its innermost features."""

from typing import Any

from torch import Tensor, nn

from decant.models.taps import Tapped


class Critic(nn.Module):
    """A tapped UNet that also says how real its input looks.

    The opinion ``(B,)`` is of the innermost feature that was tapped ``(B, C, h, w)``: convolutions down to one
    position, as in DMD2 (Yin et al. 2024, section 4.3), which sits in the fake score's own encoder.
    """

    def __init__(self, tapped: Tapped, channels: int) -> None:
        super().__init__()
        self.tapped = tapped
        width = max(32, channels // 2)
        self.head = nn.Sequential(
            nn.GroupNorm(_groups(channels), channels),
            nn.Conv2d(channels, width, 3, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, 1),
        )

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The UNet's output, and ``{"opinion": (B,)}``."""
        output, features = self.tapped(*args, **kwargs)
        (inside,) = features.values()
        opinion = self.head(inside.to(self.head[1].weight.dtype)).squeeze(1)
        return output, {"opinion": opinion}


def _groups(channels: int) -> int:
    return next(groups for groups in (32, 16, 8, 4, 2, 1) if channels % groups == 0)
