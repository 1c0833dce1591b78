"""Scores of a student while it is trained, without a file in between; and the weights of its best one."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from decant.models.generate import generate
from decant.models.layout import Pipeline
from decant.models.load import load
from decant.models.samplers import Drawing
from decant.stages.asked import Asked, HeldOut, asked
from decant.stages.distances import Distances, distances
from decant.stages.players import Players
from decant.stages.scoring import Drawn, Picture, scores, told
from decant.stages.stage import Inputs
from decant.stages.training_settings import Training
from decant.train.state import TrainState

# The best student is the one with the best of these, the first that is measured: (name, higher is better).
_DECIDES = (("scene_accuracy", True), ("fid_inception", False), ("distance_to_teacher", False))


@contextmanager
def drawing(state: TrainState, players: Players) -> Iterator[Pipeline]:
    """The student's pipeline, ready to draw: with the averaged weights where an average is kept."""
    average = state.ema.get("student")
    # As the trainer holds it: inside taps and projections a parameter has a longer name.
    shown = average.applied(state.players["student"].module) if average else nullcontext()
    student = players.student
    with shown, torch.no_grad():
        student.eval()
        pipeline = players.drawing_with(student)
        for network in (*sum(players.family.encoders().values(), ()), pipeline.vae):
            nn.Module.to(network, student.device)
        yield pipeline
        student.train()


@dataclass
class Midway:
    """Every so many steps: the same captions and seeds drawn, scored beside the teacher's pictures, and remembered."""

    settings: Training
    inputs: Inputs
    players: Players
    student: Drawing
    teacher: Drawing

    def at(self, state: TrainState) -> None:
        """Score the student of this step, and keep its weights where it is the best so far."""
        with drawing(state, self.players) as pipeline:
            found = self._scores(pipeline)
            weights = {name: value.cpu().clone() for name, value in pipeline.unet.state_dict().items()}
        step = state.updates["student"]
        self.inputs.talk(f"step {step}: {told(found)}")
        earlier = [entry for entry in self.history if entry["step"] < step]
        entry = {"step": step, "scores": found}
        if all(_better(entry, other) for other in earlier):
            save_file(weights, self._best.with_suffix(".tmp"))
            self._best.with_suffix(".tmp").replace(self._best)
        lines = "".join(f"{json.dumps(each)}\n" for each in [*earlier, entry])
        temporary = self._log.with_suffix(".tmp")
        temporary.write_text(lines, encoding="utf-8")
        temporary.replace(self._log)

    @property
    def history(self) -> list[dict[str, Any]]:
        """``[{"step", "scores"}]``, in order."""
        if not self._log.is_file():
            return []
        return [json.loads(line) for line in self._log.read_text(encoding="utf-8").splitlines()]

    def take_best(self, student: nn.Module) -> None:
        """Give the student the weights of its best evaluation, where one was made."""
        if self.history:
            student.load_state_dict(load_file(self._best))

    @property
    def best_step(self) -> int:
        """The step of the best evaluation; there is one."""
        first, *later = self.history
        for entry in later:
            first = entry if _better(entry, first) else first
        return int(first["step"])

    def _scores(self, pipeline: Pipeline) -> dict[str, Any]:
        drawn, (teacher, apart) = Drawn.of(self._draw(pipeline, self.student), self._ask), self._teacher
        return scores(drawn, teacher) | apart.figures(drawn, teacher=False)

    def _draw(self, pipeline: Pipeline, how: Drawing) -> list[Picture]:
        return list(
            generate(
                pipeline,
                self._ask.captions,
                self._ask.seeds,
                steps=how.steps,
                guidance_scale=how.guidance_scale,
                sampler=how.sampler,
                batch_size=self.settings.batch_size,
                size=self.settings.size,
            )
        )

    @cached_property
    def _ask(self) -> Asked:
        """Captions kept from training: where they say scenes, of held-out scenes."""
        settings = self.settings
        index = self.inputs.kept / "index"
        held_out = HeldOut(
            self.inputs.data, settings.held_out, self.inputs.seed, settings.max_skipped, index, settings.aspect
        )
        of_data = asked("auto", settings.evaluate_images, held_out)
        return asked("scenes", settings.evaluate_images, held_out) if of_data.scenes else of_data

    @cached_property
    def _teacher(self) -> tuple[Drawn, Distances]:
        device = next(self.players.student.parameters()).device
        teacher = Drawn.of(self._draw(load(self.inputs.teacher).to(device), self.teacher), self._ask)
        return teacher, distances(self._ask, teacher)

    @property
    def _best(self) -> Path:
        return self.inputs.work / "best.safetensors"

    @property
    def _log(self) -> Path:
        return self.inputs.work / "evaluations.jsonl"


def _better(entry: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether an evaluation is better than an earlier one; equal is not."""
    for name, higher in _DECIDES:
        if name in entry["scores"]:
            own, theirs = entry["scores"][name]["value"], other["scores"][name]["value"]
            return bool(own > theirs if higher else own < theirs)
    raise AssertionError("every evaluation has a distance to the teacher")
