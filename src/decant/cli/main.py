"""The command line: thin verbs. Stdout is data, stderr is talk; status 0 done, 2 the user's mistake, 1 ours."""

import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from decant import __version__
from decant.cli.memory import keep_freed_memory
from decant.errors import UserError, disk_full
from decant.models.samplers import Sampler
from decant.models.surgery.keep import BlockRule, ChannelRule
from decant.ranks import ElsewhereError, alone, here, lost
from decant.stages.interrupt import Interrupted, interruptible

app = App(
    name="decant",
    help="Pour a big diffusion model into a small one, and prove what was kept.",
    version=__version__,
    suppress_keyboard_interrupt=False,  # main says how to go on
)
scenes_app = App(name="scenes", help="The embedded world: draw it, or train its teacher.")
app.command(scenes_app)

Device = Literal["auto", "cpu", "cuda", "mps"]
_SHARED = ("run", "distill", "consistency", "dmd", "decoder", "evaluate", "quickstart")  # by all ranks of a launcher
Sets = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set", help="stage.key=value; may be given again", consume_multiple=True, negative="", show_default=False
    ),
]
OfModel = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set",
        help="MODEL.key=value, for one model: sampler, guidance_scale, steps; may be given again",
        consume_multiple=True,
        negative="",
        show_default=False,
    ),
]
Json = Annotated[bool, Parameter(name="--json", negative="", help="print one JSON document on stdout")]


def talk(line: str) -> None:
    """One line for people, on stderr; of several ranks the first talks."""
    if not here().first:
        return
    with suppress(OSError):  # no terminal any more: work that is worth saving goes on
        print(line, file=sys.stderr, flush=True)


def say(document: Any, as_json: bool, text: str) -> None:
    """The result on stdout: one JSON document, or the text."""
    if not here().first:
        return
    print(json.dumps(document, indent=1, default=str) if as_json else text)


@app.command
def quickstart(
    *, out: Path = Path("runs/quickstart"), full: bool = False, device: Device | None = None, json: Json = False
) -> None:
    """The whole way on the shipped scenes teacher: cut, distil, evaluate, report; on a CPU, in minutes.

    Args:
        out: where the run goes.
        full: the longer recipe.
        device: where every stage computes; default: as the recipe says.
    """
    from decant.cli import work

    done = work.quickstart(out, full=full, talk=talk, device=device)
    say(done, json, f"report: {done['report']}")


