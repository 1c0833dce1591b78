"""Recipes: a YAML list of stages, the presets that ship, and overriding one setting of one."""

from collections.abc import Hashable, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from decant.errors import nearest, refuse
from decant.stages.stage import validate

# A stage's name becomes a folder's name.
StageName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
_RESERVED = ("teacher", "data")
_MAX_VALUES = 100_000


class Step(BaseModel):
    """One stage of a recipe: which, from what, and its settings (checked later, by the stage itself).

    ``teacher``: an earlier stage that teaches this one in the place of the run's teacher.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True)

    stage: str
    name: StageName = ""
    start: str | None = Field(default=None, alias="from")
    of: tuple[str, ...] | None = None
    teacher: str | None = None
    settings: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        """A stage that was given no name has its kind's."""
        if isinstance(values, dict) and values.get("name") is None:
            return {**values, "name": values.get("stage", "")}
        return values


class Recipe(BaseModel):
    """A recipe: what it makes, where the method is published, and its stages in order.

    ``command``, ``hardware`` and ``expected`` are for people: how to run it, on what, and the figures to
    expect. ``scales`` are lists of overrides, by name: the same recipe for another size of teacher and machine.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    summary: str = ""
    source: str = ""
    teacher_family: str = ""
    command: str = ""
    hardware: str = ""
    expected: str = ""
    seed: int = Field(default=0, ge=0)
    scales: dict[str, tuple[str, ...]] = {}
    stages: tuple[Step, ...] = Field(min_length=1)

    def to_yaml(self) -> str:
        """The recipe as YAML, ready for ``load_recipe``."""
        values = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A recipe: a preset by its name, or a YAML file by its path.

    Raises ``UserError`` with the nearest preset.
    """
    text = str(name_or_path)
    presets = _presets()
    if text in presets:
        return _parse(presets[text].read_text(encoding="utf-8"), f"recipe {text}")
    path = Path(name_or_path)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        path = path / "recipe.yaml"
    if path.is_file():
        return _parse(_read(path), f"recipe {path}")
    if path.suffix in (".yaml", ".yml"):
        raise refuse("recipe", f"no file {text}", allowed="a YAML file that exists, or a preset", hint="check the path")
    allowed = f"a preset ({', '.join(presets) or 'none shipped'}) or the path of a YAML file"
    raise refuse("recipe", f"no recipe {text!r}", allowed=allowed, hint=nearest(text, presets))


def scaled(recipe: Recipe, name: str) -> Recipe:
    """The recipe with the overrides of one of its ``scales``. Raises ``UserError`` with the nearest name."""
    if name not in recipe.scales:
        allowed = ", ".join(recipe.scales) or f"none: {recipe.name} has one scale"
        hint = nearest(name, recipe.scales) if recipe.scales else "leave --scale out"
        raise refuse("--scale", name, allowed=allowed, hint=hint)
    return override(recipe, recipe.scales[name])


def check_wiring(recipe: Recipe, place: str) -> None:
    """Unique names, and every stage starts from the teacher or an earlier stage; else ``UserError``."""
    earlier = ["teacher"]
    for index, step in enumerate(recipe.stages):
        where = f"{place}.stages.{index}"
        if step.name in (*earlier, *_RESERVED):
            hint = "give every stage a `name` of its own"
            raise refuse(where, f"the name {step.name!r} is taken", allowed="unique names", hint=hint)
        for wanted in (step.start, step.teacher, *(step.of or ())):
            if wanted and wanted not in earlier:
                how = "is taught by" if wanted == step.teacher else "starts from"
                value = f"{how} {wanted!r}, which is no earlier stage"
                raise refuse(where, value, allowed=", ".join(earlier), hint=nearest(wanted, earlier))
        earlier.append(step.name)


def list_recipes() -> list[dict[str, str]]:
    """The presets that ship, by name: what ``decant recipes --json`` prints."""
    recipes = [load_recipe(name) for name in _presets()]
    return [
        {"name": r.name, "summary": r.summary, "source": r.source, "teacher_family": r.teacher_family} for r in recipes
    ]


