"""Cut a student out of a teacher: block removal, weights inherited, the map kept."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from decant.models.cost import macs, parameters
from decant.models.families.of import family_of
from decant.models.load import cast, load, save, stored_dtype, unet_config, with_unet
from decant.models.surgery.bk import Student, bk, feature_pairs
from decant.models.surgery.surgery import Surgery, build
from decant.stages.record import figures_of, inherited, surgery_map_of
from decant.stages.stage import Inputs, Settings, Stage


class Prune(Settings):
    """Which student to cut."""

    student: Student = Field("bk-tiny", description="which blocks are taken out: base keeps most, tiny least")


def run(settings: Prune, inputs: Inputs, out: Path) -> dict[str, Any]:
    """Cut the UNet of ``inputs.source``; everything else of its pipeline is kept as it is.

    The source may be a student that was cut before, and distilled: its map then leads on to the teacher.
    """
    pipeline = load(inputs.source)
    family = family_of(pipeline)
    before = parameters(pipeline.unet)
    surgery = _to_teacher(
        bk(dict(pipeline.unet.config), pipeline.unet.state_dict(), settings.student), settings, inputs
    )
    unet = build(surgery)
    save(cast(with_unet(pipeline, unet), stored_dtype(inputs.source)), out)
    after = parameters(unet)
    inputs.talk(f"{settings.student}: {before:,} -> {after:,} parameters")
    return {
        "family": family.name,
        "student": settings.student,
        "surgery_map": surgery.surgery_map.to_json(),
        "figures": figures_of(unet, family.tokens),
        **inherited(inputs.source),
    }


def _to_teacher(surgery: Surgery, settings: Prune, inputs: Inputs) -> Surgery:
    """The same cut with a map to the teacher of ``inputs``, where the source is a student of its."""
    earlier = None if str(inputs.source) == inputs.teacher else surgery_map_of(inputs.source)
    if earlier is None:
        return surgery
    features = feature_pairs(unet_config(inputs.teacher), settings.student)
    return replace(surgery, surgery_map=surgery.surgery_map.after(earlier, features))


def preview(surgery: Surgery, tokens: int) -> dict[str, Any]:
    """What a cut would give, without weights: parameters, MACs at the network's own size, and the layer map.

    ``tokens``: length of the condition that the MACs count.
    """
    from decant.models.surgery.surgery import layer_map, skeleton

    unet = skeleton(surgery.config)
    side = unet.config["sample_size"]
    latent = (unet.config["in_channels"], side, side)
    return {
        "parameters": parameters(unet),
        "macs": macs(unet, latent, tokens),
        "tokens": tokens,
        "layer_map": layer_map(surgery.surgery_map),
        "feature_pairs": surgery.surgery_map.features,
    }


STAGE = Stage(settings=Prune, run=run)
