"""Cut a student out of a teacher: parts taken out, levels narrowed, weights inherited, the map kept."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from pydantic import Field, model_validator

from decant.errors import UnfitError, refuse
from decant.models.cost import parameters
from decant.models.device import Device, pick
from decant.models.families.of import family_of
from decant.models.generate import pixels
from decant.models.layout import Pipeline
from decant.models.load import cast, load, save, stored_dtype, unet_config, with_unet
from decant.models.surgery.channels import Scores, needs_measuring
from decant.models.surgery.cut import cut
from decant.models.surgery.features import feature_pairs
from decant.models.surgery.keep import BlockRule, ChannelRule, Keep
from decant.models.surgery.measure import activations, taylor
from decant.models.surgery.plan import Damage
from decant.models.surgery.presets import Student, preset
from decant.models.surgery.spaces import Spaces
from decant.models.surgery.surgery import Surgery, build, layer_map, skeleton
from decant.stages.calibrate import calibration
from decant.stages.description import Description
from decant.stages.record import drawn_alike, figures_of, inherited, surgery_map_of
from decant.stages.stage import Inputs, Settings, Stage
from decant.stages.told import changes


class Prune(Settings):
    """Which student to cut."""

    student: Student | None = Field(None, description="a published student by its name; bk-tiny, unless keep says more")
    keep: Description | None = Field(None, description="a student described part by part, in place of a name")
    rule: BlockRule = Field("first", description="which transformer blocks stay where only their number is given")
    importance: Path | None = Field(
        None, description="for the rule sensitive: the file that `decant importance` wrote for this teacher"
    )
    channels: ChannelRule = Field("first", description="which channels stay in a level that is narrowed")
    weights: Literal["teacher", "random"] = Field(
        "teacher", description="random: the same network begun from nothing, to compare with"
    )
    calibration: int = Field(
        64, ge=1, description="pictures that the channel rules activation and taylor measure the teacher on"
    )
    device: Device = Field("auto", description="of that measurement; auto: an accelerator if there is one")

    @model_validator(mode="after")
    def _one_student(self) -> "Prune":
        if self.student is not None and self.keep is not None:
            hint = f"leave student={self.student} out, or keep"
            raise UnfitError("keep", f"given beside student {self.student}", allowed="one of the two", hint=hint)
        return self

    @property
    def name(self) -> str:
        """What the student is called."""
        return "described" if self.keep is not None else self.student or "bk-tiny"

    def description(self, config: Mapping[str, Any]) -> Keep:
        """The student of the teacher that ``config`` builds."""
        if self.keep is not None:
            return self.keep.keep(self.rule, self.channels)
        return preset(self.name, config, self.rule, self.channels)


def run(settings: Prune, inputs: Inputs, out: Path) -> dict[str, Any]:
    """Cut the UNet of ``inputs.source``; everything else of its pipeline is kept as it is.

    The source may be a student that was cut before, and distilled: its map then leads on to the teacher.
    """
    pipeline = load(inputs.source)
    family = family_of(pipeline)
    config, before = dict(pipeline.unet.config), parameters(pipeline.unet)
    keep = settings.description(config)
    scores = _scores(settings, pipeline, inputs) if needs_measuring(keep.channels) else None
    surgery = cut(config, pipeline.unet.state_dict(), keep, damage=damage_of(settings.importance), scores=scores)
    surgery, whole = _to_teacher(surgery, config, inputs)
    told = changes(whole, surgery)
    unet = build(surgery) if settings.weights == "teacher" else _untrained(surgery.config, inputs.seed)
    save(cast(with_unet(pipeline, unet), stored_dtype(inputs.source)), out)
    after = parameters(unet)
    inputs.talk(f"{settings.name}: {before:,} -> {after:,} parameters")
    for line in told:
        inputs.talk(f"  {line}")
    return {
        "family": family.name,
        "student": settings.name,
        "changes": told,
        "surgery_map": surgery.surgery_map.to_json(),
        "figures": figures_of(unet, family.tokens),
        **inherited(inputs.source),
        **drawn_alike(inputs.source),
    }


def _untrained(config: Mapping[str, Any], seed: int) -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel.from_config(dict(config)).eval()


def damage_of(importance: Path | None) -> Damage | None:
    """Transformer block -> damage of its removal, out of the file of `decant importance`.

    Raises:
        UserError: it is not such a file.
    """
    if importance is None:
        return None
    try:
        parts = json.loads(importance.read_text(encoding="utf-8"))["parts"]
        return {part["name"]: float(part["damage"]) for part in parts if part["kind"] == "transformer block"}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise refuse(
            "importance",
            f"{importance}: {error}",
            allowed="importance.json as `decant importance` writes it",
            hint="decant importance TEACHER --data DIR --out DIR",
        ) from None


def _scores(settings: Prune, pipeline: Pipeline, inputs: Inputs) -> Scores:
    """Channels of the teacher, measured on the data."""
    device, unet = pick(settings.device), pipeline.unet
    size = pixels(pipeline, None)[0]
    measured = calibration(family_of(pipeline), size, settings.calibration, inputs, device)
    spaces = Spaces.of(dict(unet.config))
    torch.nn.Module.to(unet, device).requires_grad_(settings.channels == "taylor")
    if settings.channels == "taylor":
        found = taylor(unet, spaces, (measured.loss(unet, call) for call in measured.calls(device)))
    else:
        calls = measured.calls(device)
        found = activations(unet, spaces, (partial(measured.answer, unet, call) for call in calls))
    torch.nn.Module.to(unet, "cpu").requires_grad_(False)
    return {space: score.cpu() for space, score in found.items()}


def _to_teacher(surgery: Surgery, config: Mapping[str, Any], inputs: Inputs) -> tuple[Surgery, Mapping[str, Any]]:
    """The same cut with a map to the teacher of ``inputs``, where the source is a student of its; and that config."""
    earlier = None if str(inputs.source) == inputs.teacher else surgery_map_of(inputs.source)
    if earlier is None:
        return surgery, config
    teacher = unet_config(inputs.teacher)
    composed = surgery.surgery_map.after(earlier, {})
    pairs = feature_pairs(surgery.config, teacher, composed)
    return replace(surgery, surgery_map=composed.paired(pairs)), teacher


def preview(config: Mapping[str, Any], settings: Prune, tokens: int) -> dict[str, Any]:
    """What a cut would give, without weights: parameters, MACs at the network's own size, and the layer map.

    ``tokens``: length of the condition that the MACs count.
    """
    surgery = cut(
        config,
        skeleton(config).state_dict(),
        settings.description(config),
        damage=damage_of(settings.importance),
    )
    return {
        **figures_of(skeleton(surgery.config), tokens),
        "changes": changes(config, surgery),
        "layer_map": layer_map(surgery.surgery_map),
        "feature_pairs": surgery.surgery_map.features,
    }


STAGE = Stage(settings=Prune, run=run, data="optional")
