"""Damage against cost of every part, as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKS = {
    "transformer block": "o",
    "attentions": "s",
    "layers": "^",
    "mid attention": "D",
    "mid block": "P",
    "level": "X",
}
_NAMED = 10
_LINE = 14.0  # pixels from one name to the next


def draw(document: Mapping[str, Any], file: Path) -> None:
    """A point for every part: what it costs to the right, what its removal damages upwards.

    Kinds have marks of their own, so that it reads without colour. The parts that cost most for the least damage, the
    first to take out, are named as far as there is room.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    for kind, mark in _MARKS.items():
        parts = [part for part in document["parts"] if part["kind"] == kind]
        if parts:
            x, y = [part["latency_ms"]["median"] for part in parts], [part["damage"] for part in parts]
            axes.scatter(x, y, marker=mark, s=36, label=kind, alpha=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"latency of the part in one forward, ms ({document['machine']['device']}, batch 1)")
    axes.set_ylabel("change of the output without it, relative")
    axes.set_title(f"{document['teacher']}: {document['pictures']} pictures, {document['noise_levels']} noise levels")
    axes.legend(fontsize=8)
    axes.grid(visible=True, which="major", alpha=0.3)
    figure.draw_without_rendering()
    _name(axes, sorted(document["parts"], key=_worth))
    figure.savefig(file, dpi=120)


def _worth(part: Mapping[str, Any]) -> float:
    """Damage for what it costs."""
    return float(part["damage"] / max(part["latency_ms"]["median"], 1e-6))


def _name(axes: "Axes", parts: Sequence[Mapping[str, Any]]) -> None:
    """Names of the first parts, where no other name is near: towards the middle, so that they stay inside."""
    middle = axes.bbox.x0 + axes.bbox.width / 2
    named: list[float] = []
    for part in parts:
        place = (part["latency_ms"]["median"], part["damage"])
        x, y = axes.transData.transform(place)
        if len(named) == _NAMED or any(abs(y - other) < _LINE for other in named):
            continue
        named.append(y)
        right = x > middle
        axes.annotate(
            _short(part["name"]),
            place,
            textcoords="offset points",
            xytext=(-7 if right else 7, -3),
            ha="right" if right else "left",
            fontsize=8,
        )


def _short(name: str) -> str:
    """`down_blocks.2.attentions.1.transformer_blocks.0` -> `down 2, attention 1, block 0`."""
    for long, short in (("_blocks.", " "), (".attentions.", ", attention ")):
        name = name.replace(long, short)
    return name.replace(".transformer ", ", block ").replace("_block", "").replace(".attentions", ", attentions")
