"""What the pictures of each arm of a comparison are worth, every figure beside the teacher's of the same seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from decant.errors import UserError, refuse
from decant.metrics.clip_score import NAME as CLIP
from decant.metrics.clip_score import Clip, clip, clip_scores
from decant.metrics.diversity import COARSE, coarse, mean_pairwise_distance, pairs_of
from decant.metrics.lpips import NAME as LPIPS
from decant.metrics.lpips import lpips, lpips_distances
from decant.stages.asked import Asked
from decant.stages.distances import left_out_of, stacked
from decant.stages.drawn_once import Job
from decant.stages.paired import Better, number_of, share_of
from decant.stages.scoring import Drawn, Figure, apart_px, outcomes, rms, same

Pictures = list[NDArray[np.uint8]]
MAIN = ("scene_accuracy", "clip_score")
_FEATURES = {
    "clip_score": {"features": CLIP},
    "lpips_to_teacher": {"features": LPIPS},
    "diversity": {"features": COARSE},
    "diversity_of_right": {"features": "pixels between where the things stand, of pictures that are right"},
    "diversity_lpips": {"features": LPIPS},
}
_TO_TEACHER = ("agreement_with_teacher", "distance_to_teacher", "lpips_to_teacher")
_BESIDE = ("relative_to_teacher", "relative_low", "relative_high", "difference", "difference_low", "difference_high")
_FEWEST_SIDE = 32  # pixels that LPIPS needs


@dataclass(frozen=True)
class Values:
    """One arm's numbers: by picture, as shares or as numbers, and its diversities by prompt, None where none."""

    right: Mapping[str, Sequence[bool]]
    numbers: Mapping[str, Sequence[float]]
    diversity: Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class Judged:
    """One arm's figures, and what stands behind each."""

    figures: Mapping[str, Figure]
    drawn: Drawn
    values: Values
    main: str

    def told(self) -> str:
        """What matters most, in a line."""
        names = [name for name in (self.main, "distance_to_teacher", "diversity") if name in self.figures]
        return ", ".join(f"{name} {self.figures[name]['value']:.3g}" for name in names)

    def rows(self, jobs: Sequence[Job], out: Path) -> list[dict[str, Any]]:
        """A line a picture: which it is, and its numbers."""
        found = []
        for k, job in enumerate(jobs):
            row = {"prompt": job.prompt, "seed": job.seed, "file": job.file.relative_to(out).as_posix()}
            row |= {name: int(values[k]) for name, values in self.values.right.items()}
            found.append(row | {name: values[k] for name, values in self.values.numbers.items()})
        return found

    def cells(self, jobs: Sequence[Job], out: Path) -> list[dict[str, Any]]:
        """Each picture as report.json has it."""
        judged = [{"correct": s.exact, "wrong": list(s.wrong)} for s in self.drawn.scores] or [{"correct": None}] * len(
            jobs
        )
        return [{"file": job.file.relative_to(out).as_posix(), **j} for job, j in zip(jobs, judged, strict=True)]


