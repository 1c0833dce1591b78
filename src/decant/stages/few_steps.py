"""How a student of few steps is trained, by consistency or by distribution matching."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from decant.models.samplers import Drawing
from decant.stages.midway import Midway
from decant.stages.players import Players, open_players
from decant.stages.stage import Inputs
from decant.stages.training import encode, look, record_of, run_settings, save_student, ship, train
from decant.stages.training_settings import Training
from decant.train.method import Method


def few_steps(
    settings: Training,
    inputs: Inputs,
    out: Path,
    student: Drawing,
    made: Callable[[Players], tuple[Players, Method]],
) -> dict[str, Any]:
    """Train by the method that ``made`` makes, and write the folder of a student that is drawn as ``student`` says."""
    found = look(settings, inputs, out)
    players, method = made(open_players(settings, inputs, found.shown))
    encoded = encode(players, settings, inputs, found)
    midway = Midway(settings, inputs, players, student, Drawing(settings.prompt_steps, settings.prompt_guidance_scale))
    curve = train(method, encoded.train, settings, run_settings(settings, inputs.seed), inputs, midway)
    inputs.ranks.meet()
    midway.take_best(players.student)
    players, said = ship(players, settings, inputs, out)
    if not inputs.ranks.first:
        return {}
    save_student(players, inputs, out)
    return {**record_of(players, inputs, found, encoded, curve, midway), **said, "sampling": student.to_json()}
