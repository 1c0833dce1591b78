from pathlib import Path

import pytest
import yaml

from decant.errors import UserError
from decant.recipe.schema import Recipe, list_recipes, load_recipe, override, preset_text

_TEXT = """
name: small
summary: one sentence
stages:
  - stage: prune
    name: cut
    from: teacher
    settings: {student: bk-tiny}
  - stage: distill
    settings: {steps: 100, rate: 1e-4, ema: {decay: 0.99}}
  - {stage: distill, name: more, settings: {steps: 5}}
  - {stage: evaluate, of: [teacher, cut, distill]}
"""


def _recipe(folder: Path, text: str = _TEXT) -> Recipe:
    file = folder / "r.yaml"
    file.write_text(text)
    return load_recipe(file)


def _settings(recipe: Recipe) -> dict[str, dict[str, object]]:
    return {step.name: step.settings for step in recipe.stages}


def test_a_recipe_loads_and_its_yaml_loads_again(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    assert [step.name for step in recipe.stages] == ["cut", "distill", "more", "evaluate"]
    assert recipe.stages[0].start == "teacher" and recipe.stages[3].of == ("teacher", "cut", "distill")
    assert _recipe(tmp_path, recipe.to_yaml()) == recipe


def test_override_by_name_by_kind_and_deep(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    changed = override(recipe, ["cut.student=bk-base", "distill.ema.decay=0.5", "more.list=[1, x]", "seed=3"])
    found = _settings(changed)
    assert found["cut"] == {"student": "bk-base"}
    assert found["distill"] == {"steps": 100, "rate": "1e-4", "ema": {"decay": 0.5}}
    assert found["more"] == {"steps": 5, "list": [1, "x"]} and changed.seed == 3
    assert _settings(recipe)["cut"] == {"student": "bk-tiny"}


def test_override_by_kind_reaches_all_of_that_kind(tmp_path: Path) -> None:
    text = "name: r\nstages:\n  - {stage: distill, name: a}\n  - {stage: distill, name: b}\n"
    changed = override(_recipe(tmp_path, text), ["distill.steps=7", "b.steps=null"])
    assert _settings(changed) == {"a": {"steps": 7}, "b": {"steps": None}}


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("distil.steps=1", "did you mean 'distill'"),
        ("distill.steps", "stage.key=value"),
        ("distill.=1", "stage.key=value"),
        ("steps=1", "stage.key=value"),
        ("distill.steps=[1", "YAML"),
        ("seed=-1", "greater than or equal to 0"),
    ],
)
def test_override_that_makes_no_sense_is_refused(tmp_path: Path, assignment: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        override(_recipe(tmp_path), [assignment])
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: r\nstages:\n  - {stage: a, setings: {}}\n", "stages.0.setings: unknown key"),
        ("name: r\nstages:\n  - {stage: a, setings: {}}\n", "did you mean 'settings'"),
        ("name: r\nstages:\n  - {stage: a, form: teacher}\n", "did you mean 'from'"),
        ("name: r\nstgaes: []\n", "stages: missing"),
        ("name: r\nsumary: x\nstages: [{stage: a}]\n", "did you mean 'summary'"),
        ("name: r\nstages: []\n", "at least 1 item"),
        ("name: r\nname: s\nstages: [{stage: a}]\n", "stands twice"),
        ("name: r\nstages: [{stage: a}, {stage: a}]\n", "the name 'a' is taken"),
        ("name: r\nstages: [{stage: a, name: teacher}]\n", "the name 'teacher' is taken"),
        ("name: r\nstages: [{stage: a, name: ../b}]\n", "pattern"),
        ("name: r\nstages: [{stage: a, name: cut}, {stage: b, from: cat}]\n", "did you mean 'cut'"),
        ("name: r\nstages: [{stage: a, from: b}, {stage: b}]\n", "no earlier stage"),
        ("name: r\nstages: [{stage: a, settings: {x: 2024-01-01}}]\n", "looks like a date"),
        ("name: [r\n", "valid YAML"),
        ("- a\n- b\n", "a mapping with `name`"),
        ("", "a mapping with `name`"),
        ("!!python/object/apply:os.getcwd []\n", "valid YAML"),
    ],
)
def test_recipes_with_mistakes_are_refused_in_place(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        _recipe(tmp_path, text)
    assert words in str(refused.value) and "hint:" in str(refused.value)


def test_aliases_of_aliases_do_not_grow_without_bound(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(UserError, match="more than"):
        _recipe(tmp_path, "\n".join(lines))


def test_merge_keys_work(tmp_path: Path) -> None:
    stages = "[{stage: a, settings: &s {x: 1, y: 2}}, {stage: b, settings: {<<: *s, y: 3}}]"
    text = f"name: r\nstages: {stages}\n"
    assert _settings(_recipe(tmp_path, text))["b"] == {"x": 1, "y": 3}


def test_an_unknown_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no recipe 'nothing-like-it'"):
        load_recipe("nothing-like-it")
    with pytest.raises(UserError, match="no file"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(tmp_path / "binary.yaml")
    with pytest.raises(UserError, match="no preset"):
        preset_text("nothing-like-it")


def test_every_preset_loads_and_tells_what_people_need() -> None:
    for listed in list_recipes():
        recipe = load_recipe(listed["name"])
        values = yaml.safe_load(preset_text(listed["name"]))
        assert recipe.name == listed["name"] == values["name"]
        told = (recipe.summary, recipe.source, recipe.teacher_family, recipe.command, recipe.hardware)
        assert all(told) and recipe.expected


def test_a_near_miss_of_a_preset_is_named() -> None:
    for listed in list_recipes():
        with pytest.raises(UserError, match="did you mean"):
            load_recipe(listed["name"] + "x")
