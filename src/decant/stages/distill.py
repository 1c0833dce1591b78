"""Distil a student from its teacher on captioned pictures."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from pydantic import Field
from torch import nn

from decant.data.batch import Batch
from decant.data.folder import Captioned, split
from decant.data.latents import Latents
from decant.data.order import stream
from decant.errors import refuse
from decant.methods.kd import KD, Knobs
from decant.models.device import Device, pick
from decant.models.families.family import Family
from decant.models.families.of import family_of
from decant.models.generate import generate
from decant.models.layout import Pipeline
from decant.models.load import cast, load, save, stored_dtype, with_unet
from decant.models.taps import Tapped
from decant.stages.curve import Curve
from decant.stages.encode import encode_data
from decant.stages.interrupt import asked_to_stop
from decant.stages.output_error import output_error
from decant.stages.pictures import save_strip
from decant.stages.progress import progress
from decant.stages.record import figures_of, inherited, read_record, surgery_map_of
from decant.stages.scan import scan_data
from decant.stages.stage import Inputs, Settings, Stage
from decant.train.loop import Step, loop
from decant.train.optimizers import LRSchedule
from decant.train.state import Precision, RunSettings, TrainState


class Distill(Settings):
    """How to distil. Weights of terms, optimiser, data; defaults are BK-SDM's own where it states one."""

    steps: int = Field(1000, ge=1, description="updates of the student")
    batch_size: int = Field(16, ge=1, description="pictures in one forward")
    accumulation: int = Field(
        1, ge=1, description="forwards in one update: an update sees batch_size x accumulation pictures"
    )
    size: int | None = Field(None, ge=8, description="pixels; None: the network's own")
    task: float = Field(1.0, ge=0, description="weight of the error to the noise itself")
    output: float = Field(1.0, ge=0, description="weight of the error to the teacher's output")
    feature: float = Field(1.0, ge=0, description="weight of the error to the paired features")
    min_snr_gamma: float | None = Field(
        None, gt=0, description="weigh task and output by min-SNR with this gamma; null: all timesteps alike"
    )
    caption_dropout: float = Field(
        0.0,
        ge=0,
        le=1,
        description="part of the pictures trained without their caption, so that guidance keeps working",
    )
    teacher_guidance_scale: float | None = Field(
        None, gt=1, description="learn the teacher's guided output at this scale; null: the plain one"
    )
    learning_rate: float = Field(5e-5, gt=0, description="of AdamW, at its highest")
    schedule: LRSchedule = Field("constant", description="how the learning rate goes over the steps")
    warmup: int = Field(0, ge=0, description="steps in which it grows from nothing")
    weight_decay: float = Field(1e-2, ge=0, description="of AdamW")
    clip: float | None = Field(1.0, gt=0, description="largest norm of the gradient; null: not clipped")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of the average of the weights that is shipped in their place; null: none"
    )
    precision: Precision = Field("no", description="mixed precision; no: float32")
    compile: bool = Field(False, description="torch.compile: a minute to begin with, then a faster step")
    fast_products: bool = Field(False, description="on a CPU: products of bfloat16 factors, attention unfused")
    gradient_checkpointing: bool = Field(False, description="less memory for activations, a slower step")
    device: Device = Field("auto", description="auto: an accelerator if there is one")
    held_out: float = Field(0.1, gt=0, lt=1, description="part of the pictures kept for the proof")
    held_out_most: int = Field(64, ge=1, description="at most so many of them are measured")
    max_skipped: float = Field(
        0.1, ge=0, le=1, description="refuse the folder when more than this part of it cannot be used"
    )
    checkpoint_every: int = Field(500, ge=1, description="steps; what a power cut can cost at most")
    checkpoints: int = Field(2, ge=1, description="how many of the last ones stay")
    sample_every: int | None = Field(
        None, ge=1, description="steps between strips of sample pictures beside the checkpoints; null: none"
    )
    sample_steps: int = Field(25, ge=1, description="sampler steps of a sample picture")
    trackers: tuple[Literal["tensorboard", "wandb", "aim", "mlflow"], ...] = Field(
        (), description="log to these as well, through Accelerate"
    )


# What SDXL's networks are told besides the text: one of another kind cannot take the teacher's conditions.
_TOLD = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")


@dataclass(frozen=True)
class _Players:
    """What a run is made of, opened, and the captions of its sample pictures."""

    teacher: Pipeline
    student: UNet2DConditionModel
    family: Family
    captions: tuple[str, ...]


