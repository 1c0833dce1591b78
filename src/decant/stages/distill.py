"""Distil a student from its teacher on captioned pictures."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from decant.data.latents import Latents
from decant.errors import refuse
from decant.models.device import pick
from decant.models.samplers import Drawing
from decant.ranks import Ranks
from decant.stages.distill_method import method_of
from decant.stages.distill_settings import Distill, values_of
from decant.stages.midway import Midway
from decant.stages.output_error import output_error
from decant.stages.players import Players, later_teachers, open_players
from decant.stages.record import drawing_of
from decant.stages.stage import Inputs, Stage
from decant.stages.training import encode, look, record_of, run_settings, save_student, ship, train

_PROOF_AT_ONCE = 16  # pictures; fewer where training takes fewer for its memory's sake


def run(settings: Distill, inputs: Inputs, out: Path) -> dict[str, Any]:
    """Train the student in ``inputs.source`` towards ``inputs.teacher``; writes the student's pipeline folder.

    Goes on from the newest checkpoint in ``inputs.work``. The output error on held-out pictures is measured before
    and after.
    """
    ranks = inputs.ranks
    _check_terms(settings, ranks)
    found = look(settings, inputs, out)
    players = open_players(settings, inputs, found.shown)
    players = replace(players, prediction=settings.prediction or players.prediction)
    others = later_teachers([each.teacher for each in settings.next_teachers], players.teacher, inputs)
    method = method_of(settings, inputs, players, others)
    encoded = encode(players, settings, inputs, found)
    proof = _Proof(players, encoded.held, inputs.seed, pick(settings.device), ranks, proof_batch(settings))
    before = proof.measure(players.student)
    few = drawing_of(inputs.teacher)
    usual = few or Drawing(settings.sample_steps, settings.evaluate_guidance_scale)
    own = _own_drawing(settings) or few
    midway = Midway(settings, inputs, players, own or usual, usual)
    curve = train(method, encoded.train, settings, run_settings(settings, inputs.seed), inputs, midway)
    ranks.meet()  # what the first rank has evaluated on the way is written
    midway.take_best(players.student)
    players, said = ship(players, settings, inputs, out)
    after = replace(proof, players=players).measure(players.student)
    inputs.talk(f"held-out output error to the teacher: {before:.5f} cut, {after:.5f} distilled")
    if not ranks.first:
        return {}
    save_student(players, inputs, out)
    held_out = {"n": encoded.held.n, "output_error_before": before, "output_error_after": after}
    sampling = {"sampling": own.to_json()} if own else {}
    return {**record_of(players, inputs, found, encoded, curve, midway), "held_out": held_out, **said, **sampling}


def _own_drawing(settings: Distill) -> Drawing | None:
    """What the settings say of drawing the student: its guidance learned, or its sampler set. None: as its teacher."""
    guided = settings.teacher_guidance_scale is not None
    if not guided and settings.sampler is None:
        return None
    guidance_scale = 1.0 if guided else settings.evaluate_guidance_scale
    return Drawing(settings.sample_steps, guidance_scale, "ddim" if settings.sampler is None else "as-is")


def _check_terms(settings: Distill, ranks: Ranks) -> None:
    if ranks.count > 1 and not any(map(any, map(values_of, (settings.task, settings.output)))):
        hint = "a small weight will do"
        raise refuse("distill.task and distill.output", "both 0 on several ranks", allowed="one above 0", hint=hint)


def proof_batch(settings: Distill) -> int:
    """Held-out pictures in one forward."""
    return min(_PROOF_AT_ONCE, settings.batch_size)


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


STAGE = Stage(settings=Distill, run=run, data="required", ranks="all")
