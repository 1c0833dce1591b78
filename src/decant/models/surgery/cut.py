"""The one cut: from a teacher's config and weights, and a description, to a student and its map."""

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from decant.errors import UserError, refuse
from decant.models.surgery.channels import Narrowing, Scores, magnitudes, needs_measuring
from decant.models.surgery.config import student_config
from decant.models.surgery.features import feature_pairs
from decant.models.surgery.keep import Keep
from decant.models.surgery.plan import Damage, Plan, plan
from decant.models.surgery.spaces import Space, Spaces
from decant.models.surgery.structure import with_defaults
from decant.models.surgery.surgery import Surgery, SurgeryMap, pick, skeleton

_INSIDE = re.compile(r"((?:down|up)_blocks\.\d+|mid_block)\.(?:(resnets|attentions)\.(\d+)\.)?(.+)")
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")


def cut(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    keep: Keep,
    *,
    damage: Damage | None = None,
    scores: Scores | None = None,
) -> Surgery:
    """Cut a student out of a teacher UNet, without touching the teacher.

    Args:
        config: the teacher's diffusers config; keys that it leaves out take diffusers' defaults.
        weights: the teacher's state dict. Tensors on the meta device give a student on the meta device, of which the
            first channels stay: there are no others to prefer.
        keep: which parts stay, and how wide.
        damage: for the rule `sensitive`: transformer block -> the damage of its removal.
        scores: for the channel rules `activation` and `taylor`: measured, by space.

    Raises:
        UserError: the description names what is not there or what plain diffusers cannot build, or the weights are
            of another config.
    """
    made = plan(config, keep, damage)
    new = student_config(config, made)
    narrowing = _narrowing(config, new, weights, keep, scores)
    channels = cache(narrowing.kept)  # of a stream a hundred parameters ask
    parameters, kept, cut_weights = {}, {}, {}
    for name, tensor in skeleton(new).state_dict().items():
        parameters[name] = source = _source(name, made)
        if source not in weights:
            raise _not_of_the_config(source, "missing")
        axes = _kept_axes(name, source, narrowing, channels)
        _check_fits(source, weights[source], axes, tensor.shape)
        if axes:
            kept[name] = axes
        cut_weights[name] = pick(weights[source], axes)
    surgery_map = SurgeryMap(parameters, kept)
    return Surgery(new, cut_weights, surgery_map.paired(feature_pairs(new, config, surgery_map)))


def _narrowing(
    config: Mapping[str, Any],
    new: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    keep: Keep,
    scores: Scores | None,
) -> Narrowing:
    teacher, student = Spaces.of(config), Spaces.of(new)
    levels = student.structure.levels
    narrowed = any(
        getattr(student.structure, key) != getattr(teacher.structure, key)[:levels] for key in ("widths", "heads")
    )
    groups = with_defaults(config)["norm_num_groups"]
    if not narrowed or keep.channels == "first" or any(weight.is_meta for weight in weights.values()):
        return Narrowing(teacher, student, {}, groups)
    if needs_measuring(keep.channels):
        if scores is None:
            raise refuse(
                "channels",
                f"{keep.channels} without a measurement",
                allowed="first, magnitude; activation and taylor with calibration data",
                hint="give --data",
            )
        return Narrowing(teacher, student, scores, groups)
    return Narrowing(teacher, student, magnitudes(weights, teacher), groups)


def _source(name: str, made: Plan) -> str:
    """The teacher's name of a student parameter."""
    match = _INSIDE.fullmatch(name)
    if match is None:
        return name
    block, part, number, rest = match.groups()
    kept = made.blocks[block]
    if part is None:
        return f"{kept.source}.{rest}"
    if part == "resnets":
        return f"{kept.source}.resnets.{kept.resnets[int(number)]}.{rest}"
    if inside := _BLOCK.fullmatch(rest):
        rest = f"transformer_blocks.{kept.blocks[int(number)][int(inside[1])]}.{inside[2]}"
    return f"{kept.source}.attentions.{kept.attentions[int(number)]}.{rest}"


def _kept_axes(
    name: str, source: str, narrowing: Narrowing, kept: Callable[[Space], list[int]]
) -> dict[int, list[int]]:
    """The teacher's indices that stay, of every axis that loses some.

    Where the level has gone that a resnet read in the teacher, it takes the channels of what it reads now, at their
    places.
    """
    mine, theirs = narrowing.student.axes(name, source), narrowing.teacher.axes(source)
    axes: dict[int, list[int]] = {}
    for axis, (spaces, before) in enumerate(zip(mine or (), theirs or (), strict=True)):
        indices: list[int] = []
        start = 0
        for space, earlier in zip(spaces, before, strict=True):
            chosen, whole = kept(space), narrowing.teacher.size(earlier)
            gone = earlier.level >= narrowing.student.structure.levels
            if space != earlier and (not gone or chosen[-1] >= whole):
                raise _reads_another(name, source, gone)
            indices += [start + index for index in chosen]
            start += whole
        if spaces and len(indices) < start:
            axes[axis] = indices
    return axes


def _reads_another(name: str, source: str, gone: bool) -> UserError:
    mine, theirs = name.rsplit(".", 2)[0], source.rsplit(".", 2)[0]
    if gone:
        return refuse(
            mine,
            f"reads more channels from the level before than {theirs} did",
            allowed="a level that is at most as wide as the one that goes",
            hint="keep one level more",
        )
    return refuse(
        mine,
        f"reads another level than {theirs} does in the teacher",
        allowed="the first resnet of a block as the first; of an up block also the last as the last",
        hint="only the first reads the block before it, and only the last of an up block the skip from outside",
    )


def _check_fits(source: str, weight: Tensor, axes: Mapping[int, list[int]], shape: torch.Size) -> None:
    found = list(weight.shape)
    if [len(axes.get(axis, range(size))) for axis, size in enumerate(found)] != list(shape):
        raise _not_of_the_config(source, found)
    if any(indices[-1] >= found[axis] for axis, indices in axes.items()):
        raise _not_of_the_config(source, found)


def _not_of_the_config(name: str, found: object) -> UserError:
    return refuse(
        f"unet weights, {name}",
        found,
        allowed="the weights that belong to the config",
        hint="config.json and weights are of two different networks; take both from one folder",
    )
