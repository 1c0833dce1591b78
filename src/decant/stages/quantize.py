"""Store a model's weights in half precision."""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from decant.models.device import Device
from decant.models.families.of import family_of
from decant.models.load import cast, load, save
from decant.stages.effect import effect, effect_told
from decant.stages.record import drawn_alike, figures_of, inherited, read_record
from decant.stages.stage import Inputs, Settings, Stage


class Quantize(Settings):
    """What the weights are stored in."""

    dtype: Literal["float16", "bfloat16"] = Field("float16", description="of every network of the pipeline")
    device: Device = Field("auto", description="where the time of a UNet call is measured")


def run(settings: Quantize, inputs: Inputs, out: Path) -> dict[str, Any]:
    """Round every weight of ``inputs.source`` to half precision; what the rounding did is measured."""
    before, wanted = load(inputs.source), getattr(torch, settings.dtype)
    save(cast(load(inputs.source), wanted), out)
    after = load(out, dtype=wanted)
    found = effect(before, after, inputs.source, out, settings.device)
    inputs.talk(effect_told(found))
    parent = read_record(inputs.source)
    kept: dict[str, Any] = {
        key: parent[key] for key in ("student", "changes", "surgery_map", "sparsity") if key in parent
    }
    family = family_of(before)
    return {
        "family": family.name,
        **kept,
        **inherited(inputs.source),
        **drawn_alike(inputs.source),
        "figures": figures_of(after.unet, family.tokens),
        "rounding": _rounding(before, load(out)),
        "effect": found,
    }


@torch.no_grad()
def _rounding(before: Any, after: Any) -> dict[str, float]:
    """How far the UNet's weights moved: the largest step, and the root of the mean square over that of the weights."""
    pairs = list(zip(before.unet.parameters(), after.unet.parameters(), strict=True))
    moved = sum(float((a - b).double().square().sum()) for a, b in pairs)
    size = sum(float(a.double().square().sum()) for a, _ in pairs)
    return {"largest": max(float((a - b).abs().max()) for a, b in pairs), "relative_rms": (moved / size) ** 0.5}


STAGE = Stage(settings=Quantize, run=run)
