"""Runs the stages of a recipe: each folder complete or absent, finished work reused where it still holds.

In RUN: ``recipe.yaml`` (the resolved recipe, which repeats the run), ``<nn>-<name>/`` for every finished
stage with its record ``decant.json``, and ``.work/`` for what is in progress.
"""

import contextlib
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from decant.data.source import Data, find
from decant.errors import UserError, nearest, refuse
from decant.models.shipped import NAMES, shipped_folder
from decant.ranks import here
from decant.recipe.schema import Recipe, Step, check_wiring
from decant.stages.stage import Inputs, Settings, Stage, validate

_LIBRARIES = ("decant", "torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow")


@dataclass(frozen=True)
class Job:
    """One stage of a resolved recipe: its settings are validated and its inputs named.

    ``teacher``: the name of what teaches it, the run's teacher or an earlier stage.
    """

    number: int
    name: str
    kind: str
    stage: Stage
    settings: Settings
    takes: tuple[str, ...]
    folder: str
    teacher: str = "teacher"


@dataclass(frozen=True)
class _Run:
    """What is the same for every stage of a run; ``models`` and ``fingerprints`` grow as stages finish."""

    teacher: str
    data: Data | None
    seed: int
    out: Path
    work: Path
    command: str
    talk: Callable[[str], None]
    models: dict[str, str | Path]
    fingerprints: dict[str, str]
    cache: Path

    def teacher_of(self, job: Job) -> str:
        """The folder, hub id or name of what teaches a stage."""
        return self.teacher if job.teacher == "teacher" else str(self.models[job.teacher])


def resolve(recipe: Recipe, stages: Mapping[str, Stage]) -> tuple[Job, ...]:
    """The recipe as jobs, with every stage's settings checked and filled in. Runs nothing.

    Raises ``UserError``.
    """
    check_wiring(recipe, f"recipe {recipe.name}")
    jobs: list[Job] = []
    for number, step in enumerate(recipe.stages, start=1):
        place = f"recipe {recipe.name}.stages.{number - 1}"
        if step.stage not in stages:
            hint = nearest(step.stage, stages)
            raise refuse(f"{place}.stage", f"no stage {step.stage!r}", allowed=", ".join(sorted(stages)), hint=hint)
        stage = stages[step.stage]
        settings = validate(stage.settings, step.settings, f"{place}.settings")
        takes = _takes(step, stage, jobs, place)
        folder, taught_by = f"{number:02d}-{step.name}", step.teacher or "teacher"
        if taught_by not in ("teacher", *_pipelines(jobs)):
            raise _no_pipeline(f"{place}.teacher", taught_by, jobs)
        jobs.append(Job(number, step.name, step.stage, stage, settings, takes, folder, taught_by))
    return tuple(jobs)


def run_recipe(
    recipe: Recipe,
    *,
    teacher: str,
    data: Data | None,
    out: Path,
    stages: Mapping[str, Stage],
    talk: Callable[[str], None],
    cache: Path | None = None,
) -> dict[str, Any]:
    """Run a recipe into ``out``, or go on where an earlier run of it stopped.

    ``cache`` keeps what was encoded; by default the run's own ``.work/cache``, which its stages share. Everything is
    checked before anything runs. A finished stage is reused if its settings, seed and the
    fingerprints of what it was made from are unchanged. Returns ``{"out", "command", "stages": [{"name",
    "stage", "folder", "reused", "seconds"}]}``. Raises ``UserError``; finished stages stay in place.
    """
    jobs = resolve(recipe, stages)
    out = Path(out)
    command = _command(teacher, data, out, cache)
    models: dict[str, str | Path] = {"teacher": teacher}
    work = out / ".work"

    def checked() -> dict[str, str]:
        _check_needed(jobs, data)
        check_places(data, out, cache)
        check_own(out, jobs)
        return _prints_of(models, jobs, data)

    prints = here().on_first(checked)
    run = _Run(teacher, data, recipe.seed, out, work, command, talk, models, prints, cache or work / "cache")
    with _alone(run.work / "lock", out):
        here().on_first(lambda: _write_whole(out / "recipe.yaml", _resolved(recipe, jobs, command).to_yaml()))
        done = [_one(job, run, f"[{job.number}/{len(jobs)}] {job.name}") for job in jobs]
    return {"out": str(out), "command": command, "stages": done}


