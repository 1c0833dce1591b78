"""Where every mark, bar and label of the report's drawings stands. The template draws them as SVG."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

Map = Callable[[float], float]
_T = TypeVar("_T")


class Box(NamedTuple):
    """A rectangle in the drawing's units, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: "Box") -> float:
        """The area that two boxes share."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)


@dataclass(frozen=True)
class Observation:
    """A model as the plot sees it: latency in ms and a score, each with its low and high.

    ``twin`` is the student that a control belongs to.
    """

    name: str
    role: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]
    twin: str | None = None


@dataclass(frozen=True)
class Mark:
    """A drawn observation: its centre, the ends of its bars, and where its label stands.

    A control that is tied to its student by a line (from its centre to ``tie``) has an empty ``label``.
    """

    label: str
    role: str
    x: float
    y: float
    bar_x: tuple[float, float]
    bar_y: tuple[float, float]
    label_x: float
    label_y: float
    anchor: str = "start"
    tie: tuple[float, float] | None = None


@dataclass(frozen=True)
class Tick:
    """A tick: its place along the axis, and its words."""

    at: float
    text: str


@dataclass(frozen=True)
class Scatter:
    """A whole plot, in a view box of ``width`` x ``height``."""

    width: int
    height: int
    frame: Box
    marks: tuple[Mark, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class Curve:
    """A small line in its frame: the points of an SVG polyline, the last of them, and the ends of both axes."""

    width: int
    height: int
    frame: Box
    points: str
    end: tuple[float, float]
    x: tuple[int, int]
    y: tuple[float, float]


def scatter(items: Sequence[Observation], width: int, height: int, percent: bool) -> Scatter:
    """Score against latency, with a tie from every control to its student. Shares go from 0 to 100 %."""
    frame = Box(54, 16, width - 22, height - 48)
    x_values = [value for item in items for value in item.x]
    y_values = [value for item in items for value in item.y]
    x_ticks = _ticks(0.75 * min(x_values), 1.02 * max(x_values), 8 if width > 500 else 4)
    y_ticks = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0] if percent else _ticks(min(0.0, *y_values), max(y_values), 5)
    to_x = _linear(x_ticks[0], x_ticks[-1], frame.left, frame.right)
    to_y = _linear(y_ticks[0], y_ticks[-1], frame.bottom, frame.top)
    centres = {item.name: (to_x(item.x[0]), to_y(item.y[0])) for item in items}
    marks = _labelled([_mark(item, to_x, to_y, centres) for item in items], frame)
    x_words = tuple(Tick(to_x(value), f"{value:,g}") for value in x_ticks)
    y_words = tuple(Tick(to_y(value), f"{value:.0%}" if percent else f"{value:,g}") for value in y_ticks)
    return Scatter(width, height, frame, marks, x_words, y_words)


def curve(steps: Sequence[int], values: Sequence[float], width: int, height: int) -> Curve:
    """Values over steps in a view box of ``width`` x ``height``; logarithmic where all values are positive."""
    frame = Box(48, 8, width - 6, height - 18)
    ends = (min(values), max(values))
    steps, values = _thinned(steps, 160), _thinned(values, 160)
    scale = math.log if ends[0] > 0 else float
    to_x = _linear(steps[0], steps[-1], frame.left, frame.right)
    to_y = _linear(scale(ends[0]), scale(ends[1]), frame.bottom, frame.top)
    places = [(round(to_x(step), 1), round(to_y(scale(value)), 1)) for step, value in zip(steps, values, strict=True)]
    points = " ".join(f"{x},{y}" for x, y in places)
    return Curve(width, height, frame, points, places[-1], (steps[0], steps[-1]), ends)


def _linear(low: float, high: float, start: float, end: float) -> Map:
    """The straight line that takes low to start and high to end; the middle where low equals high."""
    if high == low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    """About ``wanted`` round numbers (1, 2 or 5 times a power of ten apart) that enclose low and high."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= wanted)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _mark(item: Observation, to_x: Map, to_y: Map, centres: dict[str, tuple[float, float]]) -> Mark:
    x, y = centres[item.name]
    bar_x, bar_y = (to_x(item.x[1]), to_x(item.x[2])), (to_y(item.y[1]), to_y(item.y[2]))
    tie = centres.get(item.twin) if item.twin else None
    return Mark("" if tie else item.name, item.role, x, y, bar_x, bar_y, x, y, tie=tie)


def _labelled(marks: Sequence[Mark], frame: Box) -> tuple[Mark, ...]:
    """Every label at the place beside its mark that covers least of what is drawn already."""
    taken = [box for mark in marks for box in _drawn(mark)]
    placed = [mark for mark in marks if not mark.label]
    for mark in sorted((mark for mark in marks if mark.label), key=lambda mark: (mark.y, mark.x)):
        options = _places(mark)
        costs = [_cost(_text_box(option), taken, frame) for option in options]
        best = options[costs.index(min(costs))]
        taken.append(_text_box(best))
        placed.append(best)
    return tuple(placed)


def _drawn(mark: Mark) -> list[Box]:
    """The room that a mark, its bars and its tie take."""
    x, y = mark.x, mark.y
    tie = [Box(min(x, mark.tie[0]), min(y, mark.tie[1]), max(x, mark.tie[0]), max(y, mark.tie[1]))] if mark.tie else []
    across = Box(mark.bar_x[0], y - 2, mark.bar_x[1], y + 2)
    upright = Box(x - 3, min(mark.bar_y), x + 3, max(mark.bar_y))
    return [Box(x - 7, y - 7, x + 7, y + 7), across, upright, *tie]


def _places(mark: Mark) -> list[Mark]:
    """The mark with its label right, left, above, below, and further off in the four corners."""
    x, y = mark.x, mark.y
    spots = [(11, 4, "start"), (-11, 4, "end"), (11, -10, "start"), (11, 18, "start"), (-11, -10, "end")]
    spots += [(-11, 18, "end"), (0, -26, "middle"), (0, 36, "middle"), (16, -24, "start"), (16, 32, "start")]
    return [replace(mark, label_x=x + dx, label_y=y + dy, anchor=anchor) for dx, dy, anchor in spots]


def _text_box(mark: Mark) -> Box:
    """The room of a label, at about 6.8 units a letter."""
    width = 6.8 * len(mark.label)
    shift = {"start": 0.0, "middle": width / 2, "end": width}[mark.anchor]
    return Box(mark.label_x - shift, mark.label_y - 11, mark.label_x - shift + width, mark.label_y + 4)


def _cost(box: Box, taken: Sequence[Box], frame: Box) -> float:
    """How much of what is drawn a label would cover; leaving the frame is worst."""
    area = (box.right - box.left) * (box.bottom - box.top)
    outside = area - box.overlap(Box(frame.left, frame.top - 8, frame.right + 14, frame.bottom))
    return sum(box.overlap(other) for other in taken) + 10 * outside


def _thinned(values: Sequence[_T], most: int) -> list[_T]:
    """At most ``most`` of the values, evenly spaced, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(index * (len(values) - 1) / (most - 1))] for index in range(most)]
