"""``RUN/report.html``: one file that holds everything, made of ``report.json`` and ``pictures/`` alone."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from decant.report import words
from decant.report.pictures import picture_uri
from decant.report.plot import Curve, Observation, Scatter, curve, scatter
from decant.report.record import Cell, Model, Point, Report, Row, Score, Spread, read_report

_FILTERS = (
    words.big, words.plain, words.percent, words.score, words.interval, words.difference, words.relative_interval,
    words.spread, words.duration, words.part, words.conditions, words.requirements, words.python_string,
)  # fmt: skip


@dataclass(frozen=True)
class _Shown:
    """One picture as the page shows it; ``uri`` is empty where the file was not kept, ``told`` is its alt text."""

    model: str
    role: str
    uri: str
    correct: bool | None
    wrong: str
    told: str


@dataclass(frozen=True)
class _Gallery:
    """Pictures of one caption and seed, in the order of the models."""

    caption: str
    seed: int | None
    cells: tuple[_Shown, ...]


@dataclass(frozen=True)
class _Line:
    """The curve of one loss term, its first and last value, and the curve in words."""

    term: str
    curve: Curve
    first: float
    last: float
    told: str


def write_report(run: Path) -> Path:
    """Write ``RUN/report.html`` from ``RUN/report.json`` and return its path.

    Raises ``UserError`` where report.json is missing or malformed, or names a picture outside RUN.
    """
    run = Path(run)
    report = read_report(run)
    page = environment().get_template("template.html.j2").render(_view(report, run))
    path, temporary = run / "report.html", run / "report.html.tmp"
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def environment() -> Environment:
    """Jinja2 that escapes everything and knows how the report writes numbers."""
    loader = PackageLoader("decant.report", package_path="")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update({function.__name__: function for function in _FILTERS})
    environment.filters["heading"] = words.title
    return environment


def _view(report: Report, run: Path) -> dict[str, Any]:
    """Everything the template needs, computed."""
    models = _ordered(report.models)
    key = words.main_score(report)
    teacher = next((model for model in models if model.role == "teacher"), None)
    observations = _observations(models, key)
    best = words.best_student(report)
    conditions = sorted({words.conditions(model) for model in models} - {""})
    style = files("decant.report").joinpath("style.css").read_text(encoding="utf-8")
    return {
        "report": report,
        "style": style,
        "style_hash": base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        "title": report.title or (f"{teacher.name} and its students" if teacher else "Distilled students"),
        "verdict": words.verdict(report),
        "caution": words.caution(report),
        "models": models,
        "best": best,
        "harmed": best is not None and words.is_worse_than_cut(best, report),
        "key": key,
        "counts": sorted({m.scores[key].n or 0 for m in models if key in m.scores} - {0}),
        "same_conditions": conditions[0] if len(conditions) == 1 else None,
        "timings": sorted({words.timing(model) for model in models} - {""}),
        "parted": any(m.scores[key].relative_to_teacher is not None for m in models if key in m.scores),
        "rates": any(model.images_per_second for model in models),
        "agreement": words.AGREEMENT if any(words.AGREEMENT in model.scores for model in models) else None,
        "attributes": [k for k in _score_keys(models) if key and k.startswith(f"{key}/")],
        "further": [k for k in _score_keys(models) if k not in (key, words.AGREEMENT) and not _is_part(k, key)],
        "notes": {k: words.score_notes(m.scores[k]) for m in models for k in m.scores},
        "parts": list(dict.fromkeys(part for m in models for part in m.latency_ms if part != "picture")),
        "relative_latency": {model.name: words.relative_latency(model, teacher) for model in models},
        "plots": _plots(observations, models, key),
        "roles": [r for r in ("teacher", "student", "control") if any(o.role == r for o in observations)],
        "galleries": [_gallery(row, models, run) for row in report.pictures],
        "training": _training(report),
        "machine": report.machine if isinstance(report.machine, dict) else {"machine": report.machine},
    }


def _ordered(models: Sequence[Model]) -> list[Model]:
    """Teachers first, then every student with its undistilled control after it."""
    order = [model for model in models if model.role == "teacher"]
    for student in (model for model in models if model.role == "student"):
        control = words.control_of(student, models)
        order += [model for model in (student, control) if model is not None and model not in order]
    return order + [model for model in models if model not in order]


def _score_keys(models: Sequence[Model]) -> list[str]:
    return list(dict.fromkeys(key for model in models for key in model.scores))


def _is_part(key: str, main: str | None) -> bool:
    return main is not None and key.startswith(f"{main}/")


def _observations(models: Sequence[Model], key: str | None) -> list[Observation]:
    """The models that have both a latency per picture and the main score."""
    students = [model for model in models if model.role == "student"]
    twins = {control.name: s.name for s in students if (control := words.control_of(s, models))}
    return [
        Observation(m.name, m.role, ends(m.latency_ms["picture"]), ends(m.scores[key]), twins.get(m.name))
        for m in models
        if key in m.scores and "picture" in m.latency_ms
    ]


def ends(value: Spread | Score) -> tuple[float, float, float]:
    """The middle, the low and the high end; without an interval all three are the middle."""
    middle = value.median if isinstance(value, Spread) else value.value
    low, high = value.low, value.high
    return middle, middle if low is None else low, middle if high is None else high


def _plots(observations: Sequence[Observation], models: Sequence[Model], key: str | None) -> dict[str, Any]:
    """The same plot for wide and for narrow screens (scaling one would make its letters too small), and in words."""
    if not observations or key is None:
        return {}
    share = all(model.scores[key].unit == "share" for model in models if key in model.scores)
    sizes = {"wide": (760, 400), "narrow": (350, 340)}
    drawn: dict[str, Scatter] = {name: scatter(observations, *size, share) for name, size in sizes.items()}
    return {"drawn": drawn, "told": words.plotted(observations, key, share)}


def _gallery(row: Row, models: Sequence[Model], run: Path) -> _Gallery:
    """The row's pictures; a model without one has no cell."""
    found = [(model, row.models[model.name]) for model in models if model.name in row.models]
    cells = [_shown(model, cell, row.caption, run) for model, cell in found]
    return _Gallery(row.caption, row.seed, tuple(cells))


def _shown(model: Model, cell: Cell, caption: str, run: Path) -> _Shown:
    told = words.pictured(model.name, caption, cell)
    return _Shown(model.name, model.role, picture_uri(run, cell.file), cell.correct, words.few(cell.wrong), told)


def _training(report: Report) -> dict[str, dict[str, Any]]:
    """Curves and the held-out proof of everything that was trained."""
    names = dict.fromkeys([*(name for name, points in report.training.items() if points), *report.held_out])
    return {
        name: {"lines": _lines(report.training.get(name, ())), "held_out": report.held_out.get(name)} for name in names
    }


def _lines(points: Sequence[Point]) -> list[_Line]:
    """One curve a loss term, in the order in which terms appear."""
    return [_line(term, points) for term in dict.fromkeys(term for point in points for term in point.losses)]


def _line(term: str, points: Sequence[Point]) -> _Line:
    values: Mapping[int, float] = {point.step: point.losses[term] for point in points if term in point.losses}
    drawn = curve(list(values), list(values.values()), 210, 92)
    first, *_, last = [*values.values(), *values.values()]
    return _Line(term, drawn, first, last, words.drawn(term, first, last, drawn.x))
