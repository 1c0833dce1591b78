"""How to distil: the settings of the stage, checked at the door."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from decant.errors import UnfitError
from decant.methods.kd import Distance
from decant.models.surgery.features import Level
from decant.stages.following import Following
from decant.stages.training_settings import Scale, Training, check_scales

Number = Annotated[float, Field(ge=0)] | Following


class TimestepSettings(BaseModel):
    """Where training's timesteps are drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: Literal["uniform", "trailing", "log_normal"] = Field(
        default="uniform", description="uniform: all; trailing: those of a shorter chain; log_normal: by noise level"
    )
    count: Annotated[int, Field(ge=1)] | Following = Field(
        default=1000, description="trailing: length of the chain, which may follow the run"
    )
    mean: float = Field(default=-1.2, description="log_normal: of ln(sigma)")
    std: float = Field(default=1.2, gt=0, description="log_normal: of ln(sigma)")


class NextTeacher(BaseModel):
    """A teacher that takes over while the student is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    teacher: str = Field(description="as --teacher")
    at: float = Field(gt=0, lt=1, description="part of the steps after which it takes over")


class Distill(Training):
    """How to distil by features and outputs. Defaults are BK-SDM's own where it states one."""

    task: Number = Field(1.0, description="weight of the error to the noise itself")
    output: Number = Field(1.0, description="weight of the error to the teacher's output")
    feature: Number = Field(1.0, description="weight of the error to the paired features")
    features: tuple[Level, ...] = Field(
        ("block",),
        min_length=1,
        description="block: of all down and up blocks; layer: of every resnet and attention; self_attention: of every "
        "transformer block",
    )
    projection: bool = Field(
        False, description="features of other widths are compared too, through a linear map that is trained beside"
    )
    output_distance: Distance = Field("mse", description="of the student's output to the teacher's")
    feature_distance: Distance = Field("mse", description="of the student's features to the teacher's")
    min_snr_gamma: float | None = Field(
        None, gt=0, description="weigh task and output by min-SNR with this gamma; null: all timesteps alike"
    )
    feature_snr: bool = Field(False, description="weigh the features by min-SNR too")
    prediction: Literal["epsilon", "v_prediction", "sample"] | None = Field(
        None, description="what the student learns to answer; null: what its folder's scheduler says it does"
    )
    timesteps: TimestepSettings = Field(default=TimestepSettings(), description="where they are drawn")
    caption_dropout: Number = Field(
        0.0, description="part of the pictures trained without their caption, so that guidance keeps working"
    )
    teacher_guidance_scale: Scale | tuple[Scale, Scale] | None = Field(
        None,
        description="learn the teacher's guided output at this scale; two: drawn between them; null: the plain one",
    )
    next_teachers: tuple[NextTeacher, ...] = Field((), description="who teaches after the teacher, and from when on")
    evaluate_guidance_scale: float = Field(7.5, ge=0, description="of such an evaluation")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        places = [each.at for each in self.next_teachers]
        if places != sorted(set(places)):
            told = ", ".join(f"{place:g}" for place in places)
            allowed = "teachers that take over one after the other: each `at` above the one before"
            raise UnfitError("next_teachers", f"at {told}", allowed=allowed, hint="sort them by `at`, none twice")
        check_scales(self.teacher_guidance_scale)
        dropout = max(values_of(self.caption_dropout))
        if dropout > 1:
            raise UnfitError(
                "caption_dropout", dropout, allowed="at most 1, a share of the captions", hint="for example 0.1"
            )
        return self


def values_of(number: float | Following) -> list[float]:
    """Every value that a setting names."""
    return [value for _, value in number.ramp().points] if isinstance(number, Following) else [number]
