"""How a student is trained, whatever the method: its data encoded, its updates made and kept, its folder written."""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from decant.bench.timer import peak_memory_mb
from decant.data.batch import Batch
from decant.data.captioned import Captioned, split
from decant.data.latents import Latents
from decant.data.order import stream
from decant.data.picture import View
from decant.errors import refuse
from decant.models.device import pick
from decant.models.generate import generate, pixels
from decant.models.layout import Pipeline
from decant.models.load import cast, load, save, stored_dtype
from decant.models.projection import Projected
from decant.models.taps import Tapped
from decant.ranks import Ranks
from decant.stages.curve import Curve
from decant.stages.encode import encode_data
from decant.stages.interrupt import Interrupted, asked_to_stop
from decant.stages.lora import merged, write_lora
from decant.stages.midway import Midway, drawing
from decant.stages.pictures import save_strip
from decant.stages.players import Players
from decant.stages.progress import progress
from decant.stages.record import carried, data_of, figures_of
from decant.stages.samples import Sampling, drawer
from decant.stages.scan import scan_data
from decant.stages.stage import Inputs
from decant.stages.training_settings import Training, Updates
from decant.train.loop import Step, loop
from decant.train.method import Method
from decant.train.state import Precision, RunSettings, TrainState


@dataclass(frozen=True)
class Found:
    """Captioned pictures, and the parts of them that train and that are kept from training."""

    captioned: Captioned
    train: Captioned
    held: Captioned

    @property
    def shown(self) -> tuple[str, ...]:
        """Captions of sample pictures."""
        return tuple(dict.fromkeys(self.held.captions))[:4]


@dataclass(frozen=True)
class Encoded:
    """The parts as latents and conditions. cut: captions that the text encoder cannot read to their end."""

    train: Latents
    held: Latents
    cut: int


def look(settings: Training, inputs: Inputs, out: Path) -> Found:
    """See what there is to train on, with what cannot be had refused before anything is encoded."""
    inputs.ranks.join()
    check_ranks(settings, inputs.ranks)
    run_settings(settings, inputs.seed)
    captioned = inputs.ranks.on_first(lambda: scan_data(inputs, settings.max_skipped, out))
    return Found(captioned, *split(captioned, settings.held_out, inputs.seed))


def encode(players: Players, settings: Training, inputs: Inputs, found: Found) -> Encoded:
    """Both parts as latents and text embeddings, which the cache keeps."""
    told = [caption for part in (found.train, found.held) for choices in part.choices for caption in choices]
    cut = _cut_captions(players, told, inputs)
    teacher, device = players.teacher, pick(settings.device)
    size = settings.size or pixels(teacher, None)[0]
    _check_size(size, teacher)
    sampling = Sampling(settings.prompts, settings.prompt_steps, settings.prompt_guidance_scale, inputs.seed)
    draws = drawer(teacher, size, sampling, device)
    several, plain = View.several(settings.aspect, settings.crops, flip=settings.flip), (View(settings.aspect),)
    train = encode_data(players.family, found.train, size, inputs, device, "training", draws, several)
    kept = found.held.first(settings.held_out_most)
    return Encoded(train, encode_data(players.family, kept, size, inputs, device, "held-out", draws, plain), cut)


class Samples(Protocol):
    """What is trained on: so many samples, any of them as a batch."""

    @property
    def n(self) -> int: ...

    def batch(self, samples: tuple[int, ...]) -> Batch: ...


