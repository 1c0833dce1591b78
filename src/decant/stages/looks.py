"""Scores that networks of others give picture by picture, where their weights are on this machine: LPIPS, CLIPScore."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from decant.errors import UserError
from decant.metrics.clip_score import NAME as CLIP
from decant.metrics.clip_score import Clip, clip, clip_scores
from decant.metrics.interval import bootstrap_mean
from decant.metrics.lpips import NAME as LPIPS
from decant.metrics.lpips import lpips, lpips_distances
from decant.stages.scoring import Drawn, Figure, number


@dataclass(frozen=True)
class Looks:
    """The networks that are here, and what they make of the teacher's pictures; ``left_out``: (score, refusal)."""

    captions: Sequence[str]
    teacher: Drawn
    network: nn.Module | None
    clip: Clip | None
    teacher_scores: Sequence[float]
    left_out: tuple[tuple[str, UserError], ...]

    def figures(self, drawn: Drawn, *, teacher: bool) -> dict[str, Figure]:
        """``lpips_to_teacher`` and ``clip_score`` with their intervals, the second with its difference."""
        found: dict[str, Figure] = {}
        if self.network is not None and not teacher:
            ours, theirs = (torch.from_numpy(np.stack(each.pictures)).movedim(3, 1) for each in (drawn, self.teacher))
            found["lpips_to_teacher"] = number(bootstrap_mean(lpips_distances(self.network, ours, theirs).tolist()))
            found["lpips_to_teacher"]["features"] = LPIPS
        if self.clip is not None:
            found["clip_score"] = self._clip_score(self.clip, drawn, teacher)
        return found

    def _clip_score(self, network: Clip, drawn: Drawn, teacher: bool) -> Figure:
        own = self.teacher_scores if teacher else clip_scores(network, drawn.pictures, self.captions)
        figure = number(bootstrap_mean(list(own))) | {"better": "higher", "features": CLIP}
        if teacher:
            return figure
        gap = bootstrap_mean([a - b for a, b in zip(own, self.teacher_scores, strict=True)])
        return figure | {"difference": gap.value, "difference_low": gap.low, "difference_high": gap.high}


def looks(captions: Sequence[str], teacher: Drawn) -> Looks:
    """Which of these scores can be given, and why the others cannot."""
    left_out: list[tuple[str, UserError]] = []
    network = clip_network = None
    try:
        network = lpips()
    except UserError as error:
        left_out.append(("lpips_to_teacher", error))
    try:
        clip_network = clip()
    except UserError as error:
        left_out.append(("clip_score", error))
    known = clip_scores(clip_network, teacher.pictures, captions) if clip_network else []
    return Looks(captions, teacher, network, clip_network, known, tuple(left_out))