@dataclass
class Judge:
    """Judges arm by arm, the teacher's first, by which all others are measured.

    left_out: what cannot be measured, and why, known once the first arm is judged.
    """

    ask: Asked
    images: int
    clip: Clip | None = None
    lpips: nn.Module | None = None
    left_out: list[dict[str, str]] = field(default_factory=list)
    _teacher: Judged | None = None
    _shuffled: float | None = None

    @classmethod
    def of(cls, ask: Asked, images: int) -> "Judge":
        """With the networks whose weights are here."""
        judge = cls(ask, images)
        try:
            judge.clip = clip()
        except UserError as error:
            judge.left_out.append(left_out_of("clip_score", error))
        try:
            judge.lpips = lpips()
        except UserError as error:
            judge.left_out += [left_out_of(key, error) for key in ("lpips_to_teacher", "diversity_lpips")]
        if images == 1:
            judge.left_out.append(
                {"score": "diversity", "reason": "one picture of each prompt", "hint": "--images 4, or more"}
            )
        return judge

    @property
    def main(self) -> str:
        """The score that the comparison is about, "" where none is to be had."""
        figures = self._teacher.figures if self._teacher else {}
        return next((name for name in MAIN if name in figures), "")

    def judge(self, pictures: Pictures) -> Judged:
        """All figures of one arm's pictures, in the order of what was asked."""
        drawn = Drawn.of(pictures, self.ask)
        reference = self._teacher.drawn if self._teacher else drawn
        if self._teacher is None:
            self._first(drawn)
        values = self._values(drawn, reference)
        figures = self._figures(values)
        found = Judged(figures, drawn, values, next((name for name in MAIN if name in figures), ""))
        self._teacher = self._teacher or found
        return found

    def _first(self, drawn: Drawn) -> None:
        """What the teacher's pictures decide for all."""
        height, width, _ = drawn.pictures[0].shape
        if self.ask.scenes and not drawn.readings:
            reason = f"the captions say scenes, and the checker reads 64 x 64, not {height} x {width}"
            self.left_out.append({"score": "scene_accuracy", "reason": reason, "hint": "--size 64"})
        if self.lpips is not None and min(height, width) < _FEWEST_SIDE:
            error = refuse(
                "LPIPS", f"pictures of {height} x {width}", allowed="32 pixels or more", hint="draw larger ones"
            )
            self.left_out += [left_out_of(key, error) for key in ("lpips_to_teacher", "diversity_lpips")]
            self.lpips = None
        if self.clip is not None and len(self.ask.captions) > self.images:
            other = [*self.ask.captions[self.images :], *self.ask.captions[: self.images]]
            self._shuffled = float(np.mean(clip_scores(self.clip, drawn.pictures, other)))

    def _values(self, drawn: Drawn, reference: Drawn) -> Values:
        right: dict[str, list[bool]] = {}
        numbers: dict[str, list[float]] = {}
        if drawn.scores:
            right = {**outcomes(drawn)}
            pairs = zip(drawn.readings, reference.readings, strict=True)
            right["agreement_with_teacher"] = [same(a, b) for a, b in pairs]
        if self.clip is not None:
            numbers["clip_score"] = clip_scores(self.clip, drawn.pictures, self.ask.captions)
        numbers["distance_to_teacher"] = [rms(a, b) for a, b in zip(drawn.pictures, reference.pictures, strict=True)]
        if self.lpips is not None:
            ours, theirs = stacked(drawn.pictures), stacked(reference.pictures)
            numbers["lpips_to_teacher"] = lpips_distances(self.lpips, ours, theirs).tolist()
        return Values(right, numbers, self._diversities(drawn) if self.images > 1 else {})

    def _diversities(self, drawn: Drawn) -> dict[str, list[float | None]]:
        """By prompt, of everything that can tell two pictures apart here."""
        groups = stacked(drawn.pictures).split(self.images)
        found: dict[str, list[float | None]] = {
            "diversity": [mean_pairwise_distance(coarse(group)) for group in groups]
        }
        if drawn.scores:
            starts = range(0, len(drawn.pictures), self.images)
            found["diversity_of_right"] = [_of_right(drawn, range(start, start + self.images)) for start in starts]
        if self.lpips is not None:
            found["diversity_lpips"] = [_lpips_diversity(self.lpips, group) for group in groups]
        return found

    def _figures(self, own: Values) -> dict[str, Figure]:
        teacher = self._teacher.values if self._teacher else None
        found: dict[str, Figure] = {}
        for name, right in own.right.items():
            found[name] = _alone(share_of(right, teacher.right[name] if teacher else None, self.images), name)
        for name, values in own.numbers.items():
            better: Better = "higher" if name == "clip_score" else "lower"
            theirs = teacher.numbers[name] if teacher else None
            found[name] = _alone(number_of(values, theirs, self.images, better), name)
        for name, each in own.diversity.items():
            if figure := _diversity(each, teacher.diversity[name] if teacher else None):
                found[name] = figure
        if self._shuffled is not None:
            found["clip_score"] |= {"shuffled": self._shuffled}
        return {name: figure | _FEATURES.get(name, {}) for name, figure in found.items()}


def _alone(figure: Figure, name: str) -> Figure:
    """What is measured against the teacher already has no part of the teacher's."""
    return {key: v for key, v in figure.items() if key not in _BESIDE} if name in _TO_TEACHER else figure


def _diversity(own: Sequence[float | None], teacher: Sequence[float | None] | None) -> Figure | None:
    """Over the prompts of which both have one; None where there are none. Of one prompt nothing can be resampled."""
    pairs = [(a, b) for a, b in zip(own, teacher or own, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    mine, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
    figure = number_of(mine, theirs if teacher else None, 1, "higher")
    return figure if len(pairs) > 1 else {key: v for key, v in figure.items() if not key.endswith(("low", "high"))}


def _of_right(drawn: Drawn, places: Sequence[int]) -> float | None:
    """Mean distance of where things stand, over the pairs of one prompt's right pictures; None of fewer than two."""
    right = [drawn.readings[k] for k in places if drawn.scores[k].exact]
    return float(np.mean([apart_px(right[a], right[b]) for a, b in pairs_of(len(right))])) if len(right) > 1 else None


def _lpips_diversity(network: nn.Module, pictures: Tensor) -> float:
    """Mean LPIPS over all pairs of pictures, uint8 (n, 3, H, W)."""
    first, second = (list(places) for places in zip(*pairs_of(len(pictures)), strict=True))
    return float(lpips_distances(network, pictures[first], pictures[second]).mean())