@app.command
def run(  # noqa: PLR0913 (the places and ways of a run)
    recipe: str,
    *,
    teacher: str,
    out: Path,
    data: str | None = None,
    cache: Path | None = None,
    scale: str | None = None,
    fit: str | None = None,
    sets: Sets = (),
    device: Device | None = None,
    push_to_hub: str | None = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> None:
    """Run a recipe or preset into a folder; the same command goes on where it stopped.

    Args:
        recipe: a preset's name (`decant recipes`) or a YAML file.
        teacher: a pipeline folder, one .safetensors file, a hub id, or `scenes`.
        out: where the run goes.
        data: captioned pictures: a folder, or COCO captions.
        cache: a folder that keeps latents and text embeddings for many runs; default: the run keeps its own.
        scale: the recipe for another size of teacher and machine, such as `scenes`; `decant recipes NAME` shows which.
        fit: the most memory that a distillation may take, such as 6GB: its fastest settings that fit are chosen.
        device: where every stage computes; default: as the recipe says.
        push_to_hub: owner/name of a repository for the last student, private where it is made anew.
        dry_run: print the resolved recipe, and the disk and time that it wants; run nothing.
    """
    from decant.cli import publish

    if push_to_hub is not None:  # before what takes seconds to import
        publish.check_ready(push_to_hub)
    from decant.cli import work

    if dry_run:
        document = work.resolved(
            recipe, sets, teacher=teacher, data=data, out=out, talk=talk, device=device, scale=scale, fit=fit
        )
        say(document, json, document["yaml"])
        return
    done = work.run_and_report(
        recipe,
        teacher=teacher,
        data=data,
        out=out,
        sets=sets,
        talk=talk,
        cache=cache,
        device=device,
        scale=scale,
        fit=fit,
    )
    if push_to_hub is not None and here().first:
        talk(f"pushing {done['student']} to {push_to_hub}")
        done["pushed"] = publish.push(work.student_of(done), push_to_hub)
    say(done, json, f"report: {done['report']}" if done["report"] else f"run: {out}")


@app.command
def recipes(name: str | None = None, *, json: Json = False) -> None:
    """List the presets, or print one.

    Args:
        name: the preset to print.
    """
    from decant.recipe.schema import list_recipes, preset_text

    if name is not None:
        text = preset_text(name)
        say({"name": name, "yaml": text}, json, text.rstrip())
        return
    listed = list_recipes()
    say(listed, json, "\n".join(f"{row['name']:16} {row['summary']}" for row in listed))


@app.command
def prune(  # noqa: PLR0913 (what is cut, from what, and by which rules)
    *,
    teacher: str,
    student: str,
    out: Path | None = None,
    data: str | None = None,
    rule: BlockRule = "first",
    importance: Path | None = None,
    channels: ChannelRule = "first",
    seed: int = 0,
    sets: Sets = (),
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> None:
    """Cut a student out of a teacher.

    Args:
        teacher: a folder, a .safetensors file, a hub id, `scenes`, or for --dry-run a name (`sd15`, `sd21`, `sdxl`).
        student: a published student (`bk-tiny`, `ssd-1b`, `koala-700m`, `slim-65m`, ...; any other word lists them), or
            a .yaml file that describes one.
        out: the student's pipeline folder.
        data: captioned pictures, for the channel rules that measure the teacher.
        rule: which transformer blocks stay where a student says how many.
        importance: for the rule sensitive, the file that `decant importance` wrote.
        channels: which channels stay where a level is narrowed.
        seed: of the measurement.
        dry_run: print what would come out, without loading weights.
    """
    from decant.cli import work
    from decant.errors import refuse

    settings = work.prune_settings(student, rule=rule, importance=importance, channels=channels, sets=sets)
    if dry_run:
        document = work.preview_prune(teacher, settings)
        counts = f"{document['student']}: {document['parameters']:,} parameters, {document['macs'] / 1e9:.1f} GMACs"
        say(document, json, "\n".join([counts, *(f"  {line}" for line in document["changes"])]))
        return
    if out is None:
        raise refuse("--out", "missing", allowed="a folder", hint="--out DIR, or --dry-run to see the counts alone")
    record = work.one_stage(
        "prune", settings, teacher=teacher, models={"teacher": teacher}, data=data, seed=seed, out=out, talk=talk
    )
    say(record, json, str(out))


@app.command
def importance(
    teacher: str,
    *,
    data: str,
    out: Path,
    pictures: int = 32,
    repeats: int = 5,
    seed: int = 0,
    device: Device | None = None,
    json: Json = False,
) -> None:
    """Measure what every part of a teacher is worth: the damage that its removal does, and what it costs.

    Args:
        teacher: a folder, a .safetensors file, a hub id, or `scenes`.
        data: captioned pictures: a folder, or COCO captions.
        out: a folder for importance.json, which `decant prune --rule sensitive` reads, and importance.png.
        pictures: how many are measured on, each at four noise levels.
        repeats: timed runs of every part.
        seed: of noise and timesteps.
        device: where to compute; auto: an accelerator if there is one.
    """
    from decant.cli import work
    from decant.cli.tables import importance_table

    document = work.measure_importance(
        teacher, data=data, out=out, pictures=pictures, repeats=repeats, seed=seed, device=device, talk=talk
    )
    say(document, json, importance_table(document))


@app.command
def distill(  # noqa: PLR0913 (a student and all that it learns from)
    student: str,
    *,
    teacher: str,
    data: str,
    out: Path,
    seed: int = 0,
    cache: Path | None = None,
    device: Device | None = None,
    fit: str | None = None,
    sets: Sets = (),
    json: Json = False,
) -> None:
    """Distil a student that decant cut, on captioned pictures.

    Args:
        student: a pipeline folder, one .safetensors file, a hub id, or `scenes`; the teacher again for a copy of it.
        teacher: a pipeline folder, one .safetensors file, a hub id, or `scenes`.
        data: captioned pictures: a folder, or COCO captions.
        out: the distilled student's pipeline folder.
        seed: of every draw.
        cache: a folder that keeps latents and text embeddings for many runs.
        device: where to compute; auto: an accelerator if there is one.
        fit: the most memory to take, such as 6GB: the fastest settings that fit are chosen.
    """
    from decant.cli import work

    settings = work.on_device(work.settings_of("distill", sets), device)
    settings = work.fit_one(settings, student, teacher, fit, talk)
    models: dict[str, str | Path] = {Path(student).name or "student": student}
    record = work.one_stage(
        "distill", settings, teacher=teacher, models=models, data=data, seed=seed, out=out, talk=talk, cache=cache
    )
    say(record, json, str(out))


@app.command
def decoder(  # noqa: PLR0913 (a pipeline and all that its decoder learns from)
    model: str | None = None,
    *,
    teacher: str,
    data: str,
    out: Path,
    seed: int = 0,
    cache: Path | None = None,
    device: Device | None = None,
    sets: Sets = (),
    json: Json = False,
) -> None:
    """Distil the autoencoder of a teacher into a small one, which decodes several times faster.

    Args:
        model: who gets the small autoencoder, such as a student of this teacher; default the teacher itself. All else
            of it stays as it is.
        teacher: a pipeline folder, one .safetensors file, a hub id, or `scenes`.
        data: pictures, captioned as for `distill`.
        out: the pipeline folder with the small autoencoder.
        seed: of every draw.
        cache: a folder that keeps latents and the teacher's pictures of them for many runs.
        device: where to compute; auto: an accelerator if there is one.
    """
    from decant.cli import work

    settings = work.on_device(work.settings_of("decoder", sets), device)
    model = model or teacher
    name = "teacher" if model == teacher else Path(model).name or "student"
    record = work.one_stage(
        "decoder",
        settings,
        teacher=teacher,
        models={name: model},
        data=data,
        seed=seed,
        out=out,
        talk=talk,
        cache=cache,
    )
    say(record, json, str(out))


@app.command
def consistency(  # noqa: PLR0913 (a student and all that it learns from)
    student: str,
    *,
    teacher: str,
    data: str,
    out: Path,
    seed: int = 0,
    cache: Path | None = None,
    device: Device | None = None,
    sets: Sets = (),
    json: Json = False,
) -> None:
    """Take out steps and guidance by latent consistency: a student of two to eight steps.

    Args:
        student: a pipeline folder, one .safetensors file, a hub id, or `scenes`; the teacher again for a copy of it.
        teacher: a pipeline folder, one .safetensors file, a hub id, or `scenes`.
        data: captioned pictures: a folder, or COCO captions.
        out: the student's pipeline folder.
        seed: of every draw.
        cache: a folder that keeps latents and text embeddings for many runs.
        device: where to compute; auto: an accelerator if there is one.
    """
    told = {"teacher": teacher, "data": data, "out": out, "seed": seed, "cache": cache}
    _one_training("consistency", student, sets, device, json, **told)


@app.command
def dmd(  # noqa: PLR0913 (a student and all that it learns from)
    student: str,
    *,
    teacher: str,
    data: str,
    out: Path,
    seed: int = 0,
    cache: Path | None = None,
    device: Device | None = None,
    sets: Sets = (),
    json: Json = False,
) -> None:
    """Take out steps and guidance by distribution matching: a student of one to four steps.

    Args:
        student: a pipeline folder, one .safetensors file, a hub id, or `scenes`; the teacher again for a copy of it.
        teacher: a pipeline folder, one .safetensors file, a hub id, or `scenes`.
        data: captioned pictures: a folder, or COCO captions.
        out: the student's pipeline folder.
        seed: of every draw.
        cache: a folder that keeps latents and text embeddings for many runs.
        device: where to compute; auto: an accelerator if there is one.
    """
    told = {"teacher": teacher, "data": data, "out": out, "seed": seed, "cache": cache}
    _one_training("dmd", student, sets, device, json, **told)


def _one_training(kind: str, student: str, sets: Sets, device: Device | None, json: bool, **told: Any) -> None:
    """One stage that trains a student, by itself."""
    from decant.cli import work

    settings = work.on_device(work.settings_of(kind, sets), device)
    models: dict[str, str | Path] = {Path(student).name or "student": student}
    record = work.one_stage(kind, settings, models=models, talk=talk, **told)
    say(record, json, str(told["out"]))


@app.command
def evaluate(  # noqa: PLR0913 (what is asked of every model)
    *models: str,
    teacher: str,
    out: Path,
    data: str | None = None,
    images: int = 128,
    steps: int = 25,
    guidance_scale: float = 7.5,
    cache: Path | None = None,
    device: Device | None = None,
    sets: Sets = (),
    json: Json = False,
) -> None:
    """Score models against their teacher on the same captions and seeds; writes figures, pictures and a report.

    Args:
        models: pipeline folders or hub ids; the teacher is always scored too.
        teacher: a pipeline folder, one .safetensors file, a hub id, or `scenes`.
        out: a folder for report.json, report.html and pictures.
        data: captioned pictures; without it, captions of held-out scenes.
        images: captions, one picture each.
        steps: of the sampler.
        guidance_scale: 1 and below: without guidance.
        cache: a folder that keeps latents and text embeddings for many runs.
        device: where to compute; auto: an accelerator if there is one.
    """
    from decant.cli import work

    asked = {"images": images, "steps": steps, "guidance_scale": guidance_scale}
    settings = work.on_device({**asked, **work.settings_of("evaluate", sets)}, device)
    done = work.evaluate_and_report(models, settings, teacher=teacher, data=data, out=out, talk=talk, cache=cache)
    say(done, json, f"report: {out / 'report.html'}")


@app.command
def compare(  # noqa: PLR0913 (what is compared, and on what)
    *,
    out: Path,
    teacher: str | None = None,
    student: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="", show_default=False)] = (),
    prompt: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="", show_default=False)] = (),
    prompts_file: Path | None = None,
    prompts: int | None = None,
    images: int = 4,
    steps: Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative="")] = (2, 4, 8),
    seed: int = 42,
    teacher_steps: int = 30,
    teacher_at_steps: bool = True,
    guidance_scale: float = 7.5,
    sampler: Sampler = "ddim",
    size: int | None = None,
    batch_size: int = 16,
    latency_repeats: int = 3,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    blind: Annotated[bool, Parameter(negative="")] = False,
    blind_pairs: int = 40,
    votes: Annotated[tuple[Path, ...], Parameter(consume_multiple=True, negative="", show_default=False)] = (),
    device: Device = "auto",
    sets: OfModel = (),
    json: Json = False,
) -> None:
    """Compare students with their teacher at several numbers of steps: same prompts, same seeds, one run.

    Writes compare.html, compare.json, compare.csv, pictures.csv, pictures/ and grids/. The same command goes on where
    it was stopped; more students, steps or prompts cost what they add.

    Args:
        out: a folder for it all.
        teacher: a pipeline folder, one .safetensors file, a hub id, or `scenes`.
        student: MODEL, MODEL+LORA (the LoRA is put on the model), or NAME= one of both; several, or given again.
            `teacher` for MODEL is the teacher.
        prompt: one or more.
        prompts_file: a text file, a prompt a line, or captions.json.
        prompts: at most so many prompts; default all that are given, else 20: held-out captions for `scenes`, for
            others a list of ours.
        images: pictures of each prompt, each of a seed of its own.
        steps: one or more, of the students.
        seed: of all pictures.
        teacher_steps: of the teacher's pictures that all others are measured by.
        teacher_at_steps: the teacher itself at the students' numbers of steps, too.
        guidance_scale: of the teacher, and of students whose record says none; 1 and below: without guidance.
        sampler: of the teacher, and of students whose record says none; as-is: the model's own.
        size: pixels; default the networks' own.
        batch_size: pictures drawn at once.
        latency_repeats: timed pictures of each; 0: no timing.
        precision: of all weights.
        blind: also write blind.html, a page of pairs for people to vote on, without names.
        blind_pairs: how many.
        votes: files that the page gave, instead of a comparison: prints what was preferred.
        device: auto: an accelerator if there is one.
    """
    from decant.cli import work
    from decant.cli.tables import compare_table, votes_table
    from decant.errors import refuse

    if votes:
        counted = work.count_votes(out, votes)
        say(counted, json, votes_table(counted))
        return
    if teacher is None:
        raise refuse("--teacher", "missing", allowed="a model", hint="--teacher DIR --student DIR --out DIR")
    settings = {
        "images": images,
        "steps": steps,
        "seed": seed,
        "teacher_steps": teacher_steps,
        "teacher_at_steps": teacher_at_steps,
        "guidance_scale": guidance_scale,
        "sampler": sampler,
        "size": size,
        "batch_size": batch_size,
        "latency_repeats": latency_repeats,
        "precision": precision,
        "device": device,
    }
    document = work.compare_and_report(
        student,
        settings,
        teacher=teacher,
        prompt=prompt,
        prompts_file=prompts_file,
        prompts=prompts,
        sets=sets,
        out=out,
        blind_pairs=blind_pairs if blind else None,
        talk=talk,
    )
    say(document, json, f"{compare_table(document)}\n\nreport: {out / 'compare.html'}")


