"""What the page of a comparison reads: ``OUT/compare.json`` and the pictures under ``OUT/pictures/``, never a model."""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from decant.errors import refuse
from decant.report.record import LeftOut, Model, Row, Score
from decant.stages.stage import validate

_READ = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Speedup(BaseModel):
    """How many times faster than the teacher's pictures; low and high of the slowest and the fastest of both."""

    model_config = _READ

    value: float
    low: float | None = None
    high: float | None = None


class ArmScore(Score):
    """A score of an arm; ``n`` counts prompts, ``shuffled`` is what the teacher's pictures get with other prompts."""

    pictures: int | None = None
    shuffled: float | None = None


class Arm(Model):
    """A model at one number of steps."""

    model: str
    speedup: Speedup | None = None
    scores: dict[str, ArmScore] = Field({})  # type: ignore[assignment]


class Prompt(BaseModel):
    """A prompt, and the end of it for which the text encoder has no room."""

    model_config = _READ

    prompt: str
    unread: str = ""


class Comparison(BaseModel):
    """``compare.json``: the first arm is the teacher, by which all others are measured."""

    model_config = _READ

    version: str = ""
    command: str = ""
    machine: dict[str, str | int] = {}
    versions: dict[str, str] = {}
    seed: int
    images: int = Field(ge=1)
    prompts: tuple[Prompt, ...]
    prompts_of: str = ""
    skipped: dict[str, int] = {}
    main_score: str = ""
    columns: tuple[str, ...] = ()
    models: tuple[Arm, ...] = Field(min_length=1)
    left_out: tuple[LeftOut, ...] = ()
    pictures: tuple[Row, ...] = ()


def read_comparison(out: Path) -> Comparison:
    """``OUT/compare.json``.

    Raises:
        UserError: it is missing or malformed.
    """
    file = out / "compare.json"
    hint = "give the folder of a finished comparison; `decant compare` writes compare.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise refuse("compare", f"{file} cannot be read", allowed="a finished comparison", hint=hint) from error
    except (ValueError, RecursionError) as error:
        value = f"{file} is not JSON ({str(error)[:120]})"
        raise refuse("compare", value, allowed="one JSON document", hint="compare again") from None
    return validate(Comparison, values, str(file))
