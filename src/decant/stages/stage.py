"""What a stage is to the runner: its settings, what it takes and gives, and one function."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from decant.data.source import Data
from decant.errors import UnfitError, UserError, nearest, refuse
from decant.ranks import ALONE, Ranks

_Model = TypeVar("_Model", bound=BaseModel)


class Settings(BaseModel):
    """Base of every stage's settings: unknown keys are refused, values cannot change after the door."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _silent(line: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Inputs:
    """What the runner hands to a stage.

    ``teacher`` is the folder, hub id or name given on the command line. ``models`` are the models this stage
    works on, in order: one for most stages, many for such as evaluate. ``data`` is what --data names. ``work`` is a
    folder for partial work (checkpoints): it outlives a kill and is emptied when the settings or the parents change.
    ``cache`` is the folder that keeps what was encoded, for all stages of a run or of many. ``talk`` takes one line for
    people. ``ranks``: the processes that share the stage's work; only the first writes.
    """

    teacher: str
    models: dict[str, str | Path]
    data: Data | None
    seed: int
    work: Path
    talk: Callable[[str], None] = _silent
    cache: Path | None = None
    ranks: Ranks = ALONE

    @property
    def kept(self) -> Path:
        """The folder that keeps what was encoded: ``cache``, or where there is none one with the partial work."""
        return self.cache or self.work / "cache"

    @property
    def source(self) -> str | Path:
        """The one model that a stage with a single input works on."""
        assert len(self.models) == 1, f"a stage with one input got {list(self.models)}"
        return next(iter(self.models.values()))


@dataclass(frozen=True)
class Stage:
    """One kind of stage: ``run(settings, inputs, out)`` fills the empty folder ``out``, returns its record.

    ``takes``: one model or many. ``gives_pipeline``: the folder it fills is a pipeline folder, from which
    later stages may start. ``data``: whether it reads the pictures; only then do other pictures make it run
    again. ``ranks``: whether all processes of a run do it together, or the first alone while the others wait.
    """

    settings: type[Settings]
    run: Callable[[Any, Inputs, Path], dict[str, Any]]
    takes: Literal["one", "many"] = "one"
    gives_pipeline: bool = True
    data: Literal["unused", "optional", "required"] = "unused"
    ranks: Literal["first", "all"] = "first"


def validate(model: type[_Model], values: object, place: str) -> _Model:
    """Values as ``model``, or a refusal that names the place, what is allowed and the nearest key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _explain(error, model, place) from None


def _explain(error: ValidationError, model: type[BaseModel], place: str) -> UserError:
    """The first of pydantic's complaints in decant's own form."""
    problems = error.errors(include_url=False)
    unfit = next((problem for problem in problems if isinstance(problem.get("ctx", {}).get("error"), UnfitError)), None)
    first = unfit or problems[0]
    # Of a setting of several forms pydantic names the form too: Following, or function-after[check(), Following].
    loc = [str(part) for part in first["loc"] if not unfit or re.fullmatch(r"\d+|[a-z_]\w*", str(part))]
    where = ".".join([place, *loc])
    if unfit:
        told: UnfitError = unfit["ctx"]["error"]
        return refuse(f"{where}.{told.key}", told.value, allowed=told.allowed, hint=told.hint)
    more = f" ({len(problems) - 1} more to mend)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(model, first["loc"][:-1])
        hint = nearest(str(first["loc"][-1]), known)
        return refuse(where, f"unknown key{more}", allowed=", ".join(known) or "no keys", hint=hint)
    if first["type"] == "missing":
        return refuse(where, f"missing{more}", allowed="this key is required", hint="add it")
    allowed = first["msg"].removeprefix("Value error, ")
    choices = re.findall(r"'([^']*)'", first["ctx"]["expected"]) if first["type"] == "literal_error" else []
    hint = nearest(str(first["input"]), choices) if choices else "change this value"
    return refuse(where, f"{_short(first['input'])}{more}", allowed=allowed, hint=hint)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _known_keys(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys allowed at a place inside ``model``: pydantic's location, followed field by field."""
    for part in loc:
        field = model.model_fields.get(str(part)) or _by_alias(model, str(part))
        inner = next(_models_in(field.annotation), None) if field else None
        model = inner or model
    return sorted(field.alias or name for name, field in model.model_fields.items())


def _by_alias(model: type[BaseModel], alias: str) -> Any:
    return next((field for field in model.model_fields.values() if field.alias == alias), None)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