def train(
    method: Method, data: Samples, settings: Updates, run: RunSettings, inputs: Inputs, midway: Midway | None = None
) -> Curve:
    """Train the student to its end, and leave nothing of the training but that; gives the curve."""
    state = TrainState.start(
        method, run, device=settings.device, trackers=settings.trackers, folder=inputs.work,
        extra={"batch_size": settings.batch_size, "accumulation": settings.accumulation, "pictures": data.n},
    )  # fmt: skip
    most = settings.batch_size

    def batches(step: int) -> list[Batch]:
        """This rank's part of the update's samples, which are the same for any number of ranks."""
        mine = inputs.ranks.part(stream(inputs.seed, step, most * settings.accumulation, data.n))
        return [data.batch(tuple(mine[start : start + most])) for start in range(0, len(mine), most)]

    student, updates = next(iter(method.players)), settings.steps * sum(p.updates_each for p in method.players.values())
    if state.resume(inputs.work):
        inputs.talk(f"goes on from the checkpoint of step {state.updates[student]}")
    log = Curve(inputs.work / "losses.jsonl" if inputs.ranks.first else None, state.step, updates)
    with progress("distilling", settings.steps, inputs.talk) as tick, log:
        for step in guarded(loop(method, batches, state), state, inputs, settings.checkpoints):
            log.add(step)
            if step.player != student:
                continue
            done = state.updates[student]
            tick(done, f"loss {step.total:.4f}  {step.images_per_second:.1f} pictures/s")
            if done % settings.checkpoint_every == 0 or done == settings.steps:
                state.save(inputs.work, settings.checkpoints)
            if midway is not None and inputs.ranks.first:
                _beside(state, inputs, midway)
    finish(method, state)
    return log


def guarded(steps: Iterator[Step], state: TrainState, inputs: Inputs, checkpoints: int) -> Iterator[Step]:
    """Ctrl-C and the like wait for the end of the update, then save: half an update could not be resumed."""
    with asked_to_stop() as stop:
        for step in steps:
            yield step
            if inputs.ranks.any(stop.number is not None):  # all ranks stop after the same step, or they would wait
                state.save(inputs.work, checkpoints)
                inputs.talk(f"saved at step {state.updates['student']} of {state.run.steps}")
                stop.check()
                raise Interrupted(signal.SIGTERM)  # another rank was asked


def finish(method: Method, state: TrainState) -> None:
    """Leave the student with the weights to ship, the average where one was kept, and both networks without taps."""
    student = method.players["student"].module
    if "student" in state.ema:
        state.ema["student"].copy_to(student)
    student.requires_grad_(False).eval()
    for parameter in student.parameters():  # gradients go, and what lay channels last is stored as others store it
        parameter.grad, parameter.data = None, parameter.data.contiguous()
    for module in (student, *method.frozen.values()):
        if isinstance(module, Tapped | Projected):
            module.close()


def _beside(state: TrainState, inputs: Inputs, midway: Midway) -> None:
    """Sample pictures and an evaluation, where this step has them."""
    settings, done = midway.settings, state.updates["student"]
    if settings.sample_every and done % settings.sample_every == 0:
        _sample(state, inputs, midway)
    if settings.evaluate_every and (done % settings.evaluate_every == 0 or done == settings.steps):
        midway.at(state)


def _sample(state: TrainState, inputs: Inputs, midway: Midway) -> None:
    """A strip of the student's pictures, with the averaged weights where an average is kept."""
    how, captions = midway.student, midway.players.captions
    with drawing(state, midway.players) as pipeline:
        drawn = generate(
            pipeline,
            captions,
            range(len(captions)),
            steps=how.steps,
            guidance_scale=how.guidance_scale,
            sampler=how.sampler,
        )
        pictures = list(drawn)
    save_strip(pictures, inputs.work / "samples" / f"step-{state.updates['student']:06d}.png")


def ship(players: Players, settings: Training, inputs: Inputs, out: Path) -> tuple[Players, dict[str, Any]]:
    """What is left of a training: the student as it is stored, and what the record says of its LoRA, if it is one.

    A LoRA is written alone, in both formats, and merged.
    """
    if precision_of(settings) != "no" or settings.teacher_precision:  # the trainer has cast the teacher
        players.teacher.register_modules(unet=load(inputs.teacher).unet)
    lora, said = settings.lora, {}
    if lora is not None:
        said = {"lora": inputs.ranks.on_first(lambda: write_lora(players.student, lora, out))}
        players = replace(players, student=merged(players.teacher, inputs.source, out))
    stored = stored_dtype(inputs.teacher)
    nn.Module.to(players.student, dtype=stored).float()  # so that what is measured is what is stored
    return players, said


