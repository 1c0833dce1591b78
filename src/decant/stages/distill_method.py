"""The method that the settings of a distillation ask for."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from decant.errors import refuse
from decant.methods.kd import KD, Knobs, Timesteps
from decant.models.families.family import Family
from decant.models.projection import Projection
from decant.models.surgery.features import feature_widths, kept_channels, pairs_of
from decant.models.surgery.surgery import SurgeryMap
from decant.stages.distill_settings import Distill, values_of
from decant.stages.following import followed
from decant.stages.lora import is_lora
from decant.stages.players import Players
from decant.stages.record import surgery_map_of
from decant.stages.stage import Inputs

Config = dict[str, Any]


def method_of(settings: Distill, inputs: Inputs, players: Players, next_teachers: Sequence[UNet2DConditionModel]) -> KD:
    """The method that the settings ask for, its features paired by the student's surgery map.

    Raises:
        UserError: features are asked for and the student has no surgery map, or none fits.
    """
    settings = settings.model_copy(update={"prediction": players.prediction})
    pairs, projections = _paired(settings, inputs, players) if any(values_of(settings.feature)) else ({}, {})
    teachers = [players.teacher.unet, *next_teachers]
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
        compared_as=settings.compared_as,
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
