"""Score models against their teacher: same captions, same seeds, one run."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from numpy.typing import NDArray
from pydantic import Field

from decant.bench.machine import machine
from decant.bench.timer import Latency, peak_memory_mb, time_ms
from decant.data.folder import Captioned, read_folder, split
from decant.data.latents import Latents, encode_all
from decant.errors import UserError, refuse
from decant.metrics.interval import Interval, bootstrap_mean, wilson
from decant.models.cost import size_mb
from decant.models.device import Device, pick
from decant.models.families.sd1 import SD1
from decant.models.generate import Sampler, generate
from decant.models.load import folder_of, load
from decant.scenes.captions import parse
from decant.scenes.checker import ATTRIBUTES, Reading, Score, read, score
from decant.scenes.folder import captions_of
from decant.stages.output_error import output_error
from decant.stages.pictures import save_picture
from decant.stages.progress import progress
from decant.stages.record import figures_of, read_record
from decant.stages.stage import Inputs, Settings, Stage

Picture = NDArray[np.uint8]
# Far from the seeds that training scenes are drawn from; the split itself is by combination.
HELD_OUT_SEED = 1_000_000
SCENE = (64, 64, 3)


class Evaluate(Settings):
    """What is asked of every model."""

    captions: Literal["auto", "scenes", "data"] = Field(
        "auto",
        description="scenes: held-out scenes; data: the held-out pictures' captions; auto: data if given",
    )
    images: int = Field(128, ge=1, description="captions, one picture each")
    steps: int = Field(25, ge=1)
    guidance_scale: float = Field(7.5, ge=0)
    sampler: Sampler = "ddim"
    batch_size: int = Field(16, ge=1)
    size: int | None = Field(None, ge=8)
    shown: int = Field(12, ge=0, description="captions whose pictures the report shows")
    latency_repeats: int = Field(3, ge=0, description="0: no timing")
    held_out: float = Field(0.1, gt=0, lt=1, description="as the distillation had it")
    held_out_most: int = Field(64, ge=1)
    max_skipped: float = Field(0.1, ge=0, le=1)
    device: Device = "auto"


@dataclass(frozen=True)
class _Ask:
    """The captions and seeds of one evaluation; ``scenes``: whether the checker can read what they ask for."""

    captions: tuple[str, ...]
    seeds: tuple[int, ...]
    scenes: bool
    data: Captioned | None


@dataclass(frozen=True)
class _Drawn:
    """One model's pictures, and where the captions are scenes what the checker read and made of them."""

    pictures: list[Picture]
    readings: list[Reading]
    scores: list[Score]

    @classmethod
    def of(cls, pictures: list[Picture], ask: _Ask) -> "_Drawn":
        if not ask.scenes or (ask.data is not None and any(picture.shape != SCENE for picture in pictures)):
            return cls(pictures, [], [])  # captions of scenes may stand beside pictures of another size
        readings = [read(picture) for picture in pictures]
        judged = [score(r, parse(c)) for r, c in zip(readings, ask.captions, strict=True)]
        return cls(pictures, readings, judged)


def run(settings: Evaluate, inputs: Inputs, out: Path) -> dict[str, Any]:
    """Draw, score and time every model in ``inputs.models``, the teacher first; writes pictures and figures."""
    models = {"teacher": inputs.teacher, **{n: p for n, p in inputs.models.items() if n != "teacher"}}
    ask = _ask(settings, inputs)
    device = pick(settings.device)
    teacher: _Drawn | None = None
    rows: list[dict[str, Any]] = [
        {"caption": caption, "seed": seed, "models": {}} for caption, seed in zip(ask.captions, ask.seeds, strict=True)
    ][: settings.shown]
    entries = []
    proof = _Proof.of(settings, inputs, ask, device) if ask.data else None
    with progress("drawing pictures", len(models) * len(ask.captions), inputs.talk) as tick:
        for number, (name, source) in enumerate(models.items()):
            pipeline = load(source).to(device)
            drawn = _Drawn.of(_draw(pipeline, ask, settings), ask)
            tick((number + 1) * len(ask.captions), name)
            teacher = teacher or drawn
            scores = {**(proof.scores(pipeline) if proof else {}), **_scores(drawn, teacher)}
            entries.append(_entry(name, source, pipeline, models, settings, scores, ask))
            _show(rows, name, drawn, out)
            inputs.talk(f"{name}: {_told(scores)}")
    _relate(entries)
    return {
        "machine": machine(),
        "models": entries,
        "pictures": rows,
        "asked": {"captions": list(ask.captions), "seeds": list(ask.seeds), "scenes": ask.scenes},
    }


