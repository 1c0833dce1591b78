"""The runner with real stage functions that write files; nothing here needs a model."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import Field

from decant.errors import UserError
from decant.recipe.runner import resolve, run_recipe, run_stage
from decant.recipe.schema import Recipe, load_recipe
from decant.stages.stage import Inputs, Settings, Stage
from processes import doing


class Cut(Settings):
    word: str = "cut"
    times: int = Field(default=1, ge=1)


class Count(Settings):
    steps: int = 6
    pause: float = 0.0
    fail: bool = False


def cut(settings: Cut, inputs: Inputs, out: Path) -> dict[str, Any]:
    """A stage that writes its word after what its source says."""
    source = Path(inputs.source) / "weights.txt"
    text = source.read_text() + settings.word * settings.times
    (out / "weights.txt").write_text(text)
    (out / "model_index.json").write_text("{}")
    return {"letters": len(text)}


def count(settings: Count, inputs: Inputs, out: Path) -> dict[str, Any]:
    """A stage of many steps that keeps its place in its work folder."""
    place = inputs.work / "step.txt"
    first = int(place.read_text()) if place.exists() else 0
    for step in range(first, settings.steps):
        time.sleep(settings.pause)
        if settings.fail and step == 3:
            raise UserError("the user asked for it")
        with (inputs.work / "log.txt").open("a") as log:
            log.write(f"{step}\n")
        (inputs.work / "next.txt").write_text(str(step + 1))
        (inputs.work / "next.txt").replace(place)
    (out / "weights.txt").write_text((Path(inputs.source) / "weights.txt").read_text() + f"+{settings.steps}")
    (out / "steps.txt").write_text((inputs.work / "log.txt").read_text())
    return {"began_at": first}


def learn(settings: Cut, inputs: Inputs, out: Path) -> dict[str, Any]:
    """A stage that writes what its teacher says after what its source says."""
    source, teacher = ((Path(place) / "weights.txt").read_text() for place in (inputs.source, inputs.teacher))
    (out / "weights.txt").write_text(f"{source}<{teacher}")
    return {}


def judge(settings: Cut, inputs: Inputs, out: Path) -> dict[str, Any]:
    """A stage of many inputs."""
    read = {name: (Path(model) / "weights.txt").read_text() for name, model in inputs.models.items()}
    (out / "read.json").write_text(json.dumps(read))
    return {"pictures": len(list(inputs.data.iterdir())) if inputs.data else 0}


STAGES = {
    "cut": Stage(Cut, cut),
    "count": Stage(Count, count),
    "learn": Stage(Cut, learn),
    "judge": Stage(Cut, judge, takes="many", gives_pipeline=False, data="optional"),
    "needy": Stage(Cut, judge, takes="many", gives_pipeline=False, data="required"),
}


def _recipe(**settings: dict[str, Any]) -> Recipe:
    names = {"first": "cut", "count": "count", "judge": "judge"}
    steps = [{"stage": kind, "name": name, "settings": settings.get(name, {})} for name, kind in names.items()]
    return Recipe.model_validate({"name": "test", "stages": steps})


def _teacher(folder: Path) -> str:
    (folder / "teacher").mkdir(exist_ok=True)
    (folder / "teacher" / "weights.txt").write_text("T")
    return str(folder / "teacher")


def _run(folder: Path, recipe: Recipe, data: Path | None = None) -> tuple[dict[str, bool], str]:
    """Run into folder/run; which stages were reused, and what was said."""
    said: list[str] = []
    teacher = str(folder / "teacher")
    result = run_recipe(recipe, teacher=teacher, data=data, out=folder / "run", stages=STAGES, talk=said.append)
    return {stage["name"]: stage["reused"] for stage in result["stages"]}, "\n".join(said)


def test_stages_run_in_order_and_leave_complete_records(tmp_path: Path) -> None:
    _teacher(tmp_path)
    _run(tmp_path, _recipe(first={"times": 2}))
    run = tmp_path / "run"
    assert sorted(path.name for path in run.iterdir()) == [
        ".work",
        "01-first",
        "02-count",
        "03-judge",
        "recipe.yaml",
    ]
    assert json.loads((run / "03-judge/read.json").read_text()) == {
        "teacher": "T",
        "first": "Tcutcut",
        "count": "Tcutcut+6",
    }
    record = json.loads((run / "01-first/decant.json").read_text())
    assert record["stage"] == "cut" and record["settings"] == {"word": "cut", "times": 2} and record["letters"] == 7
    assert len(record["parents"]["teacher"]["fingerprint"]) == 64
    assert {"seconds", "versions", "command", "seed"} <= set(record) and "torch" in record["versions"]
    assert sorted(path.name for path in (run / ".work").iterdir()) == ["lock"]


def test_the_resolved_recipe_repeats_the_run(tmp_path: Path) -> None:
    _teacher(tmp_path)
    _run(tmp_path, _recipe(first={"times": 3}))
    written = load_recipe(tmp_path / "run")
    assert written.stages[0].settings == {"word": "cut", "times": 3} and written.stages[1].start == "first"
    assert written.stages[2].of == ("teacher", "first", "count")
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["command"].startswith("decant run ")
    assert set(_run(tmp_path, written)[0].values()) == {True}


def test_only_what_changed_is_made_again(tmp_path: Path) -> None:
    _teacher(tmp_path)
    _run(tmp_path, _recipe())
    assert _run(tmp_path, _recipe())[0] == {"first": True, "count": True, "judge": True}
    reused, said = _run(tmp_path, _recipe(count={"steps": 7}))
    assert reused == {"first": True, "count": False, "judge": False}
    assert "steps was 6 and is 7" in said and "count has changed" in said
    assert (tmp_path / "run/02-count/weights.txt").read_text() == "Tcut+7"


def test_a_changed_parent_remakes_what_came_from_it(tmp_path: Path) -> None:
    _teacher(tmp_path)
    _run(tmp_path, _recipe())
    (tmp_path / "teacher/weights.txt").write_text("U")
    reused, said = _run(tmp_path, _recipe())
    assert not any(reused.values()) and "teacher has changed" in said
    assert (tmp_path / "run/02-count/weights.txt").read_text() == "Ucut+6"


def test_an_earlier_stage_can_teach(tmp_path: Path) -> None:
    """In the place of the run's teacher; a stage is made again when what taught it changes, and only then."""
    _teacher(tmp_path)

    def recipe(**first: Any) -> Recipe:
        return _steps(
            {"stage": "cut", "name": "first", "settings": first},
            {"stage": "cut", "name": "second", "from": "teacher"},
            {"stage": "learn", "name": "taught", "from": "second", "teacher": "first"},
            {"stage": "learn", "name": "usual", "from": "second"},
        )

    _run(tmp_path, recipe())
    folder = tmp_path / "run"
    words = {name: (folder / name / "weights.txt").read_text() for name in ("03-taught", "04-usual")}
    assert words == {"03-taught": "Tcut<Tcut", "04-usual": "Tcut<T"}
    record = json.loads((folder / "03-taught/decant.json").read_text())
    assert record["taught_by"] == "first" and set(record["parents"]) == {"teacher", "second", "first"}
    again = load_recipe(folder)
    assert [step.teacher for step in again.stages] == [None, None, "first", None]
    assert all(_run(tmp_path, again)[0].values()), "the resolved recipe asks for the same"
    reused, _ = _run(tmp_path, recipe(word="other"))
    assert reused == {"first": False, "second": True, "taught": False, "usual": True}
    reused, said = _run(
        tmp_path, _steps(*({**step.model_dump(by_alias=True), "teacher": None} for step in again.stages))
    )
    assert not reused["taught"] and "its taught_by changed" in said


