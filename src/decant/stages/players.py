"""Who takes part in a distillation: teachers, student, and the method between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from decant.errors import refuse
from decant.maths.prediction import Prediction
from decant.methods.kd import KD, Knobs, Timesteps
from decant.models.families.family import Family
from decant.models.families.of import family_of
from decant.models.layout import Pipeline
from decant.models.load import load, with_unet
from decant.models.projection import Projection
from decant.models.surgery.features import feature_widths, kept_channels, pairs_of
from decant.models.surgery.surgery import SurgeryMap
from decant.stages.distill_settings import Distill, values_of
from decant.stages.following import followed
from decant.stages.lora import add_lora, is_lora
from decant.stages.record import surgery_map_of
from decant.stages.stage import Inputs

Config = dict[str, Any]
# What SDXL's networks are told besides the text: one of another kind cannot take the teacher's conditions.
_TOLD = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")


@dataclass(frozen=True)
class Players:
    """What a run is made of, opened, and the captions of its sample pictures. prediction: what the student answers."""

    teacher: Pipeline
    student: UNet2DConditionModel
    family: Family
    captions: tuple[str, ...]
    prediction: Prediction
    next_teachers: tuple[UNet2DConditionModel, ...] = ()

    def drawing_with(self, student: UNet2DConditionModel) -> Pipeline:
        """The teacher's pipeline around the student."""
        return with_unet(self.teacher, student, self.prediction)


def open_players(settings: Distill, inputs: Inputs, captions: tuple[str, ...]) -> Players:
    """Teachers and student from their folders, with a LoRA's layers and checkpointing where they are asked for.

    Raises:
        UserError: a network that cannot take the teacher's latents and conditions, or a later teacher of another kind.
    """
    teacher = load(inputs.teacher)
    cut = load(inputs.source)
    student = cut.unet
    _check_told(student, teacher, f"student {inputs.source}", "cut the student from this teacher")
    if settings.lora is not None:
        add_lora(student, settings.lora, inputs.seed)
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    others = tuple(_next_teacher(each.teacher, teacher, inputs) for each in settings.next_teachers)
    prediction = settings.prediction or family_of(cut).prediction
    return Players(teacher, student, family_of(teacher), captions, prediction, others)


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


def method_of(settings: Distill, inputs: Inputs, players: Players) -> KD:
    """The method that the settings ask for, its features paired by the student's surgery map.

    Raises:
        UserError: features are asked for and the student has no surgery map, or none fits.
    """
    settings = settings.model_copy(update={"prediction": players.prediction})
    pairs, projections = _paired(settings, inputs, players) if any(values_of(settings.feature)) else ({}, {})
    teachers = [players.teacher.unet, *players.next_teachers]
    return method_between(settings, players.family, players.student, teachers, pairs, projections)


def method_between(
    settings: Distill,
    family: Family,
    student: UNet2DConditionModel,
    teachers: Sequence[UNet2DConditionModel],
    pairs: Mapping[str, str],
    projections: Mapping[str, Projection],
) -> KD:
    """The method that the settings ask for, between these networks."""
    scales = settings.teacher_guidance_scale
    how = settings.timesteps
    knobs = Knobs(
        task=followed(settings.task),
        output=followed(settings.output),
        feature=followed(settings.feature),
        output_distance=settings.output_distance,
        feature_distance=settings.feature_distance,
        min_snr_gamma=settings.min_snr_gamma,
        feature_snr=settings.feature_snr,
        caption_dropout=followed(settings.caption_dropout),
        guidance_scale=scales,
        timesteps=Timesteps(how.kind, followed(how.count), how.mean, how.std),
        steps=settings.steps,
        switches=tuple(round(each.at * settings.steps) for each in settings.next_teachers),
        prediction=settings.prediction,
        ema=settings.ema,
    )
    trained = is_lora if settings.lora is not None else lambda name: True
    return KD.of(family, student, teachers, pairs, knobs, projections, trained)


def _paired(settings: Distill, inputs: Inputs, players: Players) -> tuple[dict[str, str], dict[str, Projection]]:
    """The pairs whose features are compared, and the maps of those whose widths differ."""
    known = surgery_map_of(inputs.source)
    if known is None:
        raise refuse(
            f"student {inputs.source}",
            "no surgery map in its decant.json",
            allowed="a student that decant cut",
            hint="`decant prune` writes the map that pairs layers; or set feature=0",
        )
    mine, theirs = dict(players.student.config), dict(players.teacher.unet.config)
    pairs, widths = pairs_between(settings, mine, theirs, known, players.family.tokens)
    return pairs, {name: _projection(name, *each, known) for name, each in widths.items()}


def pairs_between(
    settings: Distill, mine: Config, theirs: Config, known: SurgeryMap, tokens: int
) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """The pairs whose features are compared, and where they differ the student's and the teacher's width.

    Raises:
        UserError: no feature has its teacher's width, and no projection is asked for.
    """
    pairs: dict[str, str] = {}
    for level in settings.features:
        pairs |= pairs_of(level, mine, theirs, known)
    widths = feature_widths(mine, list(pairs), tokens)
    wanted = feature_widths(theirs, list(pairs.values()), tokens)
    other = {name: (widths[name], wanted[twin]) for name, twin in pairs.items() if widths[name] != wanted[twin]}
    if settings.projection:
        return pairs, other
    pairs = {name: twin for name, twin in pairs.items() if name not in other}
    if not pairs:
        allowed = "features of which some have the teacher's width"
        hint = "set projection=true, or feature=0"
        raise refuse("distill.features", ", ".join(settings.features), allowed=allowed, hint=hint)
    return pairs, {}


def _projection(name: str, width: int, wanted: int, known: SurgeryMap) -> Projection:
    return Projection(width, wanted, kept_channels(known, name, width))
