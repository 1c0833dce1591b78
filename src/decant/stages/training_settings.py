"""What every training is told, whatever its method: data, optimiser, memory, and what is seen on the way."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from decant.data.picture import Aspect
from decant.errors import UnfitError
from decant.models.device import Device
from decant.models.samplers import Sampler
from decant.stages.lora import LoraSettings
from decant.stages.samples import FromPrompts
from decant.stages.stage import Settings
from decant.train.optimizers import LRSchedule, Optimizer
from decant.train.state import Precision, Weights

Scale = Annotated[float, Field(gt=1)]


def _yaml_no(value: object) -> object:
    """YAML reads the word no as false."""
    return "no" if value is False else value


MixedPrecision = Annotated[Precision, BeforeValidator(_yaml_no)]


class Updates(Settings):
    """Data, optimiser and checkpoints: what every network is trained with, whatever it is."""

    steps: int = Field(1000, ge=1, description="updates of the student")
    batch_size: int = Field(16, ge=1, description="pictures in one forward")
    accumulation: int = Field(
        1, ge=1, description="forwards in one update: an update sees batch_size x accumulation pictures"
    )
    size: int | None = Field(None, ge=8, description="pixels; None: the network's own")
    learning_rate: float = Field(5e-5, gt=0, description="of AdamW, at its highest")
    schedule: LRSchedule = Field("constant", description="how the learning rate goes over the steps")
    warmup: int = Field(0, ge=0, description="steps in which it grows from nothing")
    weight_decay: float = Field(1e-2, ge=0, description="of AdamW")
    clip: float | None = Field(1.0, gt=0, description="largest norm of the gradient; null: not clipped")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of the average of the weights that is shipped in their place; null: none"
    )
    precision: Annotated[Precision | Literal["auto"], BeforeValidator(_yaml_no)] = Field(
        "no", description="mixed precision; no: float32; auto: fp16 on CUDA, else no"
    )
    channels_last: bool = Field(False, description="channels innermost in memory: faster convolutions on a GPU")
    compile: bool = Field(False, description="torch.compile: a minute to begin with, then a faster step")
    fast_products: bool = Field(False, description="on a CPU: products of bfloat16 factors, attention unfused")
    device: Device = Field("auto", description="auto: an accelerator if there is one")
    held_out: float = Field(0.1, gt=0, lt=1, description="part of the pictures kept for the proof")
    held_out_most: int = Field(64, ge=1, description="at most so many of them are measured")
    max_skipped: float = Field(
        0.1, ge=0, le=1, description="refuse the folder when more than this part of it cannot be used"
    )
    aspect: Aspect = Field("crop", description="how a picture becomes a square; letterbox: with black")
    crops: int = Field(
        0, ge=0, description="random crops of each picture, of which every epoch draws one; 0: the centre"
    )
    flip: bool = Field(False, description="mirrored pictures too, left for right, every other time")
    checkpoint_every: int = Field(500, ge=1, description="steps; what a power cut can cost at most")
    checkpoints: int = Field(2, ge=1, description="how many of the last ones stay")
    trackers: tuple[Literal["tensorboard", "wandb", "aim", "mlflow"], ...] = Field(
        (), description="log to these as well, through Accelerate"
    )

    @model_validator(mode="after")
    def _whole_pictures_have_no_crops(self) -> Self:
        if self.crops and self.aspect != "crop":
            allowed, hint = "0: a picture shown whole has no crops", "set crops=0, or aspect=crop"
            raise UnfitError("crops", f"{self.crops} of aspect {self.aspect}", allowed=allowed, hint=hint)
        return self


class Training(Updates):
    """What the methods that train a UNet share; each has a class of its own with what it adds."""

    lora: LoraSettings | None = Field(None, description="train a LoRA of the student alone; null: all of its weights")
    teacher_precision: Annotated[Precision | None, BeforeValidator(_yaml_no)] = Field(
        None, description="of the teacher, which is run as a whole in it; null: as precision"
    )
    optimizer: Optimizer = Field("adamw", description="adamw8bit: its moments in 8 bits, a quarter of the memory")
    optimizer_in_backward: bool = Field(
        False,
        description="update each parameter in the backward pass and free its gradient; without clip and accumulation",
    )
    weights: Weights = Field(
        "float32", description="of the student while it is trained; bf16: half of it, rounded stochastically"
    )
    gradient_checkpointing: bool = Field(False, description="less memory for activations, a slower step")
    prompts: FromPrompts = Field(
        "samples", description="latents where data is prompts alone: samples, the teacher's own; random, normal ones"
    )
    prompt_steps: int = Field(25, ge=1, description="sampler steps of the teacher's own samples")
    prompt_guidance_scale: float = Field(7.5, ge=0, description="guidance of the teacher's own samples")
    sample_every: int | None = Field(
        None, ge=1, description="steps between strips of sample pictures beside the checkpoints; null: none"
    )
    sample_steps: int = Field(25, ge=1, description="sampler steps of a sample picture, and of an evaluation's")
    evaluate_every: int | None = Field(
        None,
        ge=1,
        description="steps between evaluations, the last at the end; the best student is shipped; null: none",
    )
    evaluate_images: int = Field(64, ge=1, description="pictures of such an evaluation")
    sampler: Sampler | None = Field(
        None, description="what the student's folder says it is sampled by; null: what the teacher's does"
    )

    @model_validator(mode="after")
    def _within_the_run(self) -> Self:
        if self.warmup > self.steps:
            value = f"{self.warmup} steps of {self.steps}"
            hint = f"set warmup={self.steps // 10}, or more steps"
            raise UnfitError("warmup", value, allowed=f"at most all of them, {self.steps}", hint=hint)
        return self


def check_scales(scales: float | tuple[float, float] | None) -> None:
    """Raises UnfitError for a range of guidance that is none."""
    if isinstance(scales, tuple) and scales[0] >= scales[1]:
        hint = f"write [{min(scales):g}, {max(scales):g}]" if scales[0] > scales[1] else f"write {scales[0]:g} alone"
        allowed = "one scale, or the lower and the higher one"
        raise UnfitError("teacher_guidance_scale", list(scales), allowed=allowed, hint=hint)