def test_a_student_edited_by_hand_is_kept_and_its_children_remade(tmp_path: Path) -> None:
    _teacher(tmp_path)
    _run(tmp_path, _recipe())
    (tmp_path / "run/01-first/weights.txt").write_text("mine")
    assert _run(tmp_path, _recipe())[0] == {"first": True, "count": False, "judge": False}
    assert (tmp_path / "run/02-count/weights.txt").read_text() == "mine+6"


def test_a_parent_that_comes_out_the_same_costs_nothing_more(tmp_path: Path) -> None:
    _teacher(tmp_path)
    _run(tmp_path, _recipe(first={"word": "aa", "times": 1}))
    reused, _ = _run(tmp_path, _recipe(first={"word": "a", "times": 2}))
    assert reused == {"first": False, "count": True, "judge": True}


def test_other_pictures_remake_only_the_stages_that_see_them(tmp_path: Path) -> None:
    _teacher(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text("one")
    _run(tmp_path, _recipe(), data)
    (data / "a.txt").write_text("two")
    assert _run(tmp_path, _recipe(), data)[0] == {"first": True, "count": True, "judge": False}


def test_a_lost_record_and_another_seed_remake(tmp_path: Path) -> None:
    _teacher(tmp_path)
    _run(tmp_path, _recipe())
    (tmp_path / "run/01-first/decant.json").write_text("{")
    reused, said = _run(tmp_path, _recipe())
    assert not reused["first"] and "record cannot be read" in said
    assert not any(_run(tmp_path, _recipe().model_copy(update={"seed": 1}))[0].values())


def test_a_users_error_keeps_finished_stages_and_partial_work(tmp_path: Path) -> None:
    _teacher(tmp_path)
    with pytest.raises(UserError, match="asked for it"):
        _run(tmp_path, _recipe(count={"fail": True}))
    run = tmp_path / "run"
    assert (run / "01-first/decant.json").is_file() and not (run / "02-count").exists()
    assert (run / ".work/02-count/partial/step.txt").read_text() == "3"
    reused, said = _run(tmp_path, _recipe(count={"fail": False}))
    assert reused["first"] and "partial work is dropped, since fail was True and is False" in said
    assert json.loads((run / "02-count/decant.json").read_text())["began_at"] == 0


def test_a_remake_that_fails_leaves_the_old_stage(tmp_path: Path) -> None:
    _teacher(tmp_path)
    _run(tmp_path, _recipe())
    with pytest.raises(UserError):
        _run(tmp_path, _recipe(count={"fail": True}))
    assert (tmp_path / "run/02-count/weights.txt").read_text() == "Tcut+6"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"judge": {"wrod": "x"}}, ["stages.2.settings.wrod: unknown key", "did you mean 'word'"]),
        ({"judge": {"times": 0}}, ["stages.2.settings.times: 0", "greater than or equal to 1"]),
        ({"count": {"pause": float("nan")}}, ["stages.1.settings.pause: nan"]),
    ],
)
def test_all_settings_are_checked_before_anything_runs(
    tmp_path: Path, settings: dict[str, Any], words: list[str]
) -> None:
    _teacher(tmp_path)
    with pytest.raises(UserError) as refused:
        _run(tmp_path, _recipe(**settings))
    assert all(word in str(refused.value) for word in words)
    assert not (tmp_path / "run").exists()


