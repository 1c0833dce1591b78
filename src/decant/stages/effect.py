"""What a stage did to a model's size and speed, measured: one run, both models in turns."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from decant.bench.timer import time_rounds
from decant.models.cost import latent_of, size_mb
from decant.models.device import Device, pick
from decant.models.families.of import family_of
from decant.models.families.unet import blank, forward
from decant.models.layout import Pipeline
from decant.models.load import place_of

_REPEATS = 5


def effect(before: Pipeline, after: Pipeline, source: str | Path, out: Path, device: Device) -> dict[str, Any]:
    """Megabytes of both folders, and the time of one UNet call at batch 1 and the network's own size."""
    place = pick(device)
    calls = {name: _call(pipeline, place) for name, pipeline in (("before", before), ("after", after))}
    timed = time_rounds(calls, warmup=1, repeats=_REPEATS)
    dtypes = {"before": before.unet.dtype, "after": after.unet.dtype}
    sizes = {"before": size_mb(place_of(source)), "after": size_mb(out)}
    return {
        "device": str(place),
        **{
            name: {"size_mb": round(sizes[name], 3), "dtype": str(dtypes[name]), "unet_ms": timed[name].to_json()}
            for name in calls
        },
        "speedup": round(timed["before"].median / timed["after"].median, 3),
    }


def effect_told(found: dict[str, Any]) -> str:
    """The same in a line."""
    before, after = found["before"], found["after"]
    sizes = f"{before['size_mb']:.1f} -> {after['size_mb']:.1f} MB"
    times = f"{before['unet_ms']['median']:.1f} -> {after['unet_ms']['median']:.1f} ms a UNet call on {found['device']}"
    return f"{sizes}, {times} ({found['speedup']:.2f} times as fast)"


def _call(pipeline: Pipeline, device: torch.device) -> Any:
    unet: nn.Module = pipeline.unet
    unet.to(device)
    config, dtype = dict(pipeline.unet.config), pipeline.unet.dtype
    x_t = torch.zeros(1, *latent_of(config), device=device, dtype=dtype)
    told = {key: value.to(dtype) for key, value in blank(config, 1, family_of(pipeline).tokens, device).items()}
    t = torch.full((1,), 500, device=device)

    @torch.no_grad()
    def call() -> object:
        return forward(unet, x_t, t, told)

    return call
