"""What the verbs do: recipes with their reports, and single stages into a folder."""

import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from decant.cli.memory import give_back_freed_memory
from decant.data.source import Data
from decant.errors import refuse
from decant.models.device import Device, pick
from decant.ranks import here
from decant.recipe.runner import check_own, check_places, resolve, run_recipe, run_stage
from decant.recipe.schema import Recipe, Step, load_recipe, override, scaled
from decant.report.collect import collect
from decant.report.page import write_report
from decant.stages.all import STAGES

Talk = Callable[[str], None]
QUICKSTART_PICTURES = 2000


def run_and_report(  # noqa: PLR0913 (what a command line can say of a run)
    recipe: str,
    *,
    teacher: str,
    data: Data | None,
    out: Path,
    sets: Sequence[str],
    talk: Talk,
    cache: Path | None = None,
    device: Device | None = None,
    scale: str | None = None,
    fit: str | None = None,
) -> dict[str, Any]:
    """Run a recipe; where it evaluates, also write ``report.json`` and ``report.html``.

    ``student`` is the folder of the last stage that gives a pipeline, None where no stage does.
    """
    chosen = _fitted(_chosen(recipe, sets, device, scale), teacher, fit, talk)
    done = run_recipe(chosen, teacher=teacher, data=data, out=out, stages=STAGES, talk=talk, cache=cache)
    evaluated = any(step.stage == "evaluate" for step in chosen.stages)
    students = [Path(stage["folder"]) for stage in done["stages"] if STAGES[stage["stage"]].gives_pipeline]
    report = here().on_first(lambda: str(rebuild_report(out))) if evaluated else None
    return {**done, "report": report, "student": str(students[-1]) if students else None}


def student_of(done: Mapping[str, Any]) -> Path:
    """The folder of a run's last student.

    Raises:
        UserError: its recipe makes none.
    """
    if done["student"] is None:
        hint = "push a run that prunes or distils"
        raise refuse("--push-to-hub", "the recipe makes no student", allowed="a recipe that makes one", hint=hint)
    return Path(done["student"])


def resolved(  # noqa: PLR0913 (what a command line can say of a run)
    recipe: str,
    sets: Sequence[str],
    *,
    teacher: str,
    data: Data | None,
    out: Path,
    talk: Talk,
    device: Device | None = None,
    scale: str | None = None,
    fit: str | None = None,
) -> dict[str, Any]:
    """The recipe with every setting filled in and what it wants of the machine, as a document and as YAML."""
    from decant.recipe.forecast import forecast, told

    chosen = _fitted(_chosen(recipe, sets, device, scale), teacher, fit, talk)
    jobs = resolve(chosen, STAGES)
    check_places(data, out, None)
    check_own(out, jobs)
    document = {
        "name": chosen.name,
        "stages": [
            {
                "name": job.name,
                "stage": job.kind,
                "takes": list(job.takes),
                "settings": job.settings.model_dump(mode="json"),
            }
            for job in jobs
        ],
    }
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    wanted = forecast(jobs, teacher, data, out)
    return {**document, **wanted, "yaml": f"{text}{told(wanted)}"}


def _chosen(recipe: str, sets: Sequence[str], device: Device | None, scale: str | None) -> Recipe:
    """A recipe with what the command line changes in it; a device that is not here is refused at once."""
    chosen = load_recipe(recipe)
    if scale is not None:
        chosen = scaled(chosen, scale)
    if device is not None:
        pick(device)
        computing = [step for step in chosen.stages if "device" in _settings_of_kind(step.stage)]
        chosen = override(chosen, [f"{step.name}.device={device}" for step in computing])
    return override(chosen, sets)


def _fitted(recipe: Recipe, teacher: str, fit: str | None, talk: Talk) -> Recipe:
    """The recipe as it is, or with distillations that fit into so much memory."""
    if fit is None:
        return recipe
    from decant.recipe.fitting import fitted
    from decant.stages.fit import megabytes

    limit_mb = megabytes(fit)
    give_back_freed_memory()
    return here().on_first(lambda: fitted(recipe, STAGES, teacher, limit_mb, talk))


def fit_one(settings: Mapping[str, Any], student: str, teacher: str, fit: str | None, talk: Talk) -> dict[str, Any]:
    """The settings of a distillation as they are, or such that it fits into so much memory."""
    if fit is None:
        return dict(settings)
    from decant.models.load import condition_tokens, unet_config
    from decant.models.surgery.surgery import skeleton
    from decant.stages.distill_settings import Distill
    from decant.stages.fit import Pair, megabytes
    from decant.stages.fit import fit as fit_into
    from decant.stages.record import surgery_map_of
    from decant.stages.stage import validate

    limit_mb = megabytes(fit)
    give_back_freed_memory()
    checked = validate(Distill, settings, "distill")
    mine, theirs = (dict(skeleton(unet_config(model)).config) for model in (student, teacher))
    pair = Pair(mine, theirs, surgery_map_of(student), condition_tokens(teacher))
    found = here().on_first(lambda: fit_into(checked, pair, limit_mb, talk))
    return {**settings, **found.changes}