def _steps(*steps: dict[str, Any]) -> Recipe:
    return Recipe.model_validate({"name": "test", "stages": steps})


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([{"stage": "cutt"}], "did you mean 'cut'"),
        ([{"stage": "cut", "of": ["teacher"]}], "write `from:` instead"),
        ([{"stage": "judge", "from": "teacher"}], "write `of:` instead"),
        ([{"stage": "judge"}, {"stage": "cut", "from": "judge"}], "gives no pipeline folder"),
        ([{"stage": "judge"}, {"stage": "learn", "teacher": "judge"}], "stages.1.teacher: 'judge' gives no pipeline"),
        ([{"stage": "learn", "teacher": "later"}, {"stage": "cut", "name": "later"}], "is taught by 'later'"),
    ],
)
def test_wiring_that_makes_no_sense_is_refused(steps: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(UserError) as refused:
        resolve(_steps(*steps), STAGES)
    assert words in str(refused.value)


def test_by_default_a_stage_starts_from_the_last_pipeline() -> None:
    steps = [
        {"stage": "cut"},
        {"stage": "judge"},
        {"stage": "count"},
        {"stage": "cut", "name": "b", "from": "teacher"},
    ]
    assert [job.takes for job in resolve(_steps(*steps), STAGES)] == [
        ("teacher",),
        ("teacher", "cut"),
        ("cut",),
        ("teacher",),
    ]


def test_places_that_cannot_work_are_refused(tmp_path: Path) -> None:
    _teacher(tmp_path)
    (tmp_path / "file").write_text("")
    common: dict[str, Any] = {"teacher": str(tmp_path / "teacher"), "stages": STAGES, "talk": print}
    with pytest.raises(UserError, match="needs pictures"):
        run_recipe(_steps({"stage": "needy"}), data=None, out=tmp_path / "run", **common)
    with pytest.raises(UserError, match="does not exist"):
        run_recipe(_recipe(), data=tmp_path / "absent", out=tmp_path / "run", **common)
    with pytest.raises(UserError, match="is a file"):
        run_recipe(_recipe(), data=None, out=tmp_path / "file", **common)
    with pytest.raises(UserError, match="lies in the data folder"):
        run_recipe(_recipe(), data=tmp_path, out=tmp_path / "run", **common)


def _alone(folder: Path, out: Path, **settings: Any) -> dict[str, Any]:
    teacher = str(folder / "teacher")
    models: dict[str, str | Path] = {"t": teacher}
    return run_stage(
        "count",
        STAGES["count"],
        settings,
        teacher=teacher,
        models=models,
        data=None,
        seed=1,
        out=out,
        talk=lambda line: None,
    )


def test_one_stage_by_itself_is_complete_or_absent_and_goes_on(tmp_path: Path) -> None:
    _teacher(tmp_path)
    out = tmp_path / "alone"
    with pytest.raises(UserError, match="asked for it"):
        _alone(tmp_path, out, fail=True)
    assert not out.exists() and (tmp_path / ".alone.work/alone/partial/step.txt").is_file()
    record = _alone(tmp_path, out)
    assert record["stage"] == "count" and record["seed"] == 1 and set(record["parents"]) == {"teacher", "t"}
    assert (out / "weights.txt").read_text() == "T+6"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "teacher"]
    assert _alone(tmp_path, out) == record


