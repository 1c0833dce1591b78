"""Compare students with their teacher: same prompts and seeds, at several numbers of steps, in one run."""

import csv
import io
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from decant.bench.machine import machine
from decant.data.prompt_file import PromptList
from decant.errors import nearest, refuse
from decant.maths.seeds import seed_of
from decant.models.cost import size_mb
from decant.models.device import Device, pick
from decant.models.families.of import family_of
from decant.models.generate import generate, pixels
from decant.models.load import place_of
from decant.models.samplers import Sampler
from decant.stages.arm_scores import Judge
from decant.stages.arm_times import Opened, times
from decant.stages.asked import Asked, is_scene
from decant.stages.bench import How, Precision
from decant.stages.contenders import TEACHER, Arm, Contender, Role, Sampling, contenders
from decant.stages.drawn_once import Job, draw_missing, picture_name, read_picture
from decant.stages.progress import progress
from decant.stages.record import figures_of
from decant.stages.stage import Settings

Steps = Annotated[int, Field(ge=1)]
Talk = Callable[[str], None]
DOCUMENT, TABLE, PICTURES = "compare.json", "compare.csv", "pictures.csv"
_MARK = Path(".work") / "compare"
_LIBRARIES = ("torch", "diffusers", "transformers")


class Own(Settings):
    """How one model is sampled, by its name; null: as its own record says, else as the teacher is."""

    sampler: Sampler | None = Field(None, description="as-is: the scheduler of the model's own folder")
    guidance_scale: float | None = Field(None, ge=0, description="1 and below: without guidance")
    steps: tuple[Steps, ...] | None = Field(None, min_length=1, description="numbers of steps, of this model alone")


class Compare(Settings):
    """What is asked of every model."""

    images: int = Field(4, ge=1, description="pictures of each prompt, each from a seed of its own")
    steps: tuple[Steps, ...] = Field((2, 4, 8), min_length=1, description="of every student")
    seed: int = Field(42, description="of all pictures")
    teacher_steps: int = Field(30, ge=1, description="of the teacher's pictures that all others are measured by")
    teacher_at_steps: bool = Field(True, description="the teacher itself at the students' numbers of steps, too")
    guidance_scale: float = Field(7.5, ge=0, description="of the teacher, and of students whose record says none")
    sampler: Sampler = Field("ddim", description="of the teacher, and of students whose record says none")
    size: int | None = Field(None, ge=8, description="pixels; null: the networks' own")
    batch_size: int = Field(16, ge=1, description="pictures drawn at once")
    latency_repeats: int = Field(3, ge=0, description="timed pictures of each; 0: no timing")
    precision: Precision = Field("float32", description="of all weights")
    device: Device = Field("auto", description="auto: an accelerator if there is one")
    own: dict[str, Own] = Field({}, description="what differs for one model, by its name")


@dataclass(frozen=True)
class Line:
    """An arm of the comparison with the model that it is of; ``made_by``: what makes its pictures."""

    arm: Arm
    model: Contender
    made_by: Mapping[str, Any]

    def jobs(self, ask: Asked, out: Path) -> list[Job]:
        """Its pictures, in order."""
        folder = out / "pictures" / self.arm.folder
        pairs = zip(ask.captions, ask.seeds, strict=True)
        return [Job(prompt, seed, folder / picture_name(prompt, seed)) for prompt, seed in pairs]


def compare(
    teacher: str,
    students: Sequence[str],
    prompts: PromptList,
    settings: Compare,
    out: Path,
    talk: Talk,
    command: str = "",
) -> dict[str, Any]:
    """Draw, score and time a teacher and its students into ``out``; writes and gives ``compare.json``.

    Pictures that are there and were made by the same model, settings and libraries are kept, so that a second call goes
    on where the first was stopped, and further students, steps, prompts or images cost only what they add.

    Raises:
        UserError: a model cannot be opened, steps or sizes are out of range, or ``out`` holds something else.
    """
    check_place(out)
    models = contenders(teacher, students)
    _check_own(settings, models)
    device = pick(settings.device)
    facts, lines, unread = _door(models, settings, prompts.prompts, device)
    for prompt, rest in zip(prompts.prompts, unread, strict=True):
        if rest:
            talk(f"too long: of {_short(prompt)} the text encoder does not read {_short(rest)}")
    (out / _MARK).mkdir(parents=True, exist_ok=True)
    ask = asked(prompts.prompts, settings.images, settings.seed)
    _draw(lines, ask, settings, out, talk)
    judge = Judge.of(ask, settings.images)
    entries, rows, cells = [], [], []
    for line in lines:
        jobs = line.jobs(ask, out)
        found = judge.judge([read_picture(job.file) for job in jobs])
        entries.append(_entry(line, facts[line.arm.model], found.figures))
        rows += [{"arm": line.arm.name, **row} for row in found.rows(jobs, out)]
        cells.append(found.cells(jobs, out))
        talk(f"{line.arm.name}: {found.told()}")
    latencies = _times(lines, settings, out, talk)
    entries = [{**entry, **latencies.get(entry["name"], {"latency_ms": {}})} for entry in entries]
    _add_speedups(entries)
    document = {
        "version": metadata.version("decant"),
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "seed": settings.seed,
        "images": settings.images,
        "prompts": [{"prompt": text, "unread": rest} for text, rest in zip(prompts.prompts, unread, strict=True)],
        "prompts_of": prompts.place,
        "skipped": dict(prompts.skipped),
        "scenes": ask.scenes,
        "main_score": judge.main,
        "columns": _columns(entries),
        "models": entries,
        "left_out": list(judge.left_out),
        "pictures": _rows(ask, lines, cells),
    }
    _write(out / TABLE, _csv(_table(document)))
    _write(out / PICTURES, _csv(rows))
    _write(out / DOCUMENT, json.dumps(document, indent=1, allow_nan=False))
    return document


