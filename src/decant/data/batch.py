"""What one forward of training sees."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Latent moments and conditions of B samples.

    samples: the position of every sample in the endless stream (epoch * n + index): what a draw is keyed by.
    mean, std: ``(B, C, h, w)`` moments of the latent, already scaled. condition: what the network is told
    besides x_t, e.g. ``{"encoder_hidden_states": (B, L, D)}``. null: its unconditional twin, same keys and
    shapes. beside: what a method reads that a denoiser is not told, such as pictures ``(B, 3, H, W)``.
    """

    samples: tuple[int, ...]
    mean: Tensor
    std: Tensor
    condition: dict[str, Tensor]
    null: dict[str, Tensor]
    beside: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert len(self.samples) == len(self.mean) > 0 and self.mean.shape == self.std.shape, "one latent per sample"
        assert {k: v.shape for k, v in self.condition.items()} == {k: v.shape for k, v in self.null.items()}, (
            "null is the twin of condition"
        )

    def __len__(self) -> int:
        """B, the number of samples."""
        return len(self.samples)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on ``device``."""

        def move(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device) for name, tensor in tensors.items()}

        mean, std = self.mean.to(device), self.std.to(device)
        return Batch(self.samples, mean, std, move(self.condition), move(self.null), move(self.beside))

    def latents(self, noise: Tensor) -> Tensor:
        """Latents sampled from the autoencoder's posterior: mean + std * noise, all ``(B, C, h, w)``."""
        return self.mean + self.std * noise
