"""Cut a student out of a teacher: block removal, weights inherited, the map kept."""

from pathlib import Path
from typing import Any

from decant.models.cost import macs, parameters
from decant.models.load import cast, load, save, stored_dtype, with_unet
from decant.models.surgery.bk import Student, bk
from decant.models.surgery.surgery import Surgery, build
from decant.stages.record import figures_of, inherited
from decant.stages.stage import Inputs, Settings, Stage


class Prune(Settings):
    """Which student to cut."""

    student: Student = "bk-tiny"


def run(settings: Prune, inputs: Inputs, out: Path) -> dict[str, Any]:
    """Cut the UNet of ``inputs.source``; everything else of its pipeline is kept as it is."""
    pipeline = load(inputs.source)
    before = parameters(pipeline.unet)
    surgery = bk(dict(pipeline.unet.config), pipeline.unet.state_dict(), settings.student)
    unet = build(surgery)
    save(cast(with_unet(pipeline, unet), stored_dtype(inputs.source)), out)
    after = parameters(unet)
    inputs.talk(f"{settings.student}: {before:,} -> {after:,} parameters")
    return {
        "family": "sd1",
        "student": settings.student,
        "surgery_map": surgery.surgery_map.to_json(),
        "figures": figures_of(unet),
        **inherited(inputs.source),
    }


def preview(surgery: Surgery) -> dict[str, Any]:
    """What a cut would give, without weights: parameters, MACs at the network's own size, and the layer map."""
    from decant.models.surgery.surgery import layer_map, skeleton

    unet = skeleton(surgery.config)
    side = unet.config["sample_size"]
    latent = (unet.config["in_channels"], side, side)
    return {
        "parameters": parameters(unet),
        "macs": macs(unet, latent),
        "layer_map": layer_map(surgery.surgery_map),
        "feature_pairs": surgery.surgery_map.features,
    }


STAGE = Stage(settings=Prune, run=run)
