"""Distil a student from its teacher on captioned pictures."""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from decant.bench.timer import peak_memory_mb
from decant.data.batch import Batch
from decant.data.captioned import Captioned, split
from decant.data.latents import Latents
from decant.data.order import stream
from decant.data.picture import View
from decant.errors import refuse
from decant.methods.kd import KD
from decant.models.device import pick
from decant.models.generate import generate, pixels
from decant.models.layout import Pipeline
from decant.models.load import cast, load, save, stored_dtype
from decant.models.projection import Projected
from decant.models.taps import Tapped
from decant.ranks import Ranks
from decant.stages.curve import Curve
from decant.stages.distill_settings import Distill, values_of
from decant.stages.encode import encode_data
from decant.stages.interrupt import Interrupted, asked_to_stop
from decant.stages.lora import merged, write_lora
from decant.stages.midway import Midway, drawing
from decant.stages.output_error import output_error
from decant.stages.pictures import save_strip
from decant.stages.players import Players, method_of, open_players
from decant.stages.progress import progress
from decant.stages.record import figures_of, inherited, read_record
from decant.stages.samples import Sampling, drawer
from decant.stages.scan import scan_data
from decant.stages.stage import Inputs, Stage
from decant.train.loop import Step, loop
from decant.train.state import Precision, RunSettings, TrainState

_PROOF_AT_ONCE = 16  # pictures; fewer where training takes fewer for its memory's sake


def run(settings: Distill, inputs: Inputs, out: Path) -> dict[str, Any]:
    """Train the student in ``inputs.source`` towards ``inputs.teacher``; writes the student's pipeline folder.

    Goes on from the newest checkpoint in ``inputs.work``. The output error on held-out pictures is measured before
    and after.
    """
    ranks = inputs.ranks
    ranks.join()
    _check_ranks(settings, ranks)
    run_settings(settings, inputs.seed)  # refuses what cannot be had together, before anything is encoded
    captioned = ranks.on_first(lambda: scan_data(inputs, settings.max_skipped, out))
    train_part, held_part = split(captioned, settings.held_out, inputs.seed)
    players = open_players(settings, inputs, tuple(dict.fromkeys(held_part.captions))[:4])
    method = method_of(settings, inputs, players)
    device = pick(settings.device)
    told = [caption for part in (train_part, held_part) for choices in part.choices for caption in choices]
    cut = _cut_captions(players, told, inputs)
    train, held = _encode(players, settings, inputs, device, train_part, held_part.first(settings.held_out_most))
    proof = _Proof(players, held, inputs.seed, device, ranks, proof_batch(settings))
    before = proof.measure(players.student)
    midway = Midway(settings, inputs, players)
    curve = _train(method, train, settings, inputs, midway)
    ranks.meet()  # what the first rank has evaluated on the way is written
    best = midway.take_best(players.student)
    if precision_of(settings) != "no" or settings.teacher_precision:  # the trainer has cast the teacher
        players.teacher.register_modules(unet=load(inputs.teacher).unet)
    lora_of = settings.lora
    lora = ranks.on_first(lambda: write_lora(players.student, lora_of, out)) if lora_of is not None else None
    if lora:
        players = replace(players, student=merged(players.teacher, inputs.source, out))
        proof = replace(proof, players=players)
    stored = stored_dtype(inputs.teacher)
    nn.Module.to(players.student, dtype=stored).float()  # so that what is measured is what is stored
    after = proof.measure(players.student)
    inputs.talk(f"held-out output error to the teacher: {before:.5f} cut, {after:.5f} distilled")
    if not ranks.first:
        return {}
    save(cast(players.drawing_with(players.student), stored), out)
    return {
        "family": players.family.name,
        **_record(inputs, captioned, {"used": train.n, "held_out": held.n, "captions_cut": cut}, (train, held)),
        "figures": figures_of(players.student, players.family.tokens),
        "held_out": {"n": held.n, "output_error_before": before, "output_error_after": after},
        "training": curve.thinned(),
        "pace": {
            "images_per_second": round(curve.images_per_second, 2),
            "peak_memory_mb": round(peak_memory_mb().process_mb, 1),
        },
        **({"lora": lora} if lora else {}),
        **({"evaluations": midway.history, "step": best} if best else {}),
    }


def precision_of(settings: Distill) -> Precision:
    """Of the forward passes: what auto means here."""
    if settings.precision != "auto":
        return settings.precision
    return "fp16" if pick(settings.device).type == "cuda" else "no"


def _check_ranks(settings: Distill, ranks: Ranks) -> None:
    update = settings.batch_size * settings.accumulation
    if update < ranks.count:
        hint = "raise batch_size or accumulation, or start fewer processes"
        allowed = f"at least {ranks.count}, a picture for every rank"
        raise refuse("distill.batch_size x accumulation", update, allowed=allowed, hint=hint)
    if ranks.count > 1 and not any(map(any, map(values_of, (settings.task, settings.output)))):
        hint = "a small weight will do"
        raise refuse("distill.task and distill.output", "both 0 on several ranks", allowed="one above 0", hint=hint)


def proof_batch(settings: Distill) -> int:
    """Held-out pictures in one forward."""
    return min(_PROOF_AT_ONCE, settings.batch_size)


