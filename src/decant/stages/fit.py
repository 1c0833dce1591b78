"""The fastest settings of a distillation that fit into so much memory, by a rehearsal on tensors without numbers.

What is kept: the pictures of an update, so the gradient, up to rounding. What may change: how many of them go through
the networks at once, whether activations are made anew, and in how many bits things are held.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from decant.data.batch import Batch
from decant.errors import refuse
from decant.methods.kd import KD
from decant.models.cost import latent_of, parameters
from decant.models.families.of import bare_family
from decant.models.families.unet import blank, forward
from decant.models.projection import Projection
from decant.models.surgery.surgery import SurgeryMap, skeleton
from decant.stages.distill import proof_batch
from decant.stages.distill_method import method_between, pairs_between
from decant.stages.distill_settings import Distill, values_of
from decant.stages.training import precision_of, run_settings
from decant.train.optimizers import ready_8bit
from decant.train.rehearsal import peak_of_calls, peak_of_updates

_MB = 1e6
_UNITS = {"MB": 1.0, "GB": 1e3, "MIB": 2**20 / 1e6, "GIB": 2**30 / 1e6}


@dataclass(frozen=True)
class Pair:
    """A student and its teacher by their configs, the map from one to the other, and how long a caption is."""

    student: dict[str, Any]
    teacher: dict[str, Any]
    surgery_map: SurgeryMap | None
    tokens: int


@dataclass(frozen=True)
class Rung:
    """Settings that take less memory, and by what factor a picture then takes longer: a rough one, to sort by."""

    changes: dict[str, Any]
    cost: float


@dataclass(frozen=True)
class Fit:
    """What was chosen. changes: of the settings asked for. peak_mb: predicted, of the whole stage."""

    changes: dict[str, Any]
    peak_mb: float


def megabytes(text: str) -> float:
    """``6GB``, ``6 GiB`` or ``800MB`` as megabytes of 10**6 bytes.

    Raises:
        UserError: it is nothing of the kind.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)\s*", text.upper())
    if found is None or found[2] not in _UNITS or not float(found[1]):
        raise refuse("--fit", repr(text), allowed="a number with GB, GiB, MB or MiB", hint="--fit 6GB")
    return float(found[1]) * _UNITS[found[2]]


def fit(settings: Distill, pair: Pair, limit_mb: float, talk: Callable[[str], None]) -> Fit:
    """The fastest settings whose predicted peak is at most ``limit_mb``: the same for the same question.

    What is counted is what training holds on its device; on a CPU the process itself, its libraries and the encoders
    come on top.

    Raises:
        UserError: none fits; it names the smallest peak that can be reached.
    """
    if settings.lora is not None:
        hint = "a LoRA has few gradients and moments: gradient_checkpointing=true and a smaller batch_size save most"
        raise refuse("--fit", "with distill.lora", allowed="a distillation of all weights", hint=hint)
    peaks, rungs = Peaks(pair), ladder(settings)
    for rung in rungs:
        chosen = settings.model_copy(update=rung.changes)
        if peaks.roughly_mb(chosen, limit_mb) <= limit_mb and (peak := peaks.mb(chosen)) <= limit_mb:
            talk(f"fits into {limit_mb:,.0f} MB: {told(rung.changes)}; predicted peak {peak:,.0f} MB")
            return Fit(rung.changes, peak)
    possible = [settings.model_copy(update=rung.changes) for rung in rungs]
    fewest = min(each.batch_size for each in possible)
    peak, changes = min(
        (
            (peaks.mb(each), rung.changes)
            for each, rung in zip(possible, rungs, strict=True)
            if each.batch_size == fewest
        ),
        key=lambda found: found[0],
    )
    hint = f"--fit {peak / 1e3 + 0.05:.1f}GB takes {told(changes)}; or a smaller student, or --set size"
    raise refuse("--fit", f"{limit_mb:,.0f} MB", allowed=f"at least {peak:,.0f} MB for this student", hint=hint)


def told(changes: Mapping[str, Any]) -> str:
    """Changes in words."""
    return ", ".join(f"{key}={str(value).lower()}" for key, value in changes.items()) or "the settings as they are"


def ladder(settings: Distill) -> list[Rung]:
    """Every way to take less memory, the fastest first; what was asked for is the first rung."""
    rungs = [
        Rung(_changed(settings, {**level.changes, **split}), level.cost * slower)
        for level in _levels(settings)
        for split, slower in _splits(settings)
        if split["accumulation"] == 1
        or not (settings.optimizer_in_backward or level.changes.get("optimizer_in_backward"))
    ]
    return sorted(rungs, key=lambda rung: rung.cost)


