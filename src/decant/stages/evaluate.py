"""Score models against their teacher: same captions, same seeds, one run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from decant.bench.machine import machine
from decant.bench.timer import peak_memory_mb
from decant.data.latents import Latents
from decant.data.picture import Aspect, View
from decant.errors import refuse
from decant.metrics.interval import bootstrap_mean
from decant.models.device import Device, pick
from decant.models.families.family import Family
from decant.models.families.of import family_of
from decant.models.generate import generate, pixels
from decant.models.layout import Pipeline
from decant.models.load import load
from decant.models.samplers import Drawing, Sampler
from decant.ranks import Ranks
from decant.stages.asked import Asked, Captions, HeldOut, asked
from decant.stages.bench import How, bench, drawn_as
from decant.stages.distances import Distances, distances
from decant.stages.encode import encode_data
from decant.stages.output_error import output_error
from decant.stages.pictures import save_picture
from decant.stages.progress import progress
from decant.stages.record import drawing_of, read_record
from decant.stages.samples import Sampling, drawer
from decant.stages.scoring import Drawn, Picture, number, scores, told
from decant.stages.stage import Inputs, Settings, Stage


class Evaluate(Settings):
    """What is asked of every model."""

    captions: Captions = Field(
        "auto",
        description="scenes: held-out scenes; data: the held-out pictures' captions; auto: data if given",
    )
    images: int = Field(128, ge=1, description="captions, one picture each")
    steps: int = Field(25, ge=1, description="of the sampler")
    guidance_scale: float = Field(7.5, ge=0, description="1 and below: without guidance")
    sampler: Sampler = Field("ddim", description="as-is: the model's own")
    sampling: Literal["recorded", "asked"] = Field(
        "recorded", description="recorded: a student of few steps is drawn as its record says; asked: as all others"
    )
    batch_size: int = Field(16, ge=1, description="pictures drawn at once")
    size: int | None = Field(None, ge=8, description="pixels; null: the network's own")
    shown: int = Field(12, ge=0, description="captions whose pictures the report shows")
    latency_repeats: int = Field(3, ge=0, description="0: no timing")
    held_out: float = Field(0.1, gt=0, lt=1, description="as the distillation had it")
    held_out_most: int = Field(64, ge=1, description="at most so many held-out pictures are measured")
    max_skipped: float = Field(0.1, ge=0, le=1, description="as the distillation had it")
    aspect: Aspect | Literal["auto"] = Field(
        "auto", description="how a held-out picture becomes a square; auto: as the students' distillation had it"
    )
    device: Device = Field("auto", description="auto: an accelerator if there is one")


def run(settings: Evaluate, inputs: Inputs, out: Path) -> dict[str, Any]:
    """Draw, score and time every model in ``inputs.models``, the teacher first; writes pictures and figures."""
    inputs.ranks.join()
    models = {"teacher": inputs.teacher, **{n: p for n, p in inputs.models.items() if n != "teacher"}}
    aspect = aspect_of(models) if settings.aspect == "auto" else settings.aspect
    index = inputs.kept / "index"
    held_out = HeldOut(inputs.data, settings.held_out, inputs.seed, settings.max_skipped, index, aspect)
    ask = inputs.ranks.on_first(lambda: asked(settings.captions, settings.images, held_out))
    device = pick(settings.device)
    teacher: Drawn | None = None
    apart: Distances | None = None
    rows: list[dict[str, Any]] = [
        {"caption": caption, "seed": seed, "models": {}} for caption, seed in zip(ask.captions, ask.seeds, strict=True)
    ][: settings.shown]
    entries: list[dict[str, Any]] = []
    proof = _Proof.of(settings, inputs, ask, device) if ask.held else None
    asked_for = Drawing(settings.steps, settings.guidance_scale, settings.sampler)
    recorded = {} if settings.sampling == "asked" else _recorded(models, inputs)
    with progress("drawing pictures", len(models) * len(ask.captions), inputs.talk) as tick:
        for place, (name, source) in enumerate(models.items()):
            pipeline = load(source).to(device)
            how = recorded.get(name, asked_for)
            pictures, error = _draw(pipeline, ask, settings, how, inputs.ranks), proof.scores(pipeline) if proof else {}
            tick((place + 1) * len(ask.captions), name)
            if not inputs.ranks.first:
                continue
            drawn = Drawn.of(pictures, ask)
            teacher = teacher or drawn
            apart = apart or distances(ask, teacher)
            found = scores(drawn, teacher) | apart.figures(drawn, teacher=drawn is teacher)
            found = error | found
            role, twin = role_of(name, models)
            control = {"control_of": twin} if twin else {}
            entries.append({"name": name, "role": role, **control, "scores": found})
            _show(rows, name, drawn, out)
            inputs.talk(f"{name}: {told(found)}")
    if not inputs.ranks.first:
        return {}
    left_out = [*_unread(ask, teacher), *(apart.left_out if apart else ())]
    if left_out:
        told_out = "; ".join(f"{item['score']} ({item['reason']}; {item['hint']})" for item in left_out)
        inputs.talk(f"left out: {told_out}")
    timed = _how(settings)
    own = {name: drawn_as(timed, each) for name, each in recorded.items()}
    measured = bench(models, timed, inputs.talk, own)
    return {
        "machine": machine(),
        "peak_memory_mb": round(peak_memory_mb().process_mb, 1),
        "models": [{**entry, **measured[entry["name"]]} for entry in entries],
        "left_out": left_out,
        "pictures": rows,
        "asked": {"captions": list(ask.captions), "seeds": list(ask.seeds), "scenes": ask.scenes},
    }


def _unread(ask: Asked, teacher: Drawn | None) -> list[dict[str, str]]:
    """Captions of scenes, and no scene accuracy: why."""
    if not ask.scenes or teacher is None or teacher.readings:
        return []
    height, width, _ = teacher.pictures[0].shape
    reason = f"the captions say scenes, and the checker reads 64 x 64, not {height} x {width}"
    return [{"score": "scene_accuracy", "reason": reason, "hint": "--set size=64, where the networks can draw that"}]


def _recorded(models: Mapping[str, str | Path], inputs: Inputs) -> dict[str, Drawing]:
    """How the students of few steps want to be drawn, told."""
    found = {name: how for name, source in models.items() if (how := drawing_of(source))}
    for name, how in found.items():
        inputs.talk(f"{name}: {how.told}, as its record says (sampling=asked for what is asked of all)")
    return found


def _draw(pipeline: Pipeline, ask: Asked, settings: Evaluate, how: Drawing, ranks: Ranks) -> list[Picture]:
    """All pictures, in order; each rank draws some of the batches."""
    shares = ranks.shares(len(ask.captions), settings.batch_size)
    mine = shares[ranks.rank]
    drawn = generate(
        pipeline,
        [ask.captions[place] for place in mine],
        [ask.seeds[place] for place in mine],
        steps=how.steps,
        guidance_scale=how.guidance_scale,
        sampler=how.sampler,
        batch_size=settings.batch_size,
        size=settings.size,
    )
    found: dict[int, Picture] = {}
    for places, pictures in zip(shares, ranks.gathered(list(drawn) if mine else []), strict=True):
        found |= zip(places, pictures, strict=True)
    return [found[place] for place in range(len(ask.captions))]


@dataclass(frozen=True)
class _Proof:
    """The teacher and held-out pictures, to measure every model's output error on."""

    family: Family
    teacher: torch.nn.Module
    held: Latents
    seed: int
    ranks: Ranks

    @classmethod
    def of(cls, settings: Evaluate, inputs: Inputs, ask: Asked, device: torch.device) -> "_Proof":
        assert ask.held is not None
        teacher = load(inputs.teacher).to(device)
        family = family_of(teacher)
        size = settings.size or pixels(teacher, None)[0]
        draws = drawer(teacher, size, Sampling("samples", settings.steps, settings.guidance_scale, inputs.seed), device)
        part, views = ask.held.first(settings.held_out_most), (View(ask.aspect),)
        held = encode_data(family, part, size, inputs, device, drawer=draws, views=views)
        return cls(family, teacher.unet, held, inputs.seed, inputs.ranks)

    def scores(self, pipeline: Pipeline) -> dict[str, dict[str, Any]]:
        says = family_of(pipeline).prediction
        error = output_error(
            self.family, pipeline.unet, self.teacher, self.held, self.seed, prediction=says, ranks=self.ranks
        )
        return {"output_error": number(bootstrap_mean(error.by_picture.tolist()))}


