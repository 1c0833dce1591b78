"""What the report reads: ``RUN/report.json`` and the pictures under ``RUN/pictures/``, never a model.

Beyond the keys that the design fixes (``version``, ``command``, ``machine``, ``models``, ``seconds``) the
report shows these where they are present::

    "title":    str
    "versions": {library: version}
    "data":     {"path", "used", "held_out", "skipped": [{"name", "reason"}]}
    "pictures": [{"caption", "seed", "models": {model name: {"file", "correct", "wrong": [attribute, ...]}}}]
    "training": {model name: [{"step", "losses": {term: value}}]}
    "held_out": {model name: {"n", "output_error_before", "output_error_after"}}
    models[i]["control_of"]: the name of the student that a control is the undistilled twin of
    "left_out": [{"score", "reason", "hint"}]
    models[i]["device" | "dtype" | "sampler"]: conditions of its pictures
    models[i]["measured"]: conditions of its times: {"device", "dtype", "size": [height, width], "steps",
        "guidance_scale", "sampler", "warmup", "repeats", "threads", "interleaved"}
    models[i]["measured_as"]: the model of the same networks whose times these are
    models[i]["images_per_second"]: {"median", "low", "high", "n", "batch_size"}
    models[i]["scores"][key]: {"value", "low", "high", "n", "relative_to_teacher", "relative_low", "relative_high",
        "difference", "difference_low", "difference_high", "unit", "better", "features", "reference", "floor"}

``file`` is relative to RUN, as in ``pictures/bk-base/0.png``; ``correct`` may be null where nothing checks
pictures. A score's ``unit`` is ``share`` (0 to 1, shown in percent; the default) or any other word, shown as a
number; ``better`` is ``higher`` (the default) or ``lower``. ``relative_low`` and ``relative_high`` are the
paired interval of ``relative_to_teacher``; ``difference`` is own minus the teacher's. The main score is
``scene_accuracy`` where any model has it, else the first of the first model. ``agreement_with_teacher`` has a
column of its own; ``scene_accuracy/<attribute>`` are the per-attribute scores; every other score is drawn by
its unit.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from decant.errors import refuse
from decant.stages.stage import validate

Role = Literal["teacher", "student", "control"]
Count = Annotated[int, Field(ge=0)]
_READ = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Spread(BaseModel):
    """A latency in milliseconds: median, with its low and high, of n repeats."""

    model_config = _READ

    median: float = Field(gt=0)
    low: float | None = None
    high: float | None = None
    n: Count | None = None


class Rate(Spread):
    """Pictures a second, ``batch_size`` at a time."""

    batch_size: Count | None = None


class Measured(BaseModel):
    """What a model's times and memory were measured with."""

    model_config = _READ

    device: str | None = None
    dtype: str | None = None
    size: tuple[Count, Count] | None = None
    steps: Count | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    warmup: Count | None = None
    repeats: Count | None = None
    threads: Count | None = None
    interleaved: bool | None = None


class Score(BaseModel):
    """A score with its interval."""

    model_config = _READ

    value: float
    low: float | None = None
    high: float | None = None
    n: Count | None = None
    relative_to_teacher: float | None = None
    relative_low: float | None = None
    relative_high: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    features: str | None = None
    reference: str | None = None
    floor: float | None = None
    unit: str = "share"
    better: Literal["higher", "lower"] = "higher"


class Model(BaseModel):
    """One model of the comparison."""

    model_config = _READ

    name: str = Field(min_length=1)
    role: Role
    path: str | None = None
    parameters: Count | None = None
    macs: Count | None = None
    size_mb: float | None = None
    steps: Count | None = None
    guidance_scale: float | None = None
    device: str | None = None
    dtype: str | None = None
    sampler: str | None = None
    latency_ms: dict[str, Spread] = {}
    images_per_second: Rate | None = None
    measured: Measured | None = None
    measured_as: str | None = None
    peak_memory_mb: float | None = None
    scores: dict[str, Score] = {}
    control_of: str | None = None


class Cell(BaseModel):
    """One picture: its file, and whether it shows what its caption says."""

    model_config = _READ

    file: str
    correct: bool | None = None
    wrong: tuple[str, ...] = ()


class Row(BaseModel):
    """The pictures of one caption and seed, by model."""

    model_config = _READ

    caption: str
    seed: int | None = None
    models: dict[str, Cell]


class Point(BaseModel):
    """The losses at one training step, by term."""

    model_config = _READ

    step: Count
    losses: dict[str, float]


class HeldOut(BaseModel):
    """Mean squared distance of a student's output to its teacher's on n pictures it was not trained on."""

    model_config = _READ

    n: Count
    output_error_before: float
    output_error_after: float


class SkippedItem(BaseModel):
    """Something in the data that was left out."""

    model_config = _READ

    name: str
    reason: str


class LeftOut(BaseModel):
    """A score that could not be computed."""

    model_config = _READ

    score: str
    reason: str = ""
    hint: str = ""


class DataNote(BaseModel):
    """What the run was trained on."""

    model_config = _READ

    path: str | None = None
    used: Count | None = None
    held_out: Count | None = None
    skipped: tuple[SkippedItem, ...] = ()


class Report(BaseModel):
    """``report.json``."""

    model_config = _READ

    title: str | None = None
    version: str | int = ""
    command: str = ""
    machine: str | dict[str, Any] = ""
    models: tuple[Model, ...] = Field(min_length=1)
    seconds: dict[str, float] = {}
    versions: dict[str, str] = {}
    data: DataNote | None = None
    pictures: tuple[Row, ...] = ()
    training: dict[str, tuple[Point, ...]] = {}
    held_out: dict[str, HeldOut] = {}
    left_out: tuple[LeftOut, ...] = ()


def read_report(run: Path) -> Report:
    """``RUN/report.json``. Raises ``UserError`` where it is missing, malformed or names a model twice."""
    file = run / "report.json"
    hint = "give the folder of a finished run; `decant evaluate` writes report.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise refuse("report", f"{file} cannot be read", allowed="a run with a report.json", hint=hint) from error
    except (ValueError, RecursionError) as error:
        value = f"{file} is not JSON ({str(error)[:120]})"
        raise refuse("report", value, allowed="one JSON document", hint="evaluate again") from None
    report = validate(Report, values, str(file))
    names = [model.name for model in report.models]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise refuse(f"{file}.models", f"{twice[0]!r} stands twice", allowed="unique names", hint="rename one")
    return report
