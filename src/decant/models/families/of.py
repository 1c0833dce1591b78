"""The one door from a pipeline to its family."""

from typing import Any, assert_never

from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

from decant.maths.schedules import scaled_linear
from decant.models.families.family import Family
from decant.models.families.sd1 import SD1
from decant.models.families.sdxl import SDXL
from decant.models.layout import Pipeline


def family_of(pipeline: Pipeline) -> Family:
    """The adapter of a pipeline that `load` opened.

    Raises:
        UserError: when its scheduler is of a kind that the family is not trained with.
    """
    match pipeline:
        case StableDiffusionPipeline():
            return SD1.of(pipeline)
        case StableDiffusionXLPipeline():
            return SDXL.of(pipeline)
        case _:
            assert_never(pipeline)


def bare_family() -> Family:
    """A family that can corrupt and denoise, for any UNet, and has no encoders: enough to count with."""
    none: Any = None
    return SD1("epsilon", scaled_linear(0.00085, 0.012, 1000), none, none, none)