def preset_text(name: str) -> str:
    """The YAML of a preset as it ships, comments and all. Raises ``UserError`` with the nearest name."""
    presets = _presets()
    if name not in presets:
        raise refuse("recipe", f"no preset {name!r}", allowed=", ".join(presets), hint=nearest(name, presets))
    return presets[name].read_text(encoding="utf-8")


def override(recipe: Recipe, assignments: Sequence[str]) -> Recipe:
    """The recipe with settings replaced: ``"distill.steps=400"``, by a stage's name, else all of its kind.

    Values are YAML (``400``, ``[1, 2]``, ``null``); deeper keys are dotted; ``"seed=3"`` sets the recipe's
    seed. Keys are checked with everything else when the stages resolve them. Raises ``UserError``.
    """
    values = recipe.model_dump(by_alias=True)
    for assignment in assignments:
        target, equals, text = assignment.partition("=")
        where, dot, key = target.strip().partition(".")
        if not equals or not where or (not dot and where != "seed") or (dot and not all(key.split("."))):
            raise refuse("--set", assignment, allowed="stage.key=value", hint="for example distill.steps=400")
        value = _yaml(text, f"--set {target}")
        if not dot:
            values["seed"] = value
            continue
        for step in _chosen(values["stages"], where):
            step["settings"] = _with(step["settings"], key.split("."), value)
    return _checked(values, "--set")


def _chosen(steps: Sequence[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The stages that an override means: the one of that name, else all of that kind."""
    named = [step for step in steps if step["name"] == where]
    chosen = named or [step for step in steps if step["stage"] == where]
    if not chosen:
        known = sorted({step["name"] for step in steps} | {step["stage"] for step in steps})
        raise refuse("--set", f"no stage {where!r}", allowed=", ".join(known), hint=nearest(where, known))
    return chosen


def _with(settings: dict[str, Any], keys: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of nested settings with one value replaced."""
    inner = settings.get(keys[0])
    if len(keys) > 1:
        value = _with(inner if isinstance(inner, dict) else {}, keys[1:], value)
    return {**settings, keys[0]: value}


def _presets() -> dict[str, Traversable]:
    folder = resources.files("decant.recipe") / "presets"
    if not folder.is_dir():
        return {}
    files = {file.name.removesuffix(".yaml"): file for file in folder.iterdir() if file.name.endswith(".yaml")}
    return dict(sorted(files.items()))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        hint = "check the path and that the file is text"
        raise refuse("recipe", f"{path} cannot be read", allowed="a YAML file in UTF-8", hint=hint) from error


def _parse(text: str, place: str) -> Recipe:
    values = _yaml(text, place)
    if not isinstance(values, dict):
        hint = "`decant recipes NAME` prints one"
        raise refuse(place, type(values).__name__, allowed="a mapping with `name` and `stages`", hint=hint)
    return _checked(values, place)


def _checked(values: dict[str, Any], place: str) -> Recipe:
    recipe = validate(Recipe, values, place)
    check_wiring(recipe, place)
    return recipe


def _yaml(text: str, place: str) -> Any:
    """YAML of plain values only. Dates and the like, which JSON cannot hold, are refused at once."""
    try:
        value = yaml.load(text, _UniqueKeys)  # a SafeLoader
        _check_plain(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())[:300]
        hint = "check the indentation, and quote text that looks like a date"
        raise refuse(place, problem, allowed="valid YAML of plain values", hint=hint) from None
    return value


def _check_plain(value: Any) -> None:
    """Only what JSON can hold, and not too much of it: aliases of aliases grow without bound."""
    waiting, seen = [value], 0
    while waiting:
        value, seen = waiting.pop(), seen + 1
        if seen > _MAX_VALUES:
            raise ValueError(f"more than {_MAX_VALUES} values")
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif not isinstance(value, str | int | float | None):
            raise ValueError(f"{value!r} is a {type(value).__name__}")


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; here the second is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in own]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.YAMLError(f"the key {twice[0]!r} stands twice, line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep=deep)