def _ask(settings: Evaluate, inputs: Inputs) -> _Ask:
    wanted = settings.captions
    if wanted == "auto":
        wanted = "data" if inputs.data else "scenes"
    if wanted == "scenes":
        asked = captions_of(settings.images, "held-out", HELD_OUT_SEED)
        return _Ask(tuple(c for _, c in asked), tuple(seed for seed, _ in asked), True, None)
    if inputs.data is None:
        raise refuse(
            "evaluate.captions",
            "data",
            allowed="scenes, or data with --data FOLDER",
            hint="add --data FOLDER",
        )
    held = split(read_folder(inputs.data, settings.max_skipped), settings.held_out, inputs.seed)[1]
    chosen = held.captions[: settings.images]
    seeds = tuple(_seed_of(name) for name in held.names[: settings.images])
    return _Ask(chosen, seeds, all(map(_is_scene, chosen)), held)


def _seed_of(name: str) -> int:
    """A picture's seed follows from its name, so that it does not depend on the other pictures."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")


def _is_scene(caption: str) -> bool:
    try:
        parse(caption)
    except UserError:
        return False
    return True


def _draw(pipeline: StableDiffusionPipeline, ask: _Ask, settings: Evaluate) -> list[Picture]:
    drawn = generate(
        pipeline,
        ask.captions,
        ask.seeds,
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        sampler=settings.sampler,
        batch_size=settings.batch_size,
        size=settings.size,
    )
    return list(drawn)


def _scores(drawn: _Drawn, teacher: _Drawn) -> dict[str, dict[str, Any]]:
    """Every score of one model's pictures, as ``report.json`` holds them."""
    distance = [_rms(own, theirs) for own, theirs in zip(drawn.pictures, teacher.pictures, strict=True)]
    found = {"distance_to_teacher": _number(bootstrap_mean(distance))}
    if not drawn.scores:
        return found
    agree = [_same(own, theirs) for own, theirs in zip(drawn.readings, teacher.readings, strict=True)]
    shares = {"scene_accuracy": [s.exact for s in drawn.scores], "agreement_with_teacher": agree}
    for attribute in ATTRIBUTES:
        shares[f"scene_accuracy/{attribute}"] = [s.attributes[attribute] for s in drawn.scores]
    return {name: wilson(sum(values), len(values)).to_json() for name, values in shares.items()} | found


def _same(a: Reading, b: Reading) -> bool:
    """Whether two pictures show the same: a background, things of one kind within 6 pixels, as much that is unclear."""
    if a.background is None or (a.background, a.unclear, len(a.seen)) != (b.background, b.unclear, len(b.seen)):
        return False
    return all(any(x.thing == y.thing and np.hypot(x.x - y.x, x.y - y.y) < 6 for y in b.seen) for x in a.seen)


def _rms(a: Picture, b: Picture) -> float:
    return float(np.sqrt(np.mean(np.square((a.astype(np.float64) - b.astype(np.float64)) / 255))))


def _number(interval: Interval) -> dict[str, Any]:
    return {**interval.to_json(), "unit": "number", "better": "lower"}


@dataclass(frozen=True)
class _Proof:
    """The teacher and held-out pictures, to measure every model's output error on."""

    family: SD1
    teacher: torch.nn.Module
    held: Latents
    seed: int

    @classmethod
    def of(cls, settings: Evaluate, inputs: Inputs, ask: _Ask, device: torch.device) -> "_Proof":
        assert ask.data is not None
        teacher = load(inputs.teacher).to(device)
        family = SD1.of(teacher)
        most = settings.held_out_most
        part = Captioned(ask.data.files[:most], ask.data.captions[:most], (), ask.data.folder)
        size = settings.size or int(teacher.unet.config["sample_size"]) * teacher.vae_scale_factor
        held = encode_all(part, size, family.encode, family.condition, family.null)
        return cls(family, teacher.unet, held, inputs.seed)

    def scores(self, pipeline: StableDiffusionPipeline) -> dict[str, dict[str, Any]]:
        error = output_error(self.family, pipeline.unet, self.teacher, self.held, self.seed)
        return {"output_error": _number(bootstrap_mean(error.by_picture.tolist()))}


