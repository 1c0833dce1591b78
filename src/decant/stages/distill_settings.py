"""How to distil: the settings of the stage, checked at the door."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from decant.errors import UnfitError
from decant.methods.kd import Distance
from decant.models.surgery.features import Level
from decant.stages.following import Following
from decant.stages.training_settings import Scale, Training, check_scales

_LONGEST_WAY = 50
Number = Annotated[float, Field(ge=0)] | Following


class TimestepSettings(BaseModel):
    """Where training's timesteps are drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: Literal["uniform", "trailing", "own_way", "log_normal"] = Field(
        default="uniform",
        description="uniform: all; trailing: those of a shorter chain; own_way: all of these for every picture, where "
        "the teacher's own steps begin, for teachers of few steps; log_normal: by noise level",
    )
    count: Annotated[int, Field(ge=1)] | Following = Field(
        default=1000, description="trailing, own_way: length of the chain, which may follow the run"
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
    compared_as: Literal["epsilon", "v_prediction", "sample"] | None = Field(
        None,
        description="what both outputs are compared as: errors of sample and v_prediction count most where there is "
        "most noise; null: what the student answers",
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
        if self.timesteps.kind == "own_way":
            self._check_own_way()
        dropout = max(values_of(self.caption_dropout))
        if dropout > 1:
            raise UnfitError(
                "caption_dropout", dropout, allowed="at most 1, a share of the captions", hint="for example 0.1"
            )
        return self

    def _check_own_way(self) -> None:
        if any(values_of(self.task)):
            allowed = "0 on the teacher's own way: there is no picture whose noise could be learned"
            raise UnfitError("task", max(values_of(self.task)), allowed=allowed, hint="set task=0")
        if not any(values_of(self.output)):
            hint = "set output=1"
            raise UnfitError("output", 0.0, allowed="above 0 on the teacher's own way", hint=hint)
        most = max(values_of(self.timesteps.count))
        if most > _LONGEST_WAY:
            allowed = f"at most {_LONGEST_WAY} of own_way, which walks them all"
            raise UnfitError("timesteps.count", most, allowed=allowed, hint="for example timesteps.count=4")


def values_of(number: float | Following) -> list[float]:
    """Every value that a setting names."""
    return [value for _, value in number.ramp().points] if isinstance(number, Following) else [number]
