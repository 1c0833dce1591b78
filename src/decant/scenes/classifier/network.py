"""The attribute classifier: a small network that reads scenes; its features stand in for Inception's in FID and KID."""

from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from decant.scenes.classes import CLASSES

FEATURES = 32
NAME = "scenes attribute classifier, not Inception"
_FILE = "classifier.safetensors"


class AttributeClassifier(nn.Module):
    """uint8 pictures (B, 3, 64, 64) -> features (B, 32); ``answers`` makes of those the logits of every question.

    Heusel et al. 2017 take Inception's last features, of photographs; these are of scenes, and mean nothing elsewhere.
    """

    num_features = FEATURES

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, FEATURES))
        self.head = nn.Linear(FEATURES, sum(CLASSES))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.body(pictures.float() / 127.5 - 1)

    def answers(self, features: Tensor) -> tuple[Tensor, ...]:
        """Logits (B, classes) of every question, in the order of ``QUESTIONS``."""
        kept: Any = self.head(features)
        return kept.split(CLASSES, dim=-1)


def shipped() -> AttributeClassifier:
    """The trained network, as ``decant scenes train --classifier`` made it, in evaluation mode on the CPU."""
    network = AttributeClassifier()
    network.load_state_dict(load_file(Path(str(files("decant.scenes.classifier") / _FILE))))
    return network.eval().requires_grad_(False)


@torch.no_grad()
def features(network: AttributeClassifier, pictures: Tensor, chunk: int = 64) -> Tensor:
    """Features (n, 32) of uint8 pictures (n, 3, 64, 64). Chunks only save memory: no picture sees another."""
    return torch.cat([network(part) for part in pictures.split(chunk)])