def run(settings: Distill, inputs: Inputs, out: Path) -> dict[str, Any]:
    """Train the student in ``inputs.source`` towards ``inputs.teacher``; writes the student's pipeline folder.

    Goes on from the newest checkpoint in ``inputs.work``. The output error on held-out pictures is measured before
    and after.
    """
    captioned = scan_data(inputs, settings.max_skipped, out)
    train_part, held_part = split(captioned, settings.held_out, inputs.seed)
    players = _open(settings, inputs, tuple(dict.fromkeys(held_part.captions))[:4])
    device = pick(settings.device)
    cut = _cut_captions(players, [*train_part.captions, *held_part.captions], inputs)
    train, held = _encode(players, settings, inputs, device, train_part, held_part.first(settings.held_out_most))
    proof = _Proof(players, held, inputs.seed, device)
    before = proof.measure(players.student)
    method = _method(settings, inputs, players)
    state = TrainState.start(
        method, _run_settings(settings, inputs), device=settings.device, trackers=settings.trackers, folder=inputs.work,
        extra={"batch_size": settings.batch_size, "accumulation": settings.accumulation, "pictures": train.n},
    )  # fmt: skip
    curve = _train(method, train, state, settings, inputs, players)
    _finish(method, state)
    if settings.precision != "no":  # the trainer has cast the teacher
        players.teacher.register_modules(unet=load(inputs.teacher).unet)
    stored = stored_dtype(inputs.teacher)
    nn.Module.to(players.student, dtype=stored).float()  # so that what is measured is what is stored
    after = proof.measure(players.student)
    inputs.talk(f"held-out output error to the teacher: {before:.5f} cut, {after:.5f} distilled")
    save(cast(with_unet(players.teacher, players.student), stored), out)
    return {
        "family": players.family.name,
        **_record(inputs, captioned, {"used": train.n, "held_out": held.n, "captions_cut": cut}),
        "figures": figures_of(players.student, players.family.tokens),
        "held_out": {"n": held.n, "output_error_before": before, "output_error_after": after},
        "training": curve,
    }


def _open(settings: Distill, inputs: Inputs, captions: tuple[str, ...]) -> _Players:
    teacher = load(inputs.teacher)
    student = load(inputs.source).unet
    for name in ("in_channels", "out_channels", "cross_attention_dim", *_TOLD):
        own, theirs = student.config[name], teacher.unet.config[name]
        if own != theirs:
            raise refuse(
                f"student {inputs.source}: {name}",
                own,
                allowed=f"{theirs}, as the teacher's",
                hint="cut the student from this teacher",
            )
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    return _Players(teacher, student, family_of(teacher), captions)


def _method(settings: Distill, inputs: Inputs, players: _Players) -> KD:
    known = surgery_map_of(inputs.source)
    if settings.feature and known is None:
        raise refuse(
            f"student {inputs.source}",
            "no surgery map in its decant.json",
            allowed="a student that decant cut",
            hint="`decant prune` writes the map that pairs layers; or set feature=0",
        )
    knobs = Knobs(
        task=settings.task,
        output=settings.output,
        feature=settings.feature,
        min_snr_gamma=settings.min_snr_gamma,
        caption_dropout=settings.caption_dropout,
        guidance_scale=settings.teacher_guidance_scale,
        ema=settings.ema,
    )
    return KD.of(players.family, players.student, players.teacher.unet, known.features if known else {}, knobs)


def _run_settings(settings: Distill, inputs: Inputs) -> RunSettings:
    return RunSettings(
        steps=settings.steps,
        seed=inputs.seed,
        lr=settings.learning_rate,
        schedule=settings.schedule,
        warmup=settings.warmup,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        precision=settings.precision,
        compile=settings.compile,
        fast_products=settings.fast_products,
    )


def _encode(
    players: _Players,
    settings: Distill,
    inputs: Inputs,
    device: torch.device,
    train: Captioned,
    held: Captioned,
) -> tuple[Latents, Latents]:
    """Both parts as latents and text embeddings, which the cache keeps."""
    teacher = players.teacher
    size = settings.size or int(teacher.unet.config["sample_size"]) * teacher.vae_scale_factor
    _check_size(size, teacher)
    parts = {"training": train, "held-out": held}
    encoded = [encode_data(players.family, part, size, inputs, device, name) for name, part in parts.items()]
    return encoded[0], encoded[1]