def save_student(players: Players, inputs: Inputs, out: Path) -> None:
    """The student's pipeline folder, in the teacher's dtype."""
    save(cast(players.drawing_with(players.student), stored_dtype(inputs.teacher)), out)


def record_of(
    players: Players, inputs: Inputs, found: Found, encoded: Encoded, curve: Curve, midway: Midway
) -> dict[str, Any]:
    """What every training says of itself."""
    evaluated = {"evaluations": midway.history, "step": midway.best_step} if midway.history else {}
    return {
        "family": players.family.name,
        **_data_record(inputs, found.captioned, encoded),
        "figures": figures_of(players.student, players.family.tokens),
        "training": curve.thinned(),
        "pace": {
            "images_per_second": round(curve.images_per_second, 2),
            "peak_memory_mb": round(peak_memory_mb().process_mb, 1),
        },
        **evaluated,
    }


def precision_of(settings: Updates) -> Precision:
    """Of the forward passes: what auto means here."""
    if settings.precision != "auto":
        return settings.precision
    return "fp16" if pick(settings.device).type == "cuda" else "no"


def run_settings(settings: Training, seed: int) -> RunSettings:
    """What the settings of a UNet's training ask of the trainer.

    Raises:
        UserError: updates in the backward pass and accumulation at once.
    """
    if settings.optimizer_in_backward and settings.accumulation > 1:
        hint = "set accumulation=1, or optimizer_in_backward=false"
        allowed = "1: the first batch's gradient is gone when the second's comes"
        raise refuse("accumulation", settings.accumulation, allowed=allowed, hint=hint)
    return replace(
        plain_run(settings, seed),
        optimizer=settings.optimizer,
        in_backward=settings.optimizer_in_backward,
        weights=settings.weights,
        teacher_precision=settings.teacher_precision,
    )


def plain_run(settings: Updates, seed: int) -> RunSettings:
    """What every training asks of the trainer."""
    return RunSettings(
        steps=settings.steps,
        seed=seed,
        lr=settings.learning_rate,
        schedule=settings.schedule,
        warmup=settings.warmup,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        precision=precision_of(settings),
        compile=settings.compile,
        fast_products=settings.fast_products,
        channels_last=settings.channels_last,
    )


def check_ranks(settings: Updates, ranks: Ranks) -> None:
    """Refuse an update of fewer pictures than there are processes."""
    update = settings.batch_size * settings.accumulation
    if update < ranks.count:
        hint = "raise batch_size or accumulation, or start fewer processes"
        allowed = f"at least {ranks.count}, a picture for every rank"
        raise refuse("batch_size x accumulation", update, allowed=allowed, hint=hint)


def _check_size(size: int, pipeline: Pipeline) -> None:
    smallest = pipeline.vae_scale_factor * 2 ** (len(pipeline.unet.config["block_out_channels"]) - 1)
    if size % smallest:
        raise refuse(
            "size",
            size,
            allowed=f"a multiple of {smallest}",
            hint="the UNet halves the latent at every level",
        )


def _cut_captions(players: Players, captions: Sequence[str], inputs: Inputs) -> int:
    """How many captions the text encoder cannot read to their end, told."""
    longest = players.family.tokens
    cut = sum(n > longest for n in players.family.lengths(captions))
    if cut:
        inputs.talk(f"{cut} of {len(captions)} captions are longer than the {longest} tokens that are read: cut there")
    return cut


def _data_record(inputs: Inputs, captioned: Captioned, encoded: Encoded) -> dict[str, Any]:
    replaced = [item for part in (encoded.train, encoded.held) for item in part.replaced]
    counts = {"used": encoded.train.n, "held_out": encoded.held.n, "captions_cut": encoded.cut}
    return {**carried(inputs.source), "data": data_of(inputs.data, captioned.skipped, replaced, **counts)}
