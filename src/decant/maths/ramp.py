"""Numbers that follow the run: a weight, a share of captions, the length of a chain."""

from dataclasses import dataclass
from itertools import pairwise
from math import cos, pi
from typing import Literal, assert_never

Shape = Literal["linear", "cosine", "steps"]


@dataclass(frozen=True)
class Ramp:
    """A table of (progress, value), progress from 0 at a run's first update to 1 at its last.

    Before the first point the first value holds, after the last the last. Between two points ``linear`` goes straight,
    ``cosine`` on half a wave, and ``steps`` keeps the earlier value.
    """

    points: tuple[tuple[float, float], ...]
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        places = [place for place, _ in self.points]
        assert places and places == sorted(places), f"points are in order of progress, not {places}"

    def at(self, progress: float) -> float:
        """The value at ``progress``."""
        if progress <= self.points[0][0]:
            return self.points[0][1]
        for (begin, start), (finish, end) in pairwise(self.points):
            if progress < finish:
                return start + (end - start) * self._bent((progress - begin) / (finish - begin))
        return self.points[-1][1]

    def _bent(self, part: float) -> float:
        match self.shape:
            case "linear":
                return part
            case "cosine":
                return 0.5 * (1 - cos(pi * part))
            case "steps":
                return 0.0
            case _:
                assert_never(self.shape)


def value_at(number: float | Ramp, progress: float) -> float:
    """A number that may follow the run, at ``progress``."""
    return number.at(progress) if isinstance(number, Ramp) else number


def ever(number: float | Ramp) -> bool:
    """Whether it is anything but 0 at any time."""
    return any(value for _, value in number.points) if isinstance(number, Ramp) else bool(number)
