"""Trained maps from a student's features to the width of its teacher's."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from decant.models.taps import Tapped


class Projection(nn.Module):
    """A linear map over channels: (B, C, H, W) or (B, L, C) of the student to the teacher's C'. Romero et al. 2015,
    "FitNets", section 2.2, with a 1 x 1 kernel.

    It begins as the embedding of the student's channels into the teacher's: student channel j is the teacher's
    ``kept[j]``, or the first ones where nothing is known.
    """

    def __init__(self, student: int, teacher: int, kept: list[int] | None = None) -> None:
        super().__init__()
        weight = torch.zeros(teacher, student)
        places = kept if kept is not None else list(range(min(student, teacher)))
        weight[places, torch.arange(len(places))] = 1.0
        self.weight = nn.Parameter(weight)

    def forward(self, feature: Tensor) -> Tensor:
        channels = feature.movedim(1, -1) if feature.ndim == 4 else feature
        mapped = nn.functional.linear(channels, self.weight)
        return mapped.movedim(-1, 1) if feature.ndim == 4 else mapped


class Projected(nn.Module):
    """A tapped network whose features pass through projections; parameters as ``tapped.module.<name>``."""

    def __init__(self, tapped: Tapped, projections: Mapping[str, Projection]) -> None:
        super().__init__()
        self.tapped = tapped
        self.names = tuple(projections)
        self.projections = nn.ModuleList(projections.values())  # module names have dots, which a ModuleDict forbids

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """One forward of the network: its output, and its features, projected where widths differ."""
        output, features = self.tapped(*args, **kwargs)
        for name, projection in zip(self.names, self.projections, strict=True):
            features[name] = projection(features[name])
        return output, features

    def close(self) -> nn.Module:
        """The network itself again, without hooks; the projections were training's alone."""
        return self.tapped.close()
