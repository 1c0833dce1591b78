"""Set a model's smallest weights to zero, tensor by tensor."""

from pathlib import Path
from typing import Any

from pydantic import Field

from decant.models.device import Device
from decant.models.families.of import family_of
from decant.models.load import cast, load, save, stored_dtype
from decant.models.sparsity import without_smallest, zeros
from decant.stages.effect import effect, effect_told
from decant.stages.record import drawn_alike, figures_of, inherited, read_record
from decant.stages.stage import Inputs, Settings, Stage


class Sparsify(Settings):
    """How much becomes zero."""

    ratio: float = Field(0.3, ge=0, lt=1, description="part of each tensor's numbers, the smallest in magnitude")
    device: Device = Field("auto", description="where the time of a UNet call is measured")


def run(settings: Sparsify, inputs: Inputs, out: Path) -> dict[str, Any]:
    """Zero the smallest weights of the UNet in ``inputs.source``; the folder stays as large and as slow as it was."""
    before, after = load(inputs.source), load(inputs.source)
    thinned = without_smallest(before.unet.state_dict(), settings.ratio)
    after.unet.load_state_dict(thinned, strict=True)
    save(cast(after, stored_dtype(inputs.source)), out)
    after = load(out)
    none, of = zeros(after.unet.state_dict())
    found = effect(before, after, inputs.source, out, settings.device)
    inputs.talk(f"{none:,} of {of:,} weights are zero; they are stored and multiplied all the same")
    inputs.talk(effect_told(found))
    parent = read_record(inputs.source)
    kept: dict[str, Any] = {key: parent[key] for key in ("student", "changes", "surgery_map") if key in parent}
    family = family_of(after)
    return {
        "family": family.name,
        **kept,
        **inherited(inputs.source),
        **drawn_alike(inputs.source),
        "figures": figures_of(after.unet, family.tokens),
        "sparsity": {"zeros": none, "weights": of, "ratio": none / of},
        "effect": found,
    }


STAGE = Stage(settings=Sparsify, run=run)
