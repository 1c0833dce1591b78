"""``RUN/report.html``: one file that holds everything, made of ``report.json`` and ``pictures/`` alone."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from decant.errors import refuse
from decant.report import words
from decant.report.plot import Curve, Observation, Scatter, curve, scatter
from decant.report.record import Cell, Model, Point, Report, Row, Score, Spread, read_report

_SIDE = 256  # pictures are shown small; larger ones would only make the file heavy
_FILTERS = (words.big, words.plain, words.percent, words.score, words.interval, words.spread, words.duration)


@dataclass(frozen=True)
class _Shown:
    """One picture as the page shows it; ``uri`` is empty where the file was not kept."""

    model: str
    uri: str
    correct: bool | None
    wrong: str


@dataclass(frozen=True)
class _Gallery:
    """Pictures of one caption and seed."""

    caption: str
    seed: int | None
    cells: tuple[_Shown | None, ...]


@dataclass(frozen=True)
class _Line:
    """The curve of one loss term, with its first and last value."""

    term: str
    curve: Curve
    first: float
    last: float


def write_report(run: Path) -> Path:
    """Write ``RUN/report.html`` from ``RUN/report.json`` and return its path.

    Raises ``UserError`` where report.json is missing or malformed, or names a picture outside RUN.
    """
    run = Path(run)
    report = read_report(run)
    page = _environment().get_template("template.html.j2").render(_view(report, run))
    path, temporary = run / "report.html", run / "report.html.tmp"
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def _environment() -> Environment:
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
    names = [model.name for model in models]
    return {
        "report": report,
        "title": report.title or (f"{teacher.name} and its students" if teacher else "Distilled students"),
        "verdict": words.verdict(report),
        "models": models,
        "best": words.best_student(report),
        "key": key,
        "counts": sorted({str(m.scores[key].n) for m in models if key in m.scores and m.scores[key].n}),
        "agreement": words.AGREEMENT,
        "attributes": [k for k in _score_keys(models) if key and k.startswith(f"{key}/")],
        "further": [k for k in _score_keys(models) if k not in (key, words.AGREEMENT) and "/" not in k],
        "speedups": {model.name: words.speedup(model, teacher) for model in models},
        "plots": _plots(observations, models, key),
        "roles": [r for r in ("teacher", "student", "control") if any(o.role == r for o in observations)],
        "galleries": [_gallery(row, names, run) for row in report.pictures],
        "training": {name: _lines(points) for name, points in report.training.items() if points},
        "machine": report.machine.items() if isinstance(report.machine, dict) else [("", report.machine)],
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


def _observations(models: Sequence[Model], key: str | None) -> list[Observation]:
    """The models that have both a latency per picture and the main score."""
    students = [model for model in models if model.role == "student"]
    twins = {control.name: s.name for s in students if (control := words.control_of(s, models))}
    return [
        Observation(m.name, m.role, _ends(m.latency_ms["picture"]), _ends(m.scores[key]), twins.get(m.name))
        for m in models
        if key in m.scores and "picture" in m.latency_ms
    ]


def _ends(value: Spread | Score) -> tuple[float, float, float]:
    """The middle, the low and the high end; without an interval all three are the middle."""
    middle = value.median if isinstance(value, Spread) else value.value
    low, high = value.low, value.high
    return middle, middle if low is None else low, middle if high is None else high


def _plots(observations: Sequence[Observation], models: Sequence[Model], key: str | None) -> dict[str, Scatter]:
    """The same plot for wide and for narrow screens: scaling one drawing would make its letters too small."""
    if not observations:
        return {}
    share = all(model.scores[key].unit == "share" for model in models if key in model.scores)
    sizes = {"wide": (760, 400), "narrow": (350, 340)}
    return {name: scatter(observations, width, height, share) for name, (width, height) in sizes.items()}


def _gallery(row: Row, names: Sequence[str], run: Path) -> _Gallery:
    cells = [_shown(name, row.models[name], run) if name in row.models else None for name in names]
    return _Gallery(row.caption, row.seed, tuple(cells))


def _shown(name: str, cell: Cell, run: Path) -> _Shown:
    return _Shown(name, _picture_uri(run, cell.file), cell.correct, ", ".join(cell.wrong))


def _picture_uri(run: Path, name: str) -> str:
    """A picture as a PNG data URI of at most 256 pixels a side; "" where there is no such file.

    Raises ``UserError`` where the name leaves RUN, by itself or through a link, or the file is no PNG.
    """
    hint = "report.json names its pictures as pictures/<model>/<index>.png"
    if not _inside(run, name):
        raise refuse("report.json pictures", f"{name!r} leaves the run", allowed="files inside the run", hint=hint)
    if not _kept(run / name):
        return ""
    try:
        with Image.open(run / name, formats=("PNG",)) as image:
            small = image.convert("RGB")
    except Exception as error:  # decoders raise anything on damaged input
        raise refuse("report.json pictures", f"{name!r} does not decode", allowed="PNG files", hint=hint) from error
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _inside(run: Path, name: str) -> bool:
    """Whether a file name stays in the run, links followed."""
    if "\0" in name or Path(name).is_absolute():
        return False
    try:
        return (run / name).resolve().is_relative_to(run.resolve())
    except (OSError, RuntimeError):  # a loop of links
        return False


def _kept(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # a name longer than the system allows
        return False


def _lines(points: Sequence[Point]) -> list[_Line]:
    """One curve a loss term, in the order in which terms appear."""
    terms = dict.fromkeys(term for point in points for term in point.losses)
    lines = []
    for term in terms:
        steps = [point.step for point in points if term in point.losses]
        values = [point.losses[term] for point in points if term in point.losses]
        lines.append(_Line(term, curve(steps, values, 180, 48), values[0], values[-1]))
    return lines