@app.command
def generate(  # noqa: PLR0913 (the options of a picture)
    model: str,
    *,
    prompt: Annotated[list[str], Parameter(consume_multiple=True, negative="")],
    out: Path,
    steps: Annotated[list[int] | None, Parameter(consume_multiple=True, negative="")] = None,
    seed: int = 0,
    guidance_scale: float | None = None,
    sampler: Sampler | None = None,
    size: int | None = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Draw pictures. A student of few steps knows how it is drawn; what is said here goes before.

    Args:
        model: a pipeline folder, one .safetensors file, a hub id, or `scenes`.
        prompt: one or more.
        out: a folder for the pictures.
        steps: one or more, for example 2 4 8; every prompt is drawn with each. Default 25, or as its record says.
        seed: of the first prompt's picture; the next prompt takes the next seed.
        guidance_scale: 1 and below: without guidance. Default 7.5, or as its record says.
        sampler: as-is: the model's own. Default ddim, or as its record says.
        size: pixels; default the network's own.
        device: auto: an accelerator if there is one.
    """
    from decant.stages.draw import draw_to

    files = draw_to(
        model,
        prompt,
        steps or [],
        seed,
        out,
        device,
        guidance_scale=guidance_scale,
        sampler=sampler,
        size=size,
    )
    say(files, json, "\n".join(file["file"] for file in files))


@app.command
def bench(  # noqa: PLR0913 (the conditions of a measurement)
    *models: str,
    steps: int | None = None,
    guidance_scale: float | None = None,
    sampler: Sampler | None = None,
    size: int | None = None,
    batch_size: int = 4,
    warmup: int = 1,
    repeats: int = 5,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    compile: Annotated[bool, Parameter(negative="")] = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Time models part by part and as a whole, with pictures a second, peak memory, parameters and MACs.

    Several models are timed in turns, so that what drifts on the machine meets all alike. For a first look at a large
    model on a CPU: --steps 1 --batch-size 0 --repeats 1.

    Args:
        models: as `generate` takes them, or an architecture at full size with random weights (`sd15`, `sd21`, `sdxl`).
        steps: of the sampler, for the whole picture. Default 25, or as each model's record says.
        guidance_scale: 1 and below: without guidance. Default 7.5, or as each model's record says.
        sampler: as `generate` has them. Default ddim, or as each model's record says.
        size: pixels; default each network's own.
        batch_size: pictures drawn together for pictures a second; 0 leaves that out.
        warmup: untimed rounds before the timed ones.
        repeats: timed rounds.
        dtype: of all weights.
        compile: the networks as torch.compile makes them, which takes a minute each before anything is timed.
        device: auto: an accelerator if there is one.
    """
    from decant.cli.tables import bench_table
    from decant.cli.work import bench_models

    document = bench_models(
        models,
        talk,
        steps=steps,
        guidance_scale=guidance_scale,
        sampler=sampler,
        size=size,
        batch_size=batch_size,
        warmup=warmup,
        repeats=repeats,
        dtype=dtype,
        compile=compile,
        device=device,
    )
    say(document, json, bench_table(document))


@app.command
def show(model: str, *, json: Json = False) -> None:
    """What a model is: family, parameters, MACs, and its record.

    Args:
        model: a pipeline folder, one .safetensors file, a hub id, `scenes`, or a name (`sd15`, `sd21`, `sdxl`).
    """
    from decant.stages.draw import describe, described

    document = describe(model)
    say(document, json, described(document))


@app.command
def doctor(*, json: Json = False) -> None:
    """What this machine can do, and what is missing: devices, memory, disk, threads, packages, hub."""
    from decant.cli.doctor import examine, told

    document = examine(Path())
    say(document, json, told(document))


@app.command
def export(model: str, *, out: Path, json: Json = False) -> None:
    """Write a model of Stable Diffusion 1.x layout as one .safetensors file, as people download them.

    Args:
        model: a pipeline folder, one .safetensors file, a hub id, or `scenes`.
        out: the file, ending in .safetensors.
    """
    from decant.cli import work

    work.export_single_file(model, out)
    say({"model": model, "file": str(out)}, json, str(out))


@app.command
def move(*, to: str, out: Path, lora: Path | None = None, controlnet: Path | None = None, json: Json = False) -> None:
    """Move what was made for a teacher to a student that was cut from it, by the surgery map; nothing is trained.

    Args:
        to: the student, a pipeline folder that decant cut.
        out: of a LoRA a new .safetensors file for diffusers and peft, kohya's twin is written beside it; of a
            ControlNet a new folder.
        lora: a .safetensors LoRA of the teacher, with keys of peft, diffusers or kohya.
        controlnet: a ControlNet of the teacher, a folder as diffusers writes it.
    """
    from decant.errors import refuse
    from decant.stages.move import controlnet_told, lora_told, move_controlnet_folder, move_lora_file

    match lora, controlnet:
        case Path(), None:
            document = move_lora_file(lora, to, out)
            say(document, json, lora_told(document))
        case None, Path():
            document = move_controlnet_folder(controlnet, to, out)
            say(document, json, controlnet_told(document))
        case _:
            both = "both" if lora else "missing"
            hint = "one at a time: decant move --lora F --to STUDENT --out F2"
            raise refuse("--lora or --controlnet", both, allowed="exactly one of them", hint=hint)


@app.command
def report(run: Path, *, json: Json = False) -> None:
    """Rebuild report.json and report.html of a run from its records, or the page and grids of a comparison.

    Args:
        run: the run's folder.
    """
    from decant.cli import work

    page = work.rebuild_report(run)
    say({"report": str(page)}, json, f"report: {page}")


@scenes_app.command
def draw(
    *,
    n: int,
    out: Path,
    split: Literal["train", "held-out"] = "train",
    first_seed: int = 0,
    json: Json = False,
) -> None:
    """Draw scenes into a folder of pictures with metadata.jsonl.

    Args:
        n: how many.
        out: a new or empty folder.
        split: train never shows the held-out combinations; every held-out scene holds one.
        first_seed: seed of the first scene.
    """
    from decant.scenes.folder import draw_folder

    draw_folder(out, n, split, first_seed)
    say({"out": str(out), "n": n, "split": split}, json, str(out))


@scenes_app.command
def train(
    *,
    out: Path,
    recipe: Path | None = None,
    parts: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    xl: Annotated[bool, Parameter(negative="")] = False,
    classifier: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Train the scenes teacher from nothing, part by part; finished parts are kept.

    Args:
        out: a folder, one sub-folder a part.
        recipe: a YAML of parts; default the one the shipped teacher was made by.
        parts: only these, by name.
        xl: train the second teacher instead, of SDXL's layout, from the first one's outputs.
        classifier: train the attribute classifier instead, whose features FID and KID use; minutes on one core.
    """
    if classifier:
        from decant.stages.classifier import train_classifier

        print(train_classifier(out, talk))
        return
    from decant.stages.teacher import train_teacher

    print(train_teacher(out, recipe, parts, talk, xl=xl))


def main(tokens: Sequence[str] | None = None) -> None:
    """Run the command line; exit with 0, or with 2 for a mistake of the user's. A traceback is a mistake of ours.

    A signal gives 128 and its number: 130 for Ctrl-C, 143 for SIGTERM.
    """
    # What it has to say of optional packages as it is imported, `decant doctor` says when asked.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's own business with torch
    if here().count > 1:  # each would warn of a setting that is meant; torch is not imported yet
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    keep_freed_memory()
    if here().count > 1 and not _shared_by_ranks(sys.argv[1:] if tokens is None else tokens):
        if not here().first:
            return
        alone()
    try:
        with interruptible():
            app(tokens, exit_on_error=False, print_error=False)
    except ElsewhereError:  # the first rank has told it
        sys.exit(2)
    except UserError as error:
        talk(f"error: {error}")
        sys.exit(2)
    except CycloptsError as error:
        talk(f"error: {error}\n  hint: decant --help, or decant VERB --help")
        sys.exit(2)
    except KeyboardInterrupt as stop:
        talk(f"stopped ({stop or 'SIGINT'}); what is finished is kept. Go on with:\n  {_typed(tokens)}")
        sys.exit(stop.status if isinstance(stop, Interrupted) else 130)
    except Exception as error:
        if here().count > 1 and lost(error):
            _tell_lost(tokens)
            sys.exit(1)
        if not disk_full(error):
            raise
        talk(f"error: {error}\n  hint: make room; what is finished is kept. Go on with:\n  {_typed(tokens)}")
        sys.exit(2)


def _shared_by_ranks(tokens: Sequence[str]) -> bool:
    """Whether all ranks of a launcher work on a verb together. Any other the first does by itself."""
    return any(word in _SHARED for word in tokens[:1])


def _tell_lost(tokens: Sequence[str] | None) -> None:
    """Said by every rank that is left: the first may be the one that is not."""
    rank = here()
    line = f"error: rank {rank.rank} of {rank.count}: another rank of this run has ended, so this one ends too"
    hint = f"hint: what is finished is kept, and the newest checkpoint. Go on with:\n  {_typed(tokens)}"
    with suppress(OSError):
        print(f"{line}\n  {hint}", file=sys.stderr, flush=True)


def _typed(tokens: Sequence[str] | None) -> str:
    """The command as it was typed, quoted for a shell; of several ranks one that starts as many."""
    if here().count > 1:
        words = sys.argv[1:] if tokens is None else tokens
        return shlex.join(["torchrun", f"--nproc_per_node={here().count}", "-m", "decant", *words])
    if tokens is not None:
        return shlex.join(["decant", *tokens])
    program, *words = sys.argv
    if Path(program).stem != "decant":  # python -m decant.cli.main
        return shlex.join(sys.orig_argv)
    found = shutil.which("decant")
    return shlex.join(["decant" if found and Path(found).samefile(program) else program, *words])


if __name__ == "__main__":
    main()