def aspect_of(models: Mapping[str, str | Path]) -> Aspect:
    """How pictures became squares when the students were distilled; the teacher does not count.

    Raises:
        UserError: they were not distilled alike.
    """
    found: dict[str, Aspect] = {}
    for name, source in models.items():
        record = read_record(source) if name != "teacher" else {}
        made = [stage for stage in (*record.get("lineage", []), record) if stage.get("stage") == "distill"]
        if made:
            found[name] = made[-1].get("settings", {}).get("aspect", "crop")
    if len(set(found.values())) > 1:
        told = ", ".join(f"{name} {aspect}" for name, aspect in found.items())
        hint = "name one for all, such as aspect=crop, or evaluate them apart"
        raise refuse("evaluate.aspect", f"auto, of students distilled as {told}", allowed="one for all", hint=hint)
    return next(iter(found.values()), "crop")


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


def _how(settings: Evaluate) -> How:
    return How(
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        sampler=settings.sampler,
        size=settings.size,
        repeats=settings.latency_repeats,
        device=settings.device,
    )


def _show(rows: list[dict[str, Any]], name: str, drawn: Drawn, out: Path) -> None:
    for index, row in enumerate(rows):
        file = f"pictures/{name}/{index}.png"
        save_picture(drawn.pictures[index], out / file)
        result = drawn.scores[index] if drawn.scores else None
        judged = {"correct": result.exact, "wrong": list(result.wrong)} if result else {"correct": None}
        row["models"][name] = {"file": file, **judged}


STAGE = Stage(settings=Evaluate, run=run, takes="many", gives_pipeline=False, data="optional", ranks="all")