def run_stage(  # noqa: PLR0913 (a stage and everything that decides its outcome)
    kind: str,
    stage: Stage,
    settings: Mapping[str, Any],
    *,
    teacher: str,
    models: Mapping[str, str | Path],
    data: Data | None,
    seed: int,
    out: Path,
    talk: Callable[[str], None],
    cache: Path | None = None,
) -> dict[str, Any]:
    """Run one stage by itself into ``out``, complete or absent, and return its record.

    A finished folder of the same request is reused; partial work waits beside it in ``.<out>.work/``. Raises
    ``UserError`` where ``out`` holds anything else: what is there is never overwritten.
    """
    out = Path(out)
    chosen = validate(stage.settings, dict(settings), kind)
    job = Job(1, kind, kind, stage, chosen, tuple(models), out.name)
    command = shlex.join(["decant", *sys.argv[1:]])
    work = out.parent / f".{out.name}.work"

    def checked() -> dict[str, str]:
        _check_needed((job,), data)
        check_places(data, out, cache)
        return {"teacher": _of_teacher(teacher), **_prints_of(models, (job,), data)}

    prints = here().on_first(checked)
    run = _Run(teacher, data, seed, out.parent, work, command, talk, dict(models), prints, cache or work / "cache")
    here().on_first(lambda: _check_free(out, _request(job, run)))
    with _alone(work / "lock", out):
        _one(job, run, kind)
    return here().on_first(lambda: _tidied(work, out))


def _tidied(work: Path, out: Path) -> dict[str, Any]:
    """The record of a finished stage, whose partial work is no longer needed."""
    shutil.rmtree(work)
    record = _read_json(out / "decant.json")
    assert record is not None, "a finished stage has a record"
    return record


def _check_free(out: Path, request: dict[str, Any]) -> None:
    """A folder for one stage is new, empty, or the finished stage itself."""
    if not out.exists() or not any(out.iterdir()):
        return
    record = _read_json(out / "decant.json")
    differences = "it is no stage of decant" if record is None else _differences(record, request)
    if differences:
        hint = "name another folder, or remove this one"
        raise refuse("--out", f"{out} is not empty: {differences}", allowed="a new folder", hint=hint)


def _command(teacher: str, data: Data | None, out: Path, cache: Path | None) -> str:
    """The command that repeats a run."""
    words = ["decant", "run", str(out / "recipe.yaml"), "--teacher", teacher]
    words += ["--data", str(data)] if data else []
    words += ["--cache", str(cache)] if cache else []
    return shlex.join([*words, "--out", str(out)])


def _prints_of(models: Mapping[str, str | Path], jobs: tuple[Job, ...], data: Data | None) -> dict[str, str]:
    """The fingerprints of what a run begins with: models, and the pictures where a stage sees them."""
    prints = {name: _of_teacher(str(model)) for name, model in models.items()}
    if data is not None and any(job.stage.data != "unused" for job in jobs):
        prints["data"] = find(data).fingerprint()
    return prints


def _takes(step: Step, stage: Stage, earlier: list[Job], place: str) -> tuple[str, ...]:
    """The names of the models a stage works on: those asked for, or the natural ones."""
    allowed = ["teacher", *_pipelines(earlier)]
    if (stage.takes == "one" and step.of is not None) or (stage.takes == "many" and step.start is not None):
        key, other = ("of", "from") if stage.takes == "one" else ("from", "of")
        hint = f"write `{other}:` instead"
        raise refuse(f"{place}.{key}", f"{step.stage} takes {stage.takes}", allowed=f"`{other}`", hint=hint)
    asked = step.of if stage.takes == "many" else (step.start,) if step.start else None
    for name in asked or ():
        if name not in allowed:
            raise _no_pipeline(place, name, earlier)
    if asked is not None:
        return tuple(asked)
    return tuple(allowed) if stage.takes == "many" else (allowed[-1],)


def _pipelines(jobs: Sequence[Job]) -> list[str]:
    """The names of stages that give a pipeline folder."""
    return [job.name for job in jobs if job.stage.gives_pipeline]


def _no_pipeline(place: str, name: str, earlier: Sequence[Job]) -> UserError:
    allowed = ", ".join(["teacher", *_pipelines(earlier)])
    return refuse(place, f"{name!r} gives no pipeline folder", allowed=allowed, hint="name one of these")


def _check_needed(jobs: tuple[Job, ...], data: Data | None) -> None:
    needs = [job.name for job in jobs if job.stage.data == "required"]
    if data is None and needs:
        hint = "add --data, a folder with captions for instance"
        raise refuse("--data", f"not given, and {needs[0]!r} needs pictures", allowed="data", hint=hint)