def run_settings(settings: Distill, seed: int) -> RunSettings:
    """What the settings ask of the trainer.

    Raises:
        UserError: updates in the backward pass and accumulation at once.
    """
    if settings.optimizer_in_backward and settings.accumulation > 1:
        hint = "set accumulation=1, or optimizer_in_backward=false"
        allowed = "1: the first batch's gradient is gone when the second's comes"
        raise refuse("distill.accumulation", settings.accumulation, allowed=allowed, hint=hint)
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
        optimizer=settings.optimizer,
        in_backward=settings.optimizer_in_backward,
        weights=settings.weights,
        teacher_precision=settings.teacher_precision,
        channels_last=settings.channels_last,
    )


def _encode(
    players: Players,
    settings: Distill,
    inputs: Inputs,
    device: torch.device,
    train: Captioned,
    held: Captioned,
) -> tuple[Latents, Latents]:
    """Both parts as latents and text embeddings, which the cache keeps."""
    teacher = players.teacher
    size = settings.size or pixels(teacher, None)[0]
    _check_size(size, teacher)
    views = {"training": View.several(settings.aspect, settings.crops, flip=settings.flip)}
    parts = {"training": train, "held-out": held}
    sampling = Sampling(settings.prompts, settings.prompt_steps, settings.prompt_guidance_scale, inputs.seed)
    draws = drawer(teacher, size, sampling, device)
    plain = (View(settings.aspect),)
    encoded = [
        encode_data(players.family, part, size, inputs, device, name, draws, views.get(name, plain))
        for name, part in parts.items()
    ]
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

    players: Players
    held: Latents
    seed: int
    device: torch.device
    ranks: Ranks
    at_once: int

    def measure(self, student: nn.Module) -> float:
        teacher: nn.Module = self.players.teacher.unet
        teacher.to(self.device)
        student.to(self.device)
        family = self.players.family
        says = self.players.prediction
        return output_error(family, student, teacher, self.held, self.seed, self.at_once, says, self.ranks).mean


def _train(method: KD, data: Latents, settings: Distill, inputs: Inputs, midway: Midway) -> Curve:
    """Train the student to its end, and leave nothing of the training but that; gives the curve."""
    state = TrainState.start(
        method, run_settings(settings, inputs.seed), device=settings.device, trackers=settings.trackers,
        folder=inputs.work,
        extra={"batch_size": settings.batch_size, "accumulation": settings.accumulation, "pictures": data.n},
    )  # fmt: skip
    most = settings.batch_size

    def batches(step: int) -> list[Batch]:
        """This rank's part of the update's samples, which are the same for any number of ranks."""
        mine = inputs.ranks.part(stream(inputs.seed, step, most * settings.accumulation, data.n))
        return [data.batch(tuple(mine[start : start + most])) for start in range(0, len(mine), most)]

    if state.resume(inputs.work):
        inputs.talk(f"goes on from the checkpoint of step {state.step}")
    log = Curve(inputs.work / "losses.jsonl" if inputs.ranks.first else None, state.step, settings.steps)
    with progress("distilling", settings.steps, inputs.talk) as tick, log:
        for step in _guarded(loop(method, batches, state), state, settings, inputs):
            log.add(step)
            tick(step.step, f"loss {step.total:.4f}  {step.images_per_second:.1f} pictures/s")
            if step.step % settings.checkpoint_every == 0 or step.step == settings.steps:
                state.save(inputs.work, settings.checkpoints)
            if not inputs.ranks.first:
                continue
            if settings.sample_every and step.step % settings.sample_every == 0:
                _sample(state, settings, inputs, midway.players)
            if settings.evaluate_every and (step.step % settings.evaluate_every == 0 or step.step == settings.steps):
                midway.at(state)
    _finish(method, state)
    return log


def _guarded(steps: Iterator[Step], state: TrainState, settings: Distill, inputs: Inputs) -> Iterator[Step]:
    """Ctrl-C and the like wait for the end of the update, then save: half an update could not be resumed."""
    with asked_to_stop() as stop:
        for step in steps:
            yield step
            if inputs.ranks.any(stop.number is not None):  # all ranks stop after the same step, or they would wait
                state.save(inputs.work, settings.checkpoints)
                inputs.talk(f"saved at step {state.step} of {settings.steps}")
                stop.check()
                raise Interrupted(signal.SIGTERM)  # another rank was asked


def _finish(method: KD, state: TrainState) -> None:
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


def _sample(state: TrainState, settings: Distill, inputs: Inputs, players: Players) -> None:
    """A strip of the student's pictures, with the averaged weights where an average is kept."""
    with drawing(state, players) as pipeline:
        captions = players.captions
        pictures = list(generate(pipeline, captions, range(len(captions)), steps=settings.sample_steps))
    save_strip(pictures, inputs.work / "samples" / f"step-{state.step:06d}.png")


def _cut_captions(players: Players, captions: Sequence[str], inputs: Inputs) -> int:
    """How many captions the text encoder cannot read to their end, told."""
    longest = players.family.tokens
    cut = sum(n > longest for n in players.family.lengths(captions))
    if cut:
        inputs.talk(f"{cut} of {len(captions)} captions are longer than the {longest} tokens that are read: cut there")
    return cut


def _record(inputs: Inputs, captioned: Captioned, counts: dict[str, int], parts: Sequence[Latents]) -> dict[str, Any]:
    parent = read_record(inputs.source)
    kept: dict[str, Any] = {key: parent[key] for key in ("student", "changes", "surgery_map") if key in parent}
    lists = {"skipped": captioned.skipped, "replaced": [item for part in parts for item in part.replaced]}
    named = {key: [{"name": item.name, "reason": item.reason} for item in items] for key, items in lists.items()}
    return {**kept, **inherited(inputs.source), "data": {"path": str(inputs.data), **counts, **named}}


STAGE = Stage(settings=Distill, run=run, data="required", ranks="all")
