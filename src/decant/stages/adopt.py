"""A finished student of another origin, brought into the teacher's pipeline to be distilled on."""

from pathlib import Path
from typing import Any

from pydantic import Field

from decant.models.families.of import family_of
from decant.models.load import cast, load, save, stored_dtype, with_unet
from decant.models.surgery.fit import fit, published_map
from decant.models.surgery.surgery import Surgery, SurgeryMap, build, skeleton
from decant.stages.record import figures_of, inherited, surgery_map_of
from decant.stages.stage import Inputs, Settings, Stage


class Adopt(Settings):
    """Which student."""

    model: str = Field(description="a pipeline folder, a .safetensors file or a hub id, such as a BK-SDM student's")


def run(settings: Adopt, inputs: Inputs, out: Path) -> dict[str, Any]:
    """The UNet of ``settings.model`` inside the pipeline of ``inputs.source``, whose text encoder and VAE stay.

    What had to be widened or begun anew is recorded. Where its layout is a published student's of this teacher, the map
    that such a cut has is recorded too, so that features can be paired.
    """
    pipeline, finished = load(inputs.source), load(settings.model)
    teacher = dict(pipeline.unet.config)
    fitted = fit(dict(finished.unet.config), finished.unet.state_dict(), teacher, inputs.seed)
    name, surgery_map = _known(settings.model, teacher) or published_map(fitted.config, teacher) or ("adopted", None)
    unet = build(Surgery(fitted.config, fitted.weights, surgery_map or SurgeryMap({})))
    save(cast(with_unet(pipeline, unet, family_of(finished).prediction), stored_dtype(inputs.source)), out)
    inputs.talk(f"{settings.model}: {'; '.join(fitted.changes)}")
    if surgery_map is None:
        inputs.talk("its layout is no published student's: features cannot be paired, set feature=0")
    return {
        "family": family_of(pipeline).name,
        "student": name,
        "changes": fitted.changes,
        **({"surgery_map": surgery_map.to_json()} if surgery_map else {}),
        "figures": figures_of(unet, family_of(pipeline).tokens),
        **inherited(settings.model),
    }


def _known(model: str, teacher: dict[str, Any]) -> tuple[str, SurgeryMap] | None:
    """The map in the model's own record, where it leads to a network of this teacher's layout."""
    known = surgery_map_of(model)
    if known is None or not set(known.parameters.values()) <= skeleton(teacher).state_dict().keys():
        return None
    return "adopted", known


STAGE = Stage(settings=Adopt, run=run)