def check_places(data: Data | None, out: Path, cache: Path | None) -> None:
    """Refuse places that a run cannot work with.

    Raises:
        UserError: data that is not there; an output that is a file, or lies among the pictures.
    """
    folders = find(data).folders if data is not None else ()
    if out.exists() and not out.is_dir():
        raise refuse("--out", f"{out} is a file", allowed="a folder, new or of an earlier run", hint="name another")
    for option, folder in (("--out", out), ("--cache", cache)):
        if folder is not None and any(folder.resolve().is_relative_to(place.resolve()) for place in folders):
            hint = "the run's own files would become data: choose a folder elsewhere"
            raise refuse(option, f"{folder} lies in the data folder", allowed="a folder outside it", hint=hint)


def check_own(out: Path, jobs: tuple[Job, ...]) -> None:
    """What a run would write over must be a run's: nothing of the user's own is ever lost.

    Raises:
        UserError: the folder is a model, or has another ``recipe.yaml``, or other folders where stages go.
    """
    found = None
    if (out / "model_index.json").is_file():
        found = f"{out} is a model"
    recipe = out / "recipe.yaml"
    if recipe.is_file() and "\ncommand:" not in recipe.read_text(encoding="utf-8", errors="replace"):
        found = f"{recipe} was not written by a run"
    for folder in (out / job.folder for job in jobs):
        # Every stage that decant finished has a record, which may be damaged.
        if folder.exists() and not (folder / "decant.json").exists():
            found = f"{folder} is no stage of decant"
    if found:
        hint = "name a new folder, or move away what lies there; nothing was changed"
        raise refuse("--out", found, allowed="a folder, new or of an earlier run", hint=hint)


def _of_teacher(teacher: str) -> str:
    """The fingerprint of a teacher's folder or file; a hub id or a name stands for itself."""
    folder = next((shipped_folder(name) for name in NAMES if name == teacher), Path(teacher))
    return _fingerprint(folder) if folder.exists() else teacher


def _fingerprint(folder: Path) -> str:
    """Of a pipeline folder. The import is late: it brings diffusers, which reading a recipe does not need."""
    from decant.models.load import fingerprint

    return fingerprint(folder)


def _resolved(recipe: Recipe, jobs: tuple[Job, ...], command: str) -> Recipe:
    """The recipe with nothing left to default."""
    steps = []
    for job, step in zip(jobs, recipe.stages, strict=True):
        wiring = {"of": job.takes} if job.stage.takes == "many" else {"start": job.takes[0]}
        steps.append(step.model_copy(update={**wiring, "settings": job.settings.model_dump(mode="json")}))
    return recipe.model_copy(update={"stages": tuple(steps), "command": command})


def _one(job: Job, run: _Run, label: str) -> dict[str, Any]:
    """Bring one stage to completion, or find it complete."""
    final, ranks = run.out / job.folder, here()
    request = _request(job, run)
    before = ranks.on_first(lambda: _seconds_before(final, request, lambda line: run.talk(f"{label}: {line}")))
    seconds = _make(job, run, request, label) if before is None else before
    ranks.on_first(lambda: shutil.rmtree(run.work / job.folder, ignore_errors=True))
    if job.stage.gives_pipeline:
        run.models[job.name] = final
        run.fingerprints[job.name] = ranks.on_first(lambda: _fingerprint(final))
    return {
        "name": job.name, "stage": job.kind, "folder": str(final), "reused": before is not None, "seconds": seconds
    }  # fmt: skip


def _seconds_before(final: Path, request: dict[str, Any], say: Callable[[str], None]) -> float | None:
    """The seconds that a finished folder took which answers this request, or None where none does."""
    old = _read_json(final / "decant.json") if final.is_dir() else None
    differences = _differences(old, request)
    if old is not None and not differences:
        say("finished before, reused")
        return float(old.get("seconds", 0.0))
    if final.exists():
        say(f"made again, since {differences}")
    return None


def _request(job: Job, run: _Run) -> dict[str, Any]:
    """What decides a stage's outcome, as JSON: equal requests give equal folders."""
    taught_by = () if job.teacher == "teacher" else (job.teacher,)
    parents = {"teacher": run.teacher, **{name: str(run.models[name]) for name in (*job.takes, *taught_by)}}
    if job.stage.data != "unused" and run.data is not None:
        parents["data"] = str(run.data)
    listed = {name: {"path": path, "fingerprint": run.fingerprints[name]} for name, path in parents.items()}
    settings = job.settings.model_dump(mode="json")
    request = {"stage": job.kind, "settings": settings, "seed": run.seed, "takes": list(job.takes)}
    request |= {"taught_by": job.teacher} if taught_by else {}
    return json.loads(json.dumps({**request, "parents": listed}))