def _settings_of_kind(kind: str) -> Mapping[str, Any]:
    return STAGES[kind].settings.model_fields if kind in STAGES else {}


def on_device(settings: Mapping[str, Any], device: Device | None) -> dict[str, Any]:
    """Settings of one stage on a device, where one was asked for; refused at once where it is not here."""
    if device is None:
        return dict(settings)
    pick(device)
    return {**settings, "device": device}


def rebuild_report(run: Path) -> Path:
    """``report.json`` and ``report.html`` from a run's records; of a comparison its page and grids."""
    if not run.is_dir():
        raise refuse("run", f"{run} is no folder", allowed="the folder of a run", hint="check the path")
    if (run / "compare.json").is_file():
        from decant.report.compare_page import write_comparison

        return write_comparison(run)
    collect(run)
    return write_report(run)


def quickstart(out: Path, *, full: bool, talk: Talk, device: Device | None = None) -> dict[str, Any]:
    """Draw the pictures, run the quickstart preset on the shipped teacher, and write the report."""
    from decant.scenes.folder import draw_folder

    if device is not None:
        pick(device)
    data = out / "data"

    def drawn() -> None:
        if not (data / "metadata.jsonl").is_file():
            talk(f"drawing {QUICKSTART_PICTURES} scenes into {data}")
            draw_folder(data, QUICKSTART_PICTURES, "train")

    here().on_first(drawn)
    name = "quickstart-full" if full else "quickstart"
    return run_and_report(name, teacher="scenes", data=data, out=out, sets=(), talk=talk, device=device)


def prune_settings(
    student: str, *, rule: str, importance: Path | None, channels: str, sets: Sequence[str]
) -> dict[str, Any]:
    """Settings of the prune stage: a student by its name, or described in a file."""
    from decant.stages.description import read_description

    file = Path(student)
    named = file.suffix in (".yaml", ".yml", ".json")
    which = {"keep": read_description(file)} if named else {"student": student}
    chosen = {"rule": rule, "channels": channels, "importance": str(importance) if importance else None}
    return {**which, **chosen, **settings_of("prune", sets)}


