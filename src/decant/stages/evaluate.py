"""Score models against their teacher: same captions, same seeds, one run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from pydantic import Field

from decant.bench.machine import machine
from decant.bench.timer import Latency, peak_memory_mb, time_ms
from decant.data.latents import Latents
from decant.metrics.interval import bootstrap_mean
from decant.models.cost import size_mb
from decant.models.device import Device, pick
from decant.models.families.sd1 import SD1
from decant.models.generate import Sampler, generate
from decant.models.load import load, place_of
from decant.stages.asked import Asked, Captions, HeldOut, asked
from decant.stages.encode import encode_data
from decant.stages.output_error import output_error
from decant.stages.pictures import save_picture
from decant.stages.progress import progress
from decant.stages.record import figures_of, read_record
from decant.stages.scoring import Drawn, Picture, number, scores, told
from decant.stages.stage import Inputs, Settings, Stage


class Evaluate(Settings):
    """What is asked of every model."""

    captions: Captions = Field(
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


def run(settings: Evaluate, inputs: Inputs, out: Path) -> dict[str, Any]:
    """Draw, score and time every model in ``inputs.models``, the teacher first; writes pictures and figures."""
    models = {"teacher": inputs.teacher, **{n: p for n, p in inputs.models.items() if n != "teacher"}}
    held_out = HeldOut(inputs.data, settings.held_out, inputs.seed, settings.max_skipped)
    ask = asked(settings.captions, settings.images, held_out)
    device = pick(settings.device)
    teacher: Drawn | None = None
    rows: list[dict[str, Any]] = [
        {"caption": caption, "seed": seed, "models": {}} for caption, seed in zip(ask.captions, ask.seeds, strict=True)
    ][: settings.shown]
    entries = []
    proof = _Proof.of(settings, inputs, ask, device) if ask.held else None
    with progress("drawing pictures", len(models) * len(ask.captions), inputs.talk) as tick:
        for number, (name, source) in enumerate(models.items()):
            pipeline = load(source).to(device)
            drawn = Drawn.of(_draw(pipeline, ask, settings), ask)
            tick((number + 1) * len(ask.captions), name)
            teacher = teacher or drawn
            found = {**(proof.scores(pipeline) if proof else {}), **scores(drawn, teacher)}
            entries.append(_entry(name, source, pipeline, models, settings, found, ask))
            _show(rows, name, drawn, out)
            inputs.talk(f"{name}: {told(found)}")
    return {
        "machine": machine(),
        "models": entries,
        "pictures": rows,
        "asked": {"captions": list(ask.captions), "seeds": list(ask.seeds), "scenes": ask.scenes},
    }


def _draw(pipeline: StableDiffusionPipeline, ask: Asked, settings: Evaluate) -> list[Picture]:
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


@dataclass(frozen=True)
class _Proof:
    """The teacher and held-out pictures, to measure every model's output error on."""

    family: SD1
    teacher: torch.nn.Module
    held: Latents
    seed: int

    @classmethod
    def of(cls, settings: Evaluate, inputs: Inputs, ask: Asked, device: torch.device) -> "_Proof":
        assert ask.held is not None
        teacher = load(inputs.teacher).to(device)
        family = SD1.of(teacher)
        size = settings.size or int(teacher.unet.config["sample_size"]) * teacher.vae_scale_factor
        held = encode_data(family, ask.held.first(settings.held_out_most), size, inputs, device)
        return cls(family, teacher.unet, held, inputs.seed)

    def scores(self, pipeline: StableDiffusionPipeline) -> dict[str, dict[str, Any]]:
        error = output_error(self.family, pipeline.unet, self.teacher, self.held, self.seed)
        return {"output_error": number(bootstrap_mean(error.by_picture.tolist()))}


def _entry(
    name: str,
    source: str | Path,
    pipeline: StableDiffusionPipeline,
    models: Mapping[str, str | Path],
    settings: Evaluate,
    scores: dict[str, dict[str, Any]],
    ask: Asked,
) -> dict[str, Any]:
    role, twin = role_of(name, models)
    latency = _latency(pipeline, ask, settings) if settings.latency_repeats else {}
    memory = peak_memory_mb()
    return {
        "name": name,
        "role": role,
        **({"control_of": twin} if twin else {}),
        "path": str(source),
        **figures_of(pipeline.unet),
        "size_mb": round(size_mb(place_of(source)), 3),
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "device": str(pipeline.unet.device),
        "sampler": settings.sampler,
        "steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "latency_ms": {part: figure.to_json() for part, figure in latency.items()},
        "peak_memory_mb": round(memory.cuda_mb if memory.cuda_mb is not None else memory.process_mb, 1),
        "scores": scores,
    }


def role_of(name: str, models: Mapping[str, str | Path]) -> tuple[str, str | None]:
    """Teacher, student, or control: a cut, not distilled, of the kind that another of the models was distilled as."""
    if name == "teacher":
        return "teacher", None
    own = read_record(models[name])
    for other, source in models.items():
        record = read_record(source) if other != "teacher" else {}
        alike = "student" in own and record.get("student") == own["student"]
        if alike and (own.get("stage"), record.get("stage")) == ("prune", "distill"):
            return "control", other
    return "student", None


def _latency(pipeline: StableDiffusionPipeline, ask: Asked, settings: Evaluate) -> dict[str, Latency]:
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


def _show(rows: list[dict[str, Any]], name: str, drawn: Drawn, out: Path) -> None:
    for index, row in enumerate(rows):
        file = f"pictures/{name}/{index}.png"
        save_picture(drawn.pictures[index], out / file)
        result = drawn.scores[index] if drawn.scores else None
        judged = {"correct": result.exact, "wrong": list(result.wrong)} if result else {"correct": None}
        row["models"][name] = {"file": file, **judged}


STAGE = Stage(settings=Evaluate, run=run, takes="many", gives_pipeline=False, data="optional")
