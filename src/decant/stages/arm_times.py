"""Times of the arms of a comparison: one picture each, in turns, so that what drifts on the machine meets all alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from decant.bench.timer import Latency, time_rounds
from decant.models.device import pick
from decant.models.layout import Pipeline
from decant.stages.bench import How, Precision, calls_of, conditions_of, fits, work_of
from decant.stages.contenders import Arm, Contender
from decant.stages.progress import progress

_PARTS = ("text", "unet", "decode")


@dataclass
class Opened:
    """The model that is open, in a precision and on a device."""

    precision: Precision
    device: torch.device
    _held: dict[str, Pipeline] = field(default_factory=dict)

    def only(self, model: Contender) -> Pipeline:
        """This model; any other is let go."""
        if model.name not in self._held:
            self._held = {}
            self._held[model.name] = model.open(getattr(torch, self.precision)).to(self.device)
        return self._held[model.name]


def times(arms: Sequence[tuple[Contender, Arm]], how: How, talk: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """``latency_ms`` by part, and ``measured``, its conditions, of every arm by its name.

    Arms of equal networks, steps and guidance are the same work: the first is timed, and the others say so in
    ``measured_as``. Text encoder, one UNet call and decoder are timed once for equal networks.
    """
    device = pick(how.device)
    pipelines, works = _opened(arms, how)
    together = len(pipelines) == len(works)
    first: dict[tuple[object, ...], str] = {}
    twins = {
        arm.name: first.setdefault((works[model.name], arm.steps, arm.guidance_scale > 1, arm.sampler), arm.name)
        for model, arm in arms
    }
    timed = [(model, arm) for model, arm in arms if twins[arm.name] == arm.name]
    groups = [timed] if together else [[pair for pair in timed if pair[0].name == name] for name in works]
    opened = Opened(how.dtype, device)
    taken: dict[tuple[str, str], Latency] = {}
    measured: dict[str, dict[str, Any]] = {}
    with progress("timing", len(timed), talk) as tick:
        for group in filter(None, groups):
            calls: dict[tuple[str, str], Callable[[], object]] = {}
            for model, arm in group:
                pipeline = pipelines[model.name].to(device) if together else opened.only(model)
                own = replace(how, steps=arm.steps, guidance_scale=arm.guidance_scale, sampler=arm.sampler)
                each = calls_of(pipeline, own)
                calls[arm.name, "picture"] = each["picture"]
                calls |= {(works[model.name], part): each[part] for part in _PARTS}
                measured[arm.name] = {**conditions_of(pipeline, own), "interleaved": len(group) > 1}
            fresh = {key: call for key, call in calls.items() if key not in taken}
            with torch.no_grad():
                taken |= time_rounds(fresh, warmup=how.warmup, repeats=how.repeats)
            tick(len(measured))
    return {arm.name: _entry(twins[arm.name], arm.name, works[model.name], taken, measured) for model, arm in arms}


def _entry(
    twin: str, name: str, work: str, taken: dict[tuple[str, str], Latency], measured: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    parts = {part: taken[work, part].to_json() for part in _PARTS}
    entry = {"latency_ms": {"picture": taken[twin, "picture"].to_json(), **parts}, "measured": measured[twin]}
    return entry | ({"measured_as": twin} if twin != name else {})


def _opened(arms: Sequence[tuple[Contender, Arm]], how: How) -> tuple[dict[str, Pipeline], dict[str, str]]:
    """The models, as many as can be held at once, and the work that each one's networks are, by name."""
    pipelines: dict[str, Pipeline] = {}
    works: dict[str, str] = {}
    for model in {model.name: model for model, _ in arms}.values():
        pipeline = model.open(getattr(torch, how.dtype))
        works[model.name] = work_of(pipeline)
        if len(pipelines) == len(works) - 1 and fits([*pipelines.values(), pipeline], how):
            pipelines[model.name] = pipeline
    return pipelines, works