def preview_prune(teacher: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Counts, changes and the layer map of a cut, from configs alone."""
    from decant.models.load import condition_tokens, unet_config
    from decant.stages.prune import Prune, preview
    from decant.stages.stage import validate

    checked = validate(Prune, settings, "prune")
    found = preview(unet_config(teacher), checked, condition_tokens(teacher))
    return {"teacher": teacher, "student": checked.name, **found}


def measure_importance(
    teacher: str,
    *,
    data: Data,
    out: Path,
    pictures: int,
    repeats: int,
    seed: int,
    device: Device | None,
    talk: Talk,
) -> dict[str, Any]:
    """Every removable part of a teacher: damage and cost, also as files in ``out``."""
    from decant.stages.importance import importance
    from decant.stages.stage import Inputs

    for name, value in (("--pictures", pictures), ("--repeats", repeats)):
        if value < 1:
            raise refuse(name, value, allowed="1 or more", hint="32 pictures and 5 repeats are enough")
    with tempfile.TemporaryDirectory() as work:
        inputs = Inputs(teacher, {"teacher": teacher}, data, seed, Path(work), talk)
        return importance(inputs, out, pictures=pictures, repeats=repeats, device=device or "auto")


def export_single_file(model: str, out: Path) -> None:
    """A model as one file, in the dtype that it is stored in."""
    from decant.models.load import load, stored_dtype
    from decant.models.single_file import write_single_file

    if out.suffix != ".safetensors":
        raise refuse("--out", out, allowed="a file name that ends in .safetensors", hint=f"{out}.safetensors")
    if out.exists():
        raise refuse("--out", f"{out} exists", allowed="a new file", hint="name another, or remove this one")
    write_single_file(load(model, dtype=stored_dtype(model)), out)


def settings_of(kind: str, sets: Sequence[str]) -> dict[str, Any]:
    """``key=value`` words as settings of one stage; ``kind.key=value`` is understood too."""
    alone = Recipe(name=kind, stages=(Step(stage=kind, name=kind),))
    words = [word if word.startswith(f"{kind}.") else f"{kind}.{word}" for word in sets]
    return dict(override(alone, words).stages[0].settings)


def one_stage(  # noqa: PLR0913 (a stage and everything that decides its outcome)
    kind: str,
    settings: Mapping[str, Any],
    *,
    teacher: str,
    models: Mapping[str, str | Path],
    out: Path,
    talk: Talk,
    data: Data | None = None,
    seed: int = 0,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Run one stage into ``out``, complete or absent; gives its record."""
    return run_stage(
        kind,
        STAGES[kind],
        settings,
        teacher=teacher,
        models=models,
        data=data,
        seed=seed,
        out=out,
        talk=talk,
        cache=cache,
    )


def bench_models(models: Sequence[str], talk: Talk, **conditions: Any) -> dict[str, Any]:
    """Measure models under the conditions of ``decant.stages.bench.How``, by name."""
    from decant.bench.machine import machine
    from decant.stages.bench import How, bench
    from decant.stages.record import drawing_of

    if not models:
        raise refuse("models", "none", allowed="one or more", hint="decant bench scenes, or a pipeline folder")
    for key, least in (("repeats", 1), ("warmup", 0), ("batch_size", 0)):
        if conditions.get(key, least) < least:
            hint = "5 repeats after 1 untimed round give a median and a spread"
            raise refuse(f"--{key.replace('_', '-')}", conditions[key], allowed=f"{least} or more", hint=hint)
    named, drawn = _named(models), ("steps", "guidance_scale", "sampler")
    asked = {key: conditions.pop(key) for key in drawn if key in conditions and conditions[key] is not None}
    conditions = {key: value for key, value in conditions.items() if key not in drawn}
    recorded = {name: how.to_json() for name, model in named.items() if (how := drawing_of(model))}
    own = {name: How(**{**conditions, **how, **asked}) for name, how in recorded.items()}
    found = bench(named, How(**conditions, **asked), talk, own)
    return {"machine": machine(), "models": [{"name": name, **entry} for name, entry in found.items()]}


def _named(models: Sequence[str], **first: str) -> dict[str, str | Path]:
    """Models by the last part of their path, made unique, behind those that have a name."""
    named: dict[str, str | Path] = {**first}
    for model in models:
        name = Path(model).name or model
        named[name if name not in named else f"{name}-{len(named)}"] = model
    return named


def compare_and_report(  # noqa: PLR0913 (what is compared, and on what)
    students: Sequence[str],
    settings: Mapping[str, Any],
    *,
    teacher: str,
    prompt: Sequence[str],
    prompts_file: Path | None,
    prompts: int | None,
    sets: Sequence[str],
    out: Path,
    blind_pairs: int | None,
    talk: Talk,
) -> dict[str, Any]:
    """Compare students with their teacher into ``out``, with pages, grids and, for ``blind_pairs``, a blind test."""
    from decant.report.compare_page import write_comparison
    from decant.stages.compare import Compare, check_place, compare
    from decant.stages.compare_prompts import prompts_of
    from decant.stages.stage import validate

    check_place(out)
    if blind_pairs is not None and blind_pairs < 1:
        hint = "40 are the default"
        raise refuse("--blind-pairs", blind_pairs, allowed="1 or more", hint=hint)
    checked = validate(Compare, {**settings, "own": _by_model(sets)}, "compare")
    asked = prompts_of(prompt, prompts_file, prompts, teacher, talk)
    document = compare(teacher, students, asked, checked, out, talk, command=_typed_command())
    write_comparison(out)
    if blind_pairs is not None:
        from decant.report.blind_page import write_blind
        from decant.stages.blind import write_key

        write_key(out, blind_pairs)
        talk(f"blind test: {write_blind(out)}; keep blind-key.json to yourself")
    return document


def _by_model(sets: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``NAME.key=value`` words by name; a name may have dots in it."""
    found: dict[str, dict[str, Any]] = {}
    for word in sets:
        target, equals, text = word.partition("=")
        name, dot, key = target.strip().rpartition(".")
        if not (equals and dot and name and key):
            raise refuse("--set", word, allowed="MODEL.key=value", hint="for example tiny.guidance_scale=1")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise refuse(f"--set {target}", text, allowed="a YAML value", hint=str(error).splitlines()[0]) from None
        found.setdefault(name, {})[key] = value
    return found


def _typed_command() -> str:
    return shlex.join(["decant", *sys.argv[1:]])


def evaluate_and_report(
    models: Sequence[str],
    settings: Mapping[str, Any],
    *,
    teacher: str,
    data: Data | None,
    out: Path,
    talk: Talk,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Score models beside their teacher into ``out``, with a report."""
    named = _named(models, teacher=teacher)
    one_stage("evaluate", settings, teacher=teacher, models=named, data=data, out=out, talk=talk, cache=cache)
    here().on_first(lambda: rebuild_report(out))
    return yaml.safe_load((out / "report.json").read_text(encoding="utf-8"))


def count_votes(out: Path, votes: Sequence[Path]) -> dict[str, Any]:
    """What people preferred on the blind page of a comparison."""
    from decant.stages.blind import preferences

    return preferences(out, votes)
