"""Write docs/reference/ from the code: verbs and options, settings of every stage, presets, shapes of the JSON files.

python examples/reference.py [FOLDER]
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from decant.cli.main import app
from decant.recipe.schema import Recipe, list_recipes, load_recipe, preset_text
from decant.report import record
from decant.report.record import Report
from decant.stages.all import STAGES

MADE = "<!-- Written by `make docs` from the code: do not edit. -->"


def commands() -> str:
    """Every verb with its options, as the command line itself knows them."""
    started, sys.argv = sys.argv, ["decant"]  # cyclopts writes how this process was started into the usage
    try:
        text = app.generate_docs(output_format="markdown", recursive=True)
    finally:
        sys.argv = started
    lines = [line.rstrip() for line in text.replace("```console", "```text").splitlines()]
    begin = next(index for index, line in enumerate(lines) if line.startswith("**Commands**"))
    return "\n".join([MADE, "", "# Verbs and options", "", *lines[begin + 2 :]]).rstrip() + "\n"


def settings() -> str:
    """A table of settings for every stage: what `--set stage.key=value` and a recipe take."""
    lines = [MADE, "", "# Settings of every stage", ""]
    lines += ["In a recipe under `settings:`, on the command line `--set STAGE.KEY=VALUE` (a value is YAML: `null`,"]
    lines += ["`[1, 2]`, `true`). A key that a stage does not know is refused, with the nearest one it does.", ""]
    for name, stage in STAGES.items():
        told = _first_paragraph(stage.settings.__doc__)
        needs = {"unused": "reads no pictures", "optional": "reads pictures where given", "required": "needs pictures"}
        lines += [f"## {name}", "", f"{told} Takes {stage.takes} model{'s' * (stage.takes == 'many')}; "]
        lines[-1] += f"{needs[stage.data]}; gives {'a pipeline folder' if stage.gives_pipeline else 'figures'}."
        lines += ["", *_table(stage.settings.model_fields), ""]
    return "\n".join(lines).rstrip() + "\n"


def presets() -> str:
    """Every preset that ships, whole, and the keys of a recipe."""
    lines = [MADE, "", "# Recipes", "", "## Keys of a recipe", "", *_table(Recipe.model_fields), ""]
    step = next(_models(Recipe.model_fields["stages"].annotation))
    lines += ["Keys of each of its `stages`:", "", *_table(step.model_fields), ""]
    for row in list_recipes():
        recipe = load_recipe(row["name"])
        lines += [f"## {row['name']}", "", f"{row['summary']}. Expected: {recipe.expected}.", ""]
        lines += ["```yaml", preset_text(row["name"]).rstrip(), "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def files() -> str:
    """The shape of report.json, from the model that reads it."""
    lines = [MADE, "", "# Shape of `report.json`", "", "What the report reads; keys beyond these are kept and ignored."]
    lines += ["Every key but `models` may be absent.", "", "```text", (record.__doc__ or "").strip(), "```", ""]
    waiting: list[type[BaseModel]] = [Report]
    for model in waiting:
        lines += [f"## {model.__name__}", "", _first_paragraph(model.__doc__), "", *_table(model.model_fields), ""]
        waiting += [m for f in model.model_fields.values() for m in _models(f.annotation) if m not in waiting]
    return "\n".join(lines).rstrip() + "\n"


def _table(fields: Mapping[str, FieldInfo]) -> list[str]:
    head = ["| key | kind | default | meaning |", "|---|---|---|---|"]
    return head + [_row(field.alias or name, field) for name, field in fields.items()]


def _row(name: str, field: FieldInfo) -> str:
    kind = " ".join([_kind(field.annotation), *_bounds(field)])
    default = "required" if field.is_required() else f"`{_plain(field.get_default(call_default_factory=True))}`"
    cells = (f"`{name}`", kind, default, field.description or "")
    return f"| {' | '.join(cells)} |"


def _kind(annotation: Any) -> str:
    """A type as people write it, without what pydantic hangs on it."""
    inner = get_args(annotation)
    match get_origin(annotation):
        case None:
            return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))
        case origin if origin is Annotated:
            return _kind(inner[0])
        case origin if origin is Literal:
            return ", ".join(map(str, inner))
        case origin if origin in (Union, UnionType):
            return " or ".join(map(_kind, inner))
        case origin if origin is dict:
            return f"map of {_kind(inner[1])}"
        case _:
            return f"list of {_kind(inner[0])}" if inner[1:] == (...,) else f"[{', '.join(map(_kind, inner))}]"


def _bounds(field: FieldInfo) -> Iterator[str]:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    for rule in field.metadata:
        yield from (f"{sign} {getattr(rule, name):g}" for name, sign in signs.items() if hasattr(rule, name))


def _plain(value: Any) -> str:
    return json.dumps(value.model_dump() if isinstance(value, BaseModel) else value)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _first_paragraph(doc: str | None) -> str:
    return " ".join((doc or "").strip().split("\n\n")[0].split())


def main(folder: Path) -> None:
    """Write all pages."""
    folder.mkdir(parents=True, exist_ok=True)
    for page in (commands, settings, presets, files):
        (folder / f"{page.__name__}.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "reference")
