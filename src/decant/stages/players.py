"""Who takes part in a training: teacher, student, and how both are told and sampled."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from decant.errors import refuse
from decant.maths.prediction import Prediction
from decant.models.families.family import Family
from decant.models.families.of import family_of
from decant.models.generate import sampled_by
from decant.models.layout import Pipeline, rebuilt
from decant.models.load import load, with_unet
from decant.models.samplers import Sampler
from decant.stages.lora import add_lora
from decant.stages.stage import Inputs
from decant.stages.training_settings import Training

Config = dict[str, Any]
# What SDXL's networks are told besides the text: one of another kind cannot take the teacher's conditions.
_TOLD = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")


@dataclass(frozen=True)
class Players:
    """What a run is made of, opened, and the captions of its sample pictures.

    prediction: what the student answers. sampler: what it is drawn by, None for what its teacher is. small_vae: what it
    is decoded by, where that is not the teacher's.
    """

    teacher: Pipeline
    student: UNet2DConditionModel
    family: Family
    captions: tuple[str, ...]
    prediction: Prediction
    sampler: Sampler | None = None
    small_vae: AutoencoderTiny | None = None

    def drawing_with(self, student: UNet2DConditionModel) -> Pipeline:
        """The teacher's pipeline around the student, with the student's sampler and small autoencoder."""
        pipeline = with_unet(self.teacher, student, self.prediction)
        if self.small_vae is not None:
            pipeline = rebuilt(pipeline, vae=self.small_vae)
        return pipeline if self.sampler is None else sampled_by(pipeline, self.sampler)


def open_players(settings: Training, inputs: Inputs, captions: tuple[str, ...]) -> Players:
    """Teacher and student from their folders, with a LoRA's layers and checkpointing where they are asked for.

    Raises:
        UserError: a network that cannot take the teacher's latents and conditions.
    """
    teacher = load(inputs.teacher)
    cut = load(inputs.source)
    student = cut.unet
    _check_told(student, teacher, f"student {inputs.source}", "cut the student from this teacher")
    if settings.lora is not None:
        add_lora(student, settings.lora, inputs.seed)
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    small, prediction = cut.vae if isinstance(cut.vae, AutoencoderTiny) else None, family_of(cut).prediction
    return Players(teacher, student, family_of(teacher), captions, prediction, settings.sampler, small)


def later_teachers(sources: Sequence[str], first: Pipeline, inputs: Inputs) -> tuple[UNet2DConditionModel, ...]:
    """The UNets of teachers that take over from the first.

    Raises:
        UserError: one of another kind than the first.
    """
    return tuple(_next_teacher(source, first, inputs) for source in sources)


def _next_teacher(source: str, first: Pipeline, inputs: Inputs) -> UNet2DConditionModel:
    """A later teacher's UNet. It is told what the first teacher's encoders say, as its student will be."""
    pipeline = load(source)
    family, before = family_of(pipeline), family_of(first)
    _check_told(pipeline.unet, first, f"next_teachers {source}", "teachers of one student have one layout")
    if dict(pipeline.unet.config)["block_out_channels"] != dict(first.unet.config)["block_out_channels"]:
        place = f"next_teachers {source}: block_out_channels"
        allowed = f"{first.unet.config['block_out_channels']}, as the first teacher's"
        raise refuse(place, pipeline.unet.config["block_out_channels"], allowed=allowed, hint="take a fine-tuned twin")
    if family.prediction != before.prediction:
        place, hint = f"next_teachers {source}: prediction", "take a fine-tuned twin of the first teacher"
        raise refuse(place, family.prediction, allowed=f"{before.prediction}, as the first teacher's", hint=hint)
    firsts = before.made_by()  # digests of whole encoders
    for what, digest in family.made_by().items():
        if digest != firsts[what]:
            inputs.talk(f"{source} was trained with another encoder of {what}: it is told what the first one says")
    return pipeline.unet


def _check_told(unet: UNet2DConditionModel, teacher: Pipeline, place: str, hint: str) -> None:
    """Refuse a network that cannot take the teacher's latents and conditions."""
    for name in ("in_channels", "out_channels", "cross_attention_dim", *_TOLD):
        own, theirs = unet.config[name], teacher.unet.config[name]
        if own != theirs:
            raise refuse(f"{place}: {name}", own, allowed=f"{theirs}, as the teacher's", hint=hint)
