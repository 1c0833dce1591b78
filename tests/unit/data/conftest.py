"""An encoder whose rows can be read back."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from decant.data.picture import Frame

_LONGEST = 40


class Spelled:
    """A linear "VAE", and conditions that are the caption's own letters; counts what it is asked for."""

    def __init__(self) -> None:
        self.pictures, self.captions = 0, 0

    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        self.pictures += len(torch.unique(pictures, dim=0))
        mean = torch.nn.functional.avg_pool2d(pictures, 8)
        return mean, mean.abs() / 2

    def condition(self, captions: Sequence[str]) -> dict[str, Tensor]:
        self.captions += len(set(captions))
        return {"words": torch.tensor([[float(ord(c)) for c in caption.ljust(_LONGEST)] for caption in captions])}

    def null(self, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: torch.zeros_like(value) for key, value in condition.items()}

    def framing(self, frames: Sequence[Frame]) -> dict[str, Tensor]:
        return {}

    def made_by(self) -> dict[str, str]:
        return {"pictures": "linear", "captions": "spelled"}

    @staticmethod
    def read(row: Tensor) -> str:
        """The caption of a row."""
        return "".join(chr(int(value)) for value in row).rstrip()


@pytest.fixture
def spelled() -> Spelled:
    """A fresh one."""
    return Spelled()
