"""What one model's pictures are worth: read by the checker, and beside the teacher's of the same captions and seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decant.metrics.interval import Interval, bootstrap_mean, mcnemar_p, paired_difference, paired_ratio, wilson
from decant.scenes.captions import parse
from decant.scenes.checker import ATTRIBUTES, Reading, Score, read, score
from decant.scenes.render import SIDE
from decant.stages.asked import Asked

Picture = NDArray[np.uint8]
Figure = dict[str, Any]
_NEAR_PX = 6


@dataclass(frozen=True)
class Drawn:
    """One model's pictures, and where the captions are scenes what the checker read and made of them."""

    pictures: list[Picture]
    readings: list[Reading]
    scores: list[Score]

    @classmethod
    def of(cls, pictures: list[Picture], asked: Asked) -> "Drawn":
        """Read every picture, where that means something: captions of scenes may stand beside pictures of any size."""
        if not asked.scenes or any(picture.shape != (SIDE, SIDE, 3) for picture in pictures):
            return cls(pictures, [], [])
        readings = [read(picture) for picture in pictures]
        judged = [score(r, parse(c)) for r, c in zip(readings, asked.captions, strict=True)]
        return cls(pictures, readings, judged)


def scores(drawn: Drawn, teacher: Drawn) -> dict[str, Figure]:
    """Every score of one model's pictures, as ``report.json`` holds them; ``teacher`` may be ``drawn`` itself."""
    found: dict[str, Figure] = {}
    if drawn.scores:
        own, theirs = outcomes(drawn), outcomes(teacher)
        agree = [same(a, b) for a, b in zip(drawn.readings, teacher.readings, strict=True)]
        found = {name: share(own[name], None if drawn is teacher else theirs[name]) for name in own}
        found["agreement_with_teacher"] = wilson(sum(agree), len(agree)).to_json()
    distance = [rms(a, b) for a, b in zip(drawn.pictures, teacher.pictures, strict=True)]
    return found | {"distance_to_teacher": number(bootstrap_mean(distance))}


def share(own: Sequence[bool], teacher: Sequence[bool] | None) -> Figure:
    """A share with Wilson's interval, and beside a teacher's outcomes on the same pictures: part, difference, chance.

    ``teacher`` is None for the teacher itself, whose part is 1 and has no interval.
    """
    figure: Figure = {**wilson(sum(own), len(own)).to_json()}
    if teacher is None:
        return figure | ({"relative_to_teacher": 1.0} if any(own) else {})
    if any(teacher):
        ratio = paired_ratio(own, teacher)
        figure |= {"relative_to_teacher": ratio.value, "relative_low": ratio.low, "relative_high": ratio.high}
    gap = paired_difference(own, teacher)
    figure |= {"difference": gap.value, "difference_low": gap.low, "difference_high": gap.high}
    return figure | {"mcnemar_p": mcnemar_p(own, teacher)}


def number(interval: Interval) -> Figure:
    """A figure that is no share, and better when lower."""
    return {**interval.to_json(), "unit": "number", "better": "lower"}


def same(a: Reading, b: Reading) -> bool:
    """Whether two pictures show the same: a background, things of one kind within 6 pixels, as much that is unclear."""
    if a.background is None or (a.background, a.unclear, len(a.seen)) != (b.background, b.unclear, len(b.seen)):
        return False
    return all(any(x.thing == y.thing and np.hypot(x.x - y.x, x.y - y.y) < _NEAR_PX for y in b.seen) for x in a.seen)


def apart_px(a: Reading, b: Reading) -> float:
    """How far the things of two pictures that show the same ones stand from each other, in pixels, on average."""
    ways = [
        [np.hypot(x.x - y.x, x.y - y.y) for x, y in zip(a.seen, order, strict=True)]
        for order in permutations(b.seen)
        if all(x.thing == y.thing for x, y in zip(a.seen, order, strict=True))
    ]
    return float(min(np.mean(way) for way in ways))


def told(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The score that matters most, with its interval, in a line."""
    for name in ("scene_accuracy", "output_error", "distance_to_teacher"):
        if name in found:
            s = found[name]
            return f"{name} {s['value']:.4g} [{s['low']:.4g}, {s['high']:.4g}] n={s['n']}"
    return ""


def outcomes(drawn: Drawn) -> dict[str, list[bool]]:
    """Right or wrong by picture: the whole scene, and each attribute."""
    return {
        "scene_accuracy": [s.exact for s in drawn.scores],
        **{f"scene_accuracy/{name}": [s.attributes[name] for s in drawn.scores] for name in ATTRIBUTES},
    }


def rms(a: Picture, b: Picture) -> float:
    """Root mean square difference of two pictures, of 1."""
    return float(np.sqrt(np.mean(np.square((a.astype(np.float64) - b.astype(np.float64)) / 255))))
