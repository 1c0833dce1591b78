"""The only source of randomness inside training."""

from dataclasses import dataclass

import torch
from torch import Tensor

from decant.maths.seeds import generator


@dataclass(frozen=True)
class Draw:
    """Random numbers of one micro-batch, made on the CPU.

    Each sample's values depend on (seed, step, sample, purpose) alone: not on the batch it sits in, on the
    rank, or on what was drawn before. samples: positions in the endless stream (``Batch.samples``).
    """

    seed: int
    step: int
    samples: tuple[int, ...]

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers, ``(B, *shape)`` float32."""
        return torch.stack([torch.randn(shape, generator=each) for each in self._generators(purpose)])

    def uniform(self, purpose: str) -> Tensor:
        """Uniform numbers in [0, 1), ``(B,)`` float32."""
        return torch.stack([torch.rand((), generator=each) for each in self._generators(purpose)])

    def integers(self, purpose: str, high: int) -> Tensor:
        """Integers in [0, high), ``(B,)`` int64."""
        return torch.stack([torch.randint(high, (), generator=each) for each in self._generators(purpose)])

    def _generators(self, purpose: str) -> list[torch.Generator]:
        return [generator(self.seed, self.step, sample, purpose) for sample in self.samples]