def _entry(
    name: str,
    source: str | Path,
    pipeline: StableDiffusionPipeline,
    models: Mapping[str, str | Path],
    settings: Evaluate,
    scores: dict[str, dict[str, Any]],
    ask: _Ask,
) -> dict[str, Any]:
    role, twin = _role(name, models)
    latency = _latency(pipeline, ask, settings) if settings.latency_repeats else {}
    memory = peak_memory_mb()
    return {
        "name": name,
        "role": role,
        **({"control_of": twin} if twin else {}),
        "path": str(source),
        **figures_of(pipeline.unet),
        "size_mb": round(size_mb(folder_of(source)), 3),
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "device": str(pipeline.unet.device),
        "sampler": settings.sampler,
        "steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "latency_ms": {part: figure.to_json() for part, figure in latency.items()},
        "peak_memory_mb": round(memory.cuda_mb if memory.cuda_mb is not None else memory.process_mb, 1),
        "scores": scores,
    }


def _role(name: str, models: Mapping[str, str | Path]) -> tuple[str, str | None]:
    """Teacher, student, or control: a cut that another of the models was distilled from."""
    if name == "teacher":
        return "teacher", None
    for other, source in models.items():
        record = read_record(source) if other != "teacher" else {}
        start = record.get("parents", {}).get(next(iter(record.get("takes", [])), ""), {}).get("path")
        if record.get("stage") == "distill" and start and Path(start).resolve() == Path(models[name]).resolve():
            return "control", other
    return "student", None


def _latency(pipeline: StableDiffusionPipeline, ask: _Ask, settings: Evaluate) -> dict[str, Latency]:
    """Milliseconds of one picture at batch 1, and of its parts: text encoder, one UNet call, decoder."""
    family = SD1.of(pipeline)
    caption, seed = ask.captions[0], ask.seeds[0]
    condition = family.condition([caption])
    side = settings.size // pipeline.vae_scale_factor if settings.size else int(pipeline.unet.config["sample_size"])
    x_t = torch.zeros(1, pipeline.unet.config["in_channels"], side, side).to(pipeline.unet.device, pipeline.unet.dtype)
    t = torch.full((1,), 500, device=pipeline.unet.device)
    repeats = settings.latency_repeats

    def picture() -> object:
        return list(
            generate(
                pipeline,
                [caption],
                [seed],
                steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                sampler=settings.sampler,
                size=settings.size,
            )
        )

    with torch.no_grad():
        return {
            "picture": time_ms(picture, warmup=1, repeats=repeats),
            "text": time_ms(lambda: family.condition([caption]), warmup=1, repeats=repeats),
            "unet": time_ms(lambda: family.denoise(pipeline.unet, x_t, t, condition), warmup=1, repeats=repeats),
            "decode": time_ms(lambda: pipeline.vae.decode(x_t), warmup=1, repeats=repeats),
        }


def _show(rows: list[dict[str, Any]], name: str, drawn: _Drawn, out: Path) -> None:
    for index, row in enumerate(rows):
        file = f"pictures/{name}/{index}.png"
        save_picture(drawn.pictures[index], out / file)
        result = drawn.scores[index] if drawn.scores else None
        judged = {"correct": result.exact, "wrong": list(result.wrong)} if result else {"correct": None}
        row["models"][name] = {"file": file, **judged}


def _relate(entries: Sequence[dict[str, Any]]) -> None:
    """Scores as a part of the teacher's, where that is a number that means something."""
    teacher = entries[0]["scores"]
    for entry in entries:
        for name, figure in entry["scores"].items():
            if figure.get("better") != "lower" and teacher[name]["value"] > 0:
                figure["relative_to_teacher"] = figure["value"] / teacher[name]["value"]


def _told(scores: Mapping[str, Mapping[str, Any]]) -> str:
    for name in ("scene_accuracy", "output_error", "distance_to_teacher"):
        if name in scores:
            s = scores[name]
            return f"{name} {s['value']:.4g} [{s['low']:.4g}, {s['high']:.4g}] n={s['n']}"
    return ""


STAGE = Stage(settings=Evaluate, run=run, takes="many", gives_pipeline=False, data="optional")