def test_one_stage_never_overwrites_what_is_there(tmp_path: Path) -> None:
    _teacher(tmp_path)
    out = tmp_path / "mine"
    out.mkdir()
    _alone(tmp_path, out)
    with pytest.raises(UserError, match="steps was 6 and is 7"):
        _alone(tmp_path, out, steps=7)
    with pytest.raises(UserError, match="no stage of decant"):
        _alone(tmp_path, tmp_path / "teacher")
    with pytest.raises(UserError, match=r"count.stesp: unknown key"):
        _alone(tmp_path, out, stesp=7)
    assert (out / "weights.txt").read_text() == "T+6"


def _slow_run(folder: Path) -> None:
    _run(folder, _recipe(count={"steps": 12, "pause": 0.03}))


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    _teacher(tmp_path)
    place = tmp_path / "run/.work/02-count/partial/step.txt"
    wait = random.Random(0)
    for wanted in (2, 6, 9):
        process = doing(__file__, "_slow_run", tmp_path)
        while not (place.exists() and int(place.read_text()) >= wanted):
            assert process.is_alive(), "the run ended before it could be killed"
            time.sleep(0.002)
        time.sleep(wait.random() * 0.03)
        process.kill()
        process.join()
        assert (tmp_path / "run/01-first/decant.json").is_file()
        assert not (tmp_path / "run/02-count").exists()
    stopped = int(place.read_text())
    reused, said = _run(tmp_path, _recipe(count={"steps": 12, "pause": 0.03}))
    assert reused == {"first": True, "count": False, "judge": False} and "goes on from its partial work" in said
    assert json.loads((tmp_path / "run/02-count/decant.json").read_text())["began_at"] == stopped
    # A kill between the log and the counter may write a step's line twice; none is missing or out of order.
    lines = [int(line) for line in (tmp_path / "run/02-count/steps.txt").read_text().split()]
    assert sorted(set(lines)) == list(range(12)) and lines == sorted(lines) and len(lines) <= 15


@pytest.mark.slow
def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    _teacher(tmp_path)
    process = doing(__file__, "_slow_run", tmp_path)
    try:
        while not (tmp_path / "run/.work/02-count").exists():
            time.sleep(0.002)
        with pytest.raises(UserError, match="in use by another run"):
            _run(tmp_path, _recipe())
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("name", ["01-first/own.txt", "recipe.yaml", "model_index.json"])
def test_nothing_of_the_users_own_is_written_over(tmp_path: Path, name: str) -> None:
    _teacher(tmp_path)
    own = tmp_path / "run" / name
    own.parent.mkdir(parents=True)
    own.write_text("name: mine\nstages: []\n")
    with pytest.raises(UserError, match=r"--out: .*\n.*new or of an earlier run"):
        _run(tmp_path, _recipe())
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == [own]
    assert own.read_text() == "name: mine\nstages: []\n"
