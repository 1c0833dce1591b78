"""``OUT/compare.html``: one file that holds everything, made of ``compare.json`` and ``pictures/`` alone; and grids."""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from decant.report import compare_words, words
from decant.report.compare_record import Comparison, read_comparison
from decant.report.grids import write_grids
from decant.report.page import ends, environment
from decant.report.pictures import picture_uri
from decant.report.plot import Observation, Scatter, scatter
from decant.report.record import Row

_SHOWN, _VARIED, _SEEDS = 12, 2, 6


def write_comparison(out: Path) -> Path:
    """Write ``OUT/compare.html`` and ``OUT/grids/`` from ``OUT/compare.json``, and give the page's path.

    Raises:
        UserError: compare.json is missing or malformed, or names a picture outside OUT.
    """
    comparison = read_comparison(out)
    write_grids(comparison, out)
    page = environment().get_template("compare.html.j2").render(_view(comparison, out))
    path, temporary = out / "compare.html", out / "compare.html.tmp"
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def style_sheet(*names: str) -> dict[str, str]:
    """Style sheets of the report as one, and the hash by which the page's policy admits it."""
    style = "".join(files("decant.report").joinpath(name).read_text(encoding="utf-8") for name in names)
    return {"style": style, "style_hash": base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}


def _view(c: Comparison, out: Path) -> dict[str, Any]:
    """Everything the template needs, computed."""
    key = c.main_score
    starts = range(0, len(c.pictures), c.images)
    return {
        **style_sheet("style.css"),
        "c": c,
        "say": compare_words,
        "paths": {arm.model: arm.path for arm in c.models},
        "title": f"{len({arm.model for arm in c.models})} models at few steps",
        "verdict": compare_words.verdict(c),
        "caution": compare_words.caution(c),
        "key": key,
        "varied": compare_words.diversity_key(c),
        "columns": sorted((k for k in c.columns if k != key), key=lambda k: k != compare_words.diversity_key(c)),
        "timings": sorted({_timing(arm) for arm in c.models} - {""}),
        "plots": _plots(c),
        "galleries": [_gallery(c.pictures[start], c, out) for start in starts[:_SHOWN]],
        "seeds": [
            (c.pictures[start].caption, _strips(c.pictures[start : start + min(c.images, _SEEDS)], c, out))
            for start in starts[: _VARIED if c.images > 1 else 0]
        ],
        "cut": compare_words.cut(c),
        "skipped": compare_words.left_out_lines([*c.skipped.items()]),
    }


def _timing(arm: Any) -> str:
    """What times were measured with, steps apart, in which arms differ."""
    how = arm.measured
    return words.timing(arm.model_copy(update={"measured": how.model_copy(update={"steps": None})})) if how else ""


def _plots(c: Comparison) -> dict[str, Any]:
    """Main score against latency, for wide and for narrow screens, and in words."""
    key = c.main_score
    seen = [
        Observation(arm.name, arm.role, ends(arm.latency_ms["picture"]), ends(arm.scores[key]), None)
        for arm in c.models
        if key in arm.scores and "picture" in arm.latency_ms
    ]
    if not seen:
        return {}
    share = c.models[0].scores[key].unit == "share"
    sizes = {"wide": (760, 400), "narrow": (350, 340)}
    drawn: dict[str, Scatter] = {name: scatter(seen, *size, share) for name, size in sizes.items()}
    return {"drawn": drawn, "told": words.plotted(seen, key, share)}


def _gallery(row: Row, c: Comparison, out: Path) -> dict[str, Any]:
    return {"caption": row.caption, "seed": row.seed, "cells": [_cell(arm, row, out) for arm in c.models]}


def _strips(rows: Sequence[Row], c: Comparison, out: Path) -> list[dict[str, Any]]:
    """Every arm's pictures of one prompt."""
    return [{"name": arm.name, "role": arm.role, "cells": [_cell(arm, row, out) for row in rows]} for arm in c.models]


def _cell(arm: Any, row: Row, out: Path) -> dict[str, Any]:
    cell = row.models[arm.name]
    return {
        "name": arm.name,
        "role": arm.role,
        "seed": row.seed,
        "uri": picture_uri(out, cell.file),
        "correct": cell.correct,
        "wrong": words.few(cell.wrong),
        "told": words.pictured(arm.name, row.caption, cell),
    }