def asked(prompts: Sequence[str], images: int, seed: int) -> Asked:
    """Every prompt ``images`` times. A picture's seed follows from its prompt and number alone: whatever else is asked
    for beside it, it stays the same picture.
    """
    captions = tuple(prompt for prompt in prompts for _ in range(images))
    seeds = tuple(seed_of("compare", seed, prompt, k) % 2**32 for prompt in prompts for k in range(images))
    return Asked(captions, seeds, all(map(is_scene, prompts)))


def check_place(out: Path) -> None:
    """Refuse a folder that holds something else than a comparison.

    Raises:
        UserError: it does.
    """
    if out.exists() and not (out / _MARK).is_dir() and (not out.is_dir() or any(out.iterdir())):
        hint = "name another, or remove this one"
        raise refuse("--out", f"{out} is no comparison", allowed="a new folder, or one of a comparison", hint=hint)


def versions() -> dict[str, str]:
    """Of what makes pictures."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _LIBRARIES}}


def _short(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:57]} ... {text[-58:]}")


def _check_own(settings: Compare, models: Sequence[Contender]) -> None:
    known = [model.name for model in models]
    for name in settings.own:
        if name not in known:
            raise refuse("--set", f"no model {name!r}", allowed=", ".join(known), hint=nearest(name, known))


def _door(
    models: Sequence[Contender], settings: Compare, prompts: Sequence[str], device: torch.device
) -> tuple[dict[str, dict[str, Any]], list[Line], list[str]]:
    """Every model opened once before anything is drawn: its figures, its arms, and what of the prompts is not read."""
    facts: dict[str, dict[str, Any]] = {}
    lines: dict[str, list[Line]] = {}
    unread: list[str] = []
    sides: dict[str, tuple[int, int]] = {}
    base = Sampling(settings.sampler, settings.guidance_scale)
    for model in models:
        pipeline = model.open(torch.float32)
        family = family_of(pipeline)
        unread = unread or family.unread(prompts)
        sides[model.name] = pixels(pipeline, settings.size)
        given = settings.own.get(model.name) or Own.model_validate({})
        own = Sampling(given.sampler, given.guidance_scale, given.steps).over(model.told(pipeline))
        if model.name == TEACHER:
            base = own.over(base)
        prints = model.fingerprints()
        facts[model.name] = {
            "path": model.path,
            "fingerprints": prints,
            **figures_of(pipeline.unet, family.tokens),
            "size_mb": round(size_mb(place_of(model.source)), 3),
        }
        arms = _arms(model.name, own.over(base), settings)
        for arm in arms:
            generate(pipeline, ["checked, not drawn"], [0], steps=arm.steps, sampler=arm.sampler, size=settings.size)
        lines[model.name] = [Line(arm, model, _made_by(arm, prints, settings, device)) for arm in arms]
    if len(set(sides.values())) > 1:
        told = ", ".join(f"{name} {height} x {width}" for name, (height, width) in sides.items())
        raise refuse("--size", f"networks' own: {told}", allowed="one size for all", hint="name it, such as --size 512")
    return facts, [line for each in lines.values() for line in each], unread


def _arms(name: str, own: Sampling, settings: Compare) -> list[Arm]:
    """The teacher at its own steps first, by which all are measured, then at the students'; or a student's."""
    few: list[tuple[Role, int]] = [
        ("student", steps) for steps in sorted(set(own.steps or settings.steps), reverse=True)
    ]
    if name == TEACHER:
        wanted = settings.teacher_at_steps or own.steps
        controls: list[tuple[Role, int]] = [("control", n) for _, n in few if wanted and n != settings.teacher_steps]
        few = [("teacher", settings.teacher_steps), *controls]
    sampler, guidance_scale = own.sampler or settings.sampler, own.guidance_scale
    scale = settings.guidance_scale if guidance_scale is None else guidance_scale
    return [Arm(name, role, steps, sampler, scale) for role, steps in few]


def _made_by(arm: Arm, prints: Mapping[str, str], settings: Compare, device: torch.device) -> dict[str, Any]:
    return {
        **prints,
        "steps": arm.steps,
        "sampler": arm.sampler,
        "guidance_scale": arm.guidance_scale,
        "size": settings.size,
        "precision": settings.precision,
        "device": device.type,
        "versions": versions(),
    }


def _draw(lines: Sequence[Line], ask: Asked, settings: Compare, out: Path, talk: Talk) -> None:
    """All pictures that are not there; a model is open while its own are drawn."""
    with progress("drawing pictures", len(lines) * len(ask.captions), talk) as tick:
        opened = Opened(settings.precision, pick(settings.device))
        new = 0
        for place, line in enumerate(lines):
            new += draw_missing(
                lambda line=line: opened.only(line.model),  # type: ignore[misc]
                line.jobs(ask, out),
                line.made_by,
                steps=line.arm.steps,
                guidance_scale=line.arm.guidance_scale,
                sampler=line.arm.sampler,
                size=settings.size,
                batch_size=settings.batch_size,
                tick=lambda done, place=place, line=line: tick(  # type: ignore[misc]
                    place * len(ask.captions) + done, line.arm.name
                ),
            )
    total = len(lines) * len(ask.captions)
    if new < total:
        talk(f"{total - new} of {total} pictures were there")


def _entry(line: Line, facts: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    arm = line.arm
    conditions = {key: line.made_by[key] for key in ("steps", "sampler", "guidance_scale", "precision", "device")}
    conditions["dtype"] = conditions.pop("precision")
    return {"name": arm.name, "model": arm.model, "role": arm.role, **facts, **conditions, "scores": dict(figures)}


def _times(lines: Sequence[Line], settings: Compare, out: Path, talk: Talk) -> dict[str, dict[str, Any]]:
    """Latencies by arm; those of an earlier call that timed these very arms on this machine stand."""
    if not settings.latency_repeats:
        return {}
    how = How(
        size=settings.size, repeats=settings.latency_repeats, device=settings.device, dtype=settings.precision
    )  # fmt: skip
    asked_for = {
        "repeats": how.repeats,
        "machine": machine(),
        "arms": {line.arm.name: dict(line.made_by) for line in lines},
    }
    file = out / ".work" / "latencies.json"
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before["asked"] == json.loads(json.dumps(asked_for)):
            return before["found"]
    arms = [(line.model, line.arm) for line in lines]
    found = times(arms, how, talk)
    _write(file, json.dumps({"asked": asked_for, "found": found}))
    return found


def _add_speedups(entries: Sequence[dict[str, Any]]) -> None:
    """How many times faster than the teacher's pictures; low and high of the slowest and fastest of both."""
    teacher = entries[0]["latency_ms"].get("picture")
    for entry in entries:
        own = entry["latency_ms"].get("picture")
        if teacher and own:
            ends = {"low": teacher["low"] / own["high"], "high": teacher["high"] / own["low"]}
            same = entry is entries[0]
            entry["speedup"] = {"value": teacher["median"] / own["median"], **({} if same else ends)}