def _check_size(size: int, pipeline: Pipeline) -> None:
    smallest = pipeline.vae_scale_factor * 2 ** (len(pipeline.unet.config["block_out_channels"]) - 1)
    if size % smallest:
        raise refuse(
            "distill.size",
            size,
            allowed=f"a multiple of {smallest}",
            hint="the UNet halves the latent at every level",
        )


@dataclass(frozen=True)
class _Proof:
    """The output error to the teacher on pictures that training never sees."""

    players: _Players
    held: Latents
    seed: int
    device: torch.device

    def measure(self, student: nn.Module) -> float:
        teacher: nn.Module = self.players.teacher.unet
        teacher.to(self.device)
        student.to(self.device)
        return output_error(self.players.family, student, teacher, self.held, self.seed).mean


def _train(
    method: KD, data: Latents, state: TrainState, settings: Distill, inputs: Inputs, players: _Players
) -> list[dict[str, Any]]:
    def batches(step: int) -> list[Batch]:
        first = step * settings.accumulation
        numbers = range(first, first + settings.accumulation)
        return [data.batch(stream(inputs.seed, number, settings.batch_size, data.n)) for number in numbers]

    if state.resume(inputs.work):
        inputs.talk(f"goes on from the checkpoint of step {state.step}")
    log = Curve(inputs.work / "losses.jsonl", state.step, settings.steps)
    with progress("distilling", settings.steps, inputs.talk) as tick, log:
        for step in _guarded(loop(method, batches, state), state, settings, inputs):
            log.add(step)
            tick(step.step, f"loss {step.total:.4f}  {step.images_per_second:.1f} pictures/s")
            if step.step % settings.checkpoint_every == 0 or step.step == settings.steps:
                state.save(inputs.work, settings.checkpoints)
            if settings.sample_every and step.step % settings.sample_every == 0:
                _sample(step.step, state, settings, inputs, players)
    return log.thinned()


def _guarded(steps: Iterator[Step], state: TrainState, settings: Distill, inputs: Inputs) -> Iterator[Step]:
    """Ctrl-C and the like wait for the end of the update, then save: half an update could not be resumed."""
    with asked_to_stop() as stop:
        for step in steps:
            yield step
            if stop.number is not None:
                state.save(inputs.work, settings.checkpoints)
                inputs.talk(f"saved at step {state.step} of {settings.steps}")
                stop.check()


def _finish(method: KD, state: TrainState) -> None:
    """Leave the student with the weights to ship, the average where one was kept, and both networks without taps."""
    student = method.players["student"].module
    if "student" in state.ema:
        state.ema["student"].copy_to(student)
    student.requires_grad_(False).eval()
    for module in (student, *method.frozen.values()):
        if isinstance(module, Tapped):
            module.close()


def _sample(step: int, state: TrainState, settings: Distill, inputs: Inputs, players: _Players) -> None:
    """A strip of the student's pictures, with the averaged weights where an average is kept."""
    average = state.ema.get("student")
    shown = average.applied(state.players["student"].module) if average else nullcontext()
    pipeline = with_unet(players.teacher, players.student)
    with shown, torch.no_grad():
        players.student.eval()
        for encoder in sum(players.family.encoders().values(), ()):
            nn.Module.to(encoder, players.student.device)
        pictures = list(generate(pipeline, players.captions, range(len(players.captions)), steps=settings.sample_steps))
        players.student.train()
    save_strip(pictures, inputs.work / "samples" / f"step-{step:06d}.png")


def _cut_captions(players: _Players, captions: Sequence[str], inputs: Inputs) -> int:
    """How many captions the text encoder cannot read to their end, told."""
    longest = players.family.tokens
    cut = sum(n > longest for n in players.family.lengths(captions))
    if cut:
        inputs.talk(f"{cut} of {len(captions)} captions are longer than the {longest} tokens that are read: cut there")
    return cut


def _record(inputs: Inputs, captioned: Captioned, counts: dict[str, int]) -> dict[str, Any]:
    parent = read_record(inputs.source)
    kept: dict[str, Any] = {key: parent[key] for key in ("student", "changes", "surgery_map") if key in parent}
    skipped = [{"name": item.name, "reason": item.reason} for item in captioned.skipped]
    return {**kept, **inherited(inputs.source), "data": {"path": str(inputs.data), **counts, "skipped": skipped}}


STAGE = Stage(settings=Distill, run=run, data="required")
