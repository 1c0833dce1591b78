"""What every part of a teacher is worth: the damage that its removal does, beside what it costs."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from decant.bench.machine import machine
from decant.bench.timer import Latency, time_ms
from decant.errors import UserError
from decant.models.cost import latent_of, macs_by_module, parameters
from decant.models.device import Device, pick
from decant.models.families.of import family_of
from decant.models.families.unet import blank, forward
from decant.models.generate import pixels
from decant.models.load import load
from decant.models.surgery.cut import cut
from decant.models.surgery.parts import Removable, passed_by, removable
from decant.models.surgery.surgery import build
from decant.stages.calibrate import LEVELS, Calibration, Call, calibration
from decant.stages.importance_plot import draw
from decant.stages.progress import progress
from decant.stages.stage import Inputs


@dataclass(frozen=True)
class Measured:
    """One part.

    damage: mean squared change of the network's output over the output's mean square, over all pictures and noise
    levels; damage_by_level: from little noise to much. latency_ms: of the part alone in one forward at batch 1, at the
    network's own size; an interval of a few repeats. parameters and macs are what goes with it.
    """

    name: str
    kind: str
    damage: float
    damage_by_level: list[float]
    parameters: int
    macs: int
    latency_ms: dict[str, float | int]


@torch.no_grad()
def importance(
    inputs: Inputs, out: Path, *, pictures: int = 32, repeats: int = 5, device: Device = "auto"
) -> dict[str, Any]:
    """Measure every removable part of ``inputs.source``; ``importance.json`` and ``importance.png`` go into ``out``.

    Raises:
        UserError: there are no pictures to measure on, or the source is no model.
    """
    place = pick(device)
    pipeline = load(inputs.source)
    family, unet = family_of(pipeline), pipeline.unet
    size = pixels(pipeline, None)[0]
    measured = calibration(family, size, pictures, inputs, place)
    nn.Module.to(unet, place).requires_grad_(False)
    calls = list(measured.calls(place))
    probe = _Probe(measured, calls, [measured.answer(unet, call) for call in calls])
    costs = _Costs(macs_by_module(dict(unet.config), family.tokens), _latencies(unet, family.tokens, place, repeats))
    parts, found = removable(dict(unet.config)), []
    with progress("measuring parts", len(parts), inputs.talk) as tick:
        for number, part in enumerate(parts, start=1):
            try:
                found.append(_measured(part, unet, probe, costs))
            except UserError as error:
                inputs.talk(f"{part.name} cannot go alone: {str(error).splitlines()[0]}")
            tick(number, part.name)
    document = {
        "teacher": str(inputs.source),
        "pictures": measured.data.n,
        "seed": inputs.seed,
        "noise_levels": LEVELS,
        "size": size,
        "machine": machine() | {"device": str(place)},
        "parts": [asdict(part) for part in found],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "importance.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    draw(document, out / "importance.png")
    return document


@dataclass(frozen=True)
class _Probe:
    """The calls, and what the whole network answers to each."""

    measured: Calibration
    calls: list[Call]
    answers: list[Tensor]

    def damage(self, net: nn.Module) -> tuple[float, ...]:
        """The relative change of the output, by noise level."""
        change, whole = torch.zeros(LEVELS, dtype=torch.float64), torch.zeros(LEVELS, dtype=torch.float64)
        for call, answer in zip(self.calls, self.answers, strict=True):
            change[call.level] += float((self.measured.answer(net, call) - answer).double().square().sum())
            whole[call.level] += float(answer.double().square().sum())
        return tuple((change / whole).tolist())


@dataclass(frozen=True)
class _Costs:
    """MACs and latency of every module of the network, by name."""

    macs: Mapping[str, int]
    latency_ms: Callable[[Sequence[str]], Latency]


def _measured(part: Removable, unet: UNet2DConditionModel, probe: _Probe, costs: _Costs) -> Measured:
    if part.keep is None:
        with passed_by(unet, part.name):
            damage = probe.damage(unet)
        gone = parameters(unet.get_submodule(part.name))
    else:
        student = build(cut(dict(unet.config), unet.state_dict(), part.keep))
        damage = probe.damage(student)
        gone = parameters(unet) - parameters(student)
    latency = costs.latency_ms(part.modules)
    return Measured(
        part.name,
        part.kind,
        sum(damage) / len(damage),
        list(damage),
        gone,
        sum(costs.macs.get(name, 0) for name in part.modules),
        asdict(latency),
    )


def _latencies(
    unet: UNet2DConditionModel, tokens: int, device: torch.device, repeats: int
) -> Callable[[Sequence[str]], Latency]:
    """A clock for any of the network's modules: they run again on what they read in one forward at batch 1."""
    config = dict(unet.config)
    read: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read[name] = (args, kwargs)

        return hook

    handles = [
        module.register_forward_pre_hook(keep(name), with_kwargs=True) for name, module in unet.named_modules() if name
    ]
    x_t = torch.randn(1, *latent_of(config), device=device)
    forward(unet, x_t, torch.full((1,), 500, device=device), blank(config, 1, tokens, device))
    for handle in handles:
        handle.remove()

    def clock(names: Sequence[str]) -> Latency:
        def call() -> None:
            for name in names:
                args, kwargs = read[name]
                unet.get_submodule(name)(*args, **kwargs)

        return time_ms(call, warmup=2, repeats=repeats)

    return clock