def _differences(old: dict[str, Any] | None, new: dict[str, Any]) -> str:
    """Why a finished stage does not answer a request, in words; "" where it does."""
    if old is None:
        return "its record cannot be read"
    found = [f"its {key} changed" for key in ("stage", "seed", "takes", "taught_by") if old.get(key) != new.get(key)]
    before, after = _mapping(old.get("settings")), new["settings"]
    for key in sorted({*before, *after}):
        if before.get(key) != after.get(key):
            found.append(f"{key} was {before.get(key)!r} and is {after.get(key)!r}")
    was, now = _prints(_mapping(old.get("parents"))), _prints(new["parents"])
    found += [f"{name} has changed" for name in sorted({*was, *now}) if was.get(name) != now.get(name)]
    return ", ".join(found)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _prints(parents: dict[str, Any]) -> dict[str, Any]:
    """Only the fingerprints: a run that was moved is still the same run."""
    return {name: _mapping(parent).get("fingerprint") for name, parent in parents.items()}


def _make(job: Job, run: _Run, request: dict[str, Any], label: str) -> float:
    """Run a stage into a temporary folder, complete its record, and put it in place. Returns its seconds."""
    work, temporary, ranks = run.work / job.folder, run.work / f"{job.folder}.tmp", here()

    def begin() -> None:
        _prepare_work(work, request, lambda line: run.talk(f"{label}: {line}"))
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        run.talk(f"{label}: {job.kind} of {', '.join(job.takes)}")

    def finish() -> float:
        seconds = round(time.monotonic() - start, 3)
        base = {**_mapping(_read_json(temporary / "decant.json")), **result}
        record = _finished(temporary, {**base, **_record(job, run, request, seconds)}, run.models[job.takes[0]])
        _write_whole(temporary / "decant.json", json.dumps(record, indent=1, allow_nan=False))
        _put(temporary, run.out / job.folder, run.work / f"{job.folder}.old")
        run.talk(f"{label}: done in {seconds:.1f} s")
        return seconds

    ranks.on_first(begin)
    models = {name: run.models[name] for name in job.takes}
    inputs = Inputs(run.teacher_of(job), models, run.data, run.seed, work / "partial", run.talk, run.cache)
    start = time.monotonic()
    try:
        if job.stage.ranks == "all":
            result = job.stage.run(job.settings, replace(inputs, ranks=ranks), temporary)
        else:
            result = ranks.on_first(lambda: job.stage.run(job.settings, inputs, temporary))
        return ranks.on_first(finish)
    finally:
        if ranks.first:
            shutil.rmtree(temporary, ignore_errors=True)


def _finished(folder: Path, record: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """The record of a stage, with what a pipeline folder takes over from its parent; writes that folder's card."""
    if not (folder / "model_index.json").is_file():
        return record
    from decant.models.load import place_of
    from decant.models.safety import carry_safety
    from decant.stages.card import inherited_facts, write_card

    place = place_of(source)
    safety = carry_safety(place, folder)
    whole = {**record, **inherited_facts(source, place), "safety_checker": safety.to_json()}
    write_card(folder, whole)
    return whole


def _prepare_work(work: Path, request: dict[str, Any], say: Callable[[str], None]) -> None:
    """The folder of partial work, emptied unless it was begun for this very request."""
    if work.exists():
        before = _read_json(work / "request.json")
        differences = _differences(before, request)
        if not differences:
            say("goes on from its partial work")
            return
        say(f"its partial work is dropped, since {differences}")
        shutil.rmtree(work)
    (work / "partial").mkdir(parents=True)
    _write_whole(work / "request.json", json.dumps(request))


def _record(job: Job, run: _Run, request: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The runner's part of ``decant.json``; the rest is what the stage returned."""
    versions = {"python": platform.python_version(), **_versions()}
    made = datetime.now(UTC).isoformat(timespec="seconds")
    told = {"name": job.name, "seconds": seconds, "versions": versions, "command": run.command, "made": made}
    return {**request, **told}


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _put(temporary: Path, final: Path, old: Path) -> None:
    """Rename a complete folder into place. Between the two renames the stage is absent, never half there."""
    for file in temporary.rglob("*"):
        _sync(file)
    _sync(temporary)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Let nothing be renamed that the disk does not hold yet."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    temporary.replace(path)


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


@contextlib.contextmanager
def _alone(lock: Path, out: Path) -> Iterator[None]:
    """This run's own folder, held by the first of its ranks for all of them."""
    with contextlib.ExitStack() as stack:
        here().on_first(lambda: stack.enter_context(_locked(lock, out)))
        yield


@contextlib.contextmanager
def _locked(lock: Path, out: Path) -> Iterator[None]:
    """Two runs in one folder would overwrite each other: the second is refused. Ends with the process."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            value = f"{out} is in use by another run"
            hint = "wait for it, or name another folder"
            raise refuse("--out", value, allowed="one run at a time in a folder", hint=hint) from None
        yield
