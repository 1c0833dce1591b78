"""Damage against cost of every part, as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MARKS = {
    "transformer block": "o",
    "attentions": "s",
    "layers": "^",
    "mid attention": "D",
    "mid block": "P",
    "level": "X",
}
_NAMED = 12


def draw(document: Mapping[str, Any], file: Path) -> None:
    """A point for every part: what it costs to the right, what its removal damages upwards.

    Kinds have marks of their own, so that it reads without colour. The parts that cost most for the least damage, the
    first to take out, are named.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    for kind, mark in _MARKS.items():
        parts = [part for part in document["parts"] if part["kind"] == kind]
        if parts:
            x, y = [part["latency_ms"]["median"] for part in parts], [part["damage"] for part in parts]
            axes.scatter(x, y, marker=mark, s=36, label=kind, alpha=0.8)
    cheap = sorted(document["parts"], key=lambda part: part["damage"] / max(part["latency_ms"]["median"], 1e-6))
    for part in cheap[:_NAMED]:
        axes.annotate(
            part["name"],
            (part["latency_ms"]["median"], part["damage"]),
            textcoords="offset points",
            xytext=(5, 4),
            fontsize=7,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"latency of the part in one forward, ms ({document['machine']['device']}, batch 1)")
    axes.set_ylabel("change of the output without it, relative")
    axes.set_title(f"{document['teacher']}: {document['pictures']} pictures, {document['noise_levels']} noise levels")
    axes.legend(fontsize=8)
    axes.grid(visible=True, which="major", alpha=0.3)
    figure.savefig(file, dpi=120)