@dataclass(frozen=True)
class Peaks:
    """Predicted peaks of a student's distillation with these or those settings, each found once."""

    pair: Pair
    found: dict[str, float] = field(default_factory=dict)

    def mb(self, settings: Distill) -> float:
        """In MB: the larger of the updates' and of the proof's before and after."""
        return max(self.updates_mb(settings), self.proof_mb(settings))

    def roughly_mb(self, settings: Distill, limit_mb: float = float("inf")) -> float:
        """At least so much, of a straight line over the batch size through the updates of one and of two pictures.

        What is largest changes with the batch, from moments to activations, so that the line bends upwards. Where one
        picture takes more than ``limit_mb``, two are not looked at.
        """
        one = self._alike_mb(settings, 1)
        if settings.batch_size == 1 or one > limit_mb:
            return one
        line = one + (self._alike_mb(settings, 2) - one) * (settings.batch_size - 1)
        return line if line > limit_mb else max(line, self.proof_mb(settings))

    def _alike_mb(self, settings: Distill, batch_size: int) -> float:
        """At least what updates in batches of ``batch_size`` hold; found for several batches in an update."""
        single = settings.accumulation == 1
        if settings.optimizer_in_backward or (single and settings.projection):
            return self.updates_mb(settings.model_copy(update={"batch_size": batch_size}))
        found = self.updates_mb(settings.model_copy(update={"batch_size": batch_size, "accumulation": 2}))
        gradients = parameters(skeleton(self.pair.student)) * (2 if settings.weights == "bf16" else 4)
        return found - gradients / _MB if single else found  # in the first batch there are none yet

    def updates_mb(self, settings: Distill) -> float:
        """Of updates, which hold networks, gradients, moments, averages and activations."""
        settings = settings.model_copy(update={"compile": False, "accumulation": min(settings.accumulation, 2)})
        make = method_maker(settings, self.pair)

        def peak() -> int:
            run, device = run_settings(settings, 0), torch.device("cpu")
            return peak_of_updates(make, lambda: blank_batch(settings, self.pair), run, device, settings.accumulation)

        return self._once(settings.model_dump_json(), peak)

    def proof_mb(self, settings: Distill) -> float:
        """Student and teacher in float32, called on held-out pictures."""
        shape = (proof_batch(settings), *latent_of(self.pair.teacher, settings.size))

        def call(net: nn.Module) -> object:
            told = blank(self.pair.teacher, shape[0], self.pair.tokens, "cpu")
            return forward(net, torch.zeros(shape), torch.zeros(shape[0]), told)

        nets = (self.pair.student, self.pair.teacher)
        return self._once(f"proof {shape}", lambda: peak_of_calls(lambda: [_network(net) for net in nets], call))

    def _once(self, key: str, peak: Callable[[], int]) -> float:
        if key not in self.found:
            self.found[key] = peak() / _MB
        return self.found[key]


def _levels(settings: Distill) -> Iterator[Rung]:
    """Sets of changes, each with all that those before it have."""
    changes: dict[str, Any] = {}
    cost = 1.0
    steps: list[tuple[dict[str, Any], float]] = [
        ({}, 1.0),
        ({"precision": "bf16"} if precision_of(settings) != "bf16" else {}, 1.02),
        ({"optimizer": "adamw8bit"}, 1.05),
        ({"gradient_checkpointing": True}, 1.3),
        ({"weights": "bf16"}, 1.05),
        ({"optimizer_in_backward": True} if settings.clip is None else {}, 1.02),
    ]
    for more, slower in (step for step in steps if step[0] or step == steps[0]):
        changes, cost = {**changes, **more}, cost * slower
        yield Rung(dict(changes), cost)


def _splits(settings: Distill) -> Iterator[tuple[dict[str, int], float]]:
    """The update's pictures in ever smaller batches: a picture takes about twice as long by itself as among many."""
    update = settings.batch_size * settings.accumulation
    for batch in range(settings.batch_size, 0, -1):
        if update % batch == 0:
            slower = (1 + 1 / batch) / (1 + 1 / settings.batch_size)
            yield {"batch_size": batch, "accumulation": update // batch}, slower


def _changed(settings: Distill, changes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in changes.items() if getattr(settings, key) != value}


def method_maker(settings: Distill, pair: Pair) -> Callable[[], KD]:
    """What makes the method with its networks, where it is called among tensors without numbers."""
    pairs, widths = _pairs(settings, pair)
    if settings.optimizer == "adamw8bit":
        ready_8bit()

    def make() -> KD:
        student = _network(pair.student)
        if settings.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        teachers = [_network(pair.teacher) for _ in range(1 + len(settings.next_teachers))]
        projections = {name: Projection(*each) for name, each in widths.items()}
        return method_between(settings, bare_family(), student, teachers, pairs, projections)

    return make


def _pairs(settings: Distill, pair: Pair) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    if pair.surgery_map is None or not any(values_of(settings.feature)):
        return {}, {}
    return pairs_between(settings, pair.student, pair.teacher, pair.surgery_map, pair.tokens)


def _network(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """Among tensors without numbers: made in no time."""
    return UNet2DConditionModel.from_config(dict(config)).eval()


def blank_batch(settings: Distill, pair: Pair) -> Batch:
    """A batch of zeros, of this size and what the networks are told."""
    n = settings.batch_size
    moments = torch.zeros(n, *latent_of(pair.teacher, settings.size))
    condition = blank(pair.teacher, n, pair.tokens, "cpu")
    return Batch(tuple(range(n)), moments, moments.clone(), condition, condition)