def _rows(ask: Asked, lines: Sequence[Line], cells: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """The pictures of one prompt and seed, by arm, as report.json has them."""
    return [
        {
            "caption": caption,
            "seed": seed,
            "models": {line.arm.name: cells[column][row] for column, line in enumerate(lines)},
        }
        for row, (caption, seed) in enumerate(zip(ask.captions, ask.seeds, strict=True))
    ]


def _columns(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The scores that a table shows, CLIPScore in any case."""
    wanted = ("scene_accuracy", "clip_score", "agreement_with_teacher", "distance_to_teacher", "lpips_to_teacher")
    found = {key for entry in entries for key in entry["scores"]}
    diversity = ("diversity", "diversity_lpips", "diversity_of_right")
    return [key for key in (*wanted, *diversity) if key in found or key == "clip_score"]


def _table(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line an arm: conditions, times, and every score with its interval and its part of the teacher's."""
    reasons = {item["score"]: f"not measured: {item['reason']}" for item in document["left_out"]}
    keys = list(dict.fromkeys(key for entry in document["models"] for key in entry["scores"] if "/" not in key))
    table = []
    for entry in document["models"]:
        row = {key: entry[key] for key in ("model", "role", "steps", "sampler", "guidance_scale", "parameters")}
        picture, speedup = entry["latency_ms"].get("picture", {}), entry.get("speedup", {})
        row |= {f"latency_ms_{key}": picture.get(key, "") for key in ("median", "low", "high", "n")}
        row |= {f"speedup{key and '_' + key}": speedup.get(key or "value", "") for key in ("", "low", "high")}
        for key in keys:
            score = entry["scores"].get(key, {})
            row |= {
                key: score.get("value", ""),
                f"{key}_low": score.get("low", ""),
                f"{key}_high": score.get("high", ""),
            }
            row |= {
                f"{key}_{part}": score.get(part, "")
                for part in ("relative_to_teacher", "relative_low", "relative_high")
            }
        table.append(row | {key: reason for key, reason in reasons.items() if key not in keys})
    return table


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    fields = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, fields, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write(file: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
