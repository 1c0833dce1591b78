"""The pairs of modules whose outputs a feature loss compares, from a map."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, assert_never

import torch

from decant.models.families.unet import blank, forward
from decant.models.surgery.structure import Block, Structure
from decant.models.surgery.surgery import SurgeryMap, frozen, layer_map, skeleton
from decant.models.taps import tap

Level = Literal["block", "layer", "self_attention"]

_LAYERS = re.compile(r".*\.(?:resnets|attentions)\.\d+(?=\.)")
_SELF_ATTENTION = re.compile(r".*\.attn1(?=\.)")
# The parameter whose first axis is the output of a module: of a resnet, an attention, a self-attention, a sampler.
_LAST = ("conv2.weight", "proj_out.weight", "to_out.0.weight", "conv.weight")
_NUMBER = re.compile(r"_blocks\.(\d+)")


def feature_pairs(
    student_config: Mapping[str, Any],
    teacher_config: Mapping[str, Any],
    surgery_map: SurgeryMap,
    *,
    any_width: bool = False,
) -> dict[str, str]:
    """The pairs student module -> teacher module whose outputs BK-SDM compares (its equation 3), where both have one
    width or with ``any_width``: all down and up blocks, without the mid block.

    A student's innermost down block has no downsampler. Where its teacher's twin has one, the last attention's
    `proj_out` stands for the block, as in BK-SDM-Tiny, or the last resnet where there is no attention.
    """
    student, teacher = Structure.of(student_config), Structure.of(teacher_config)
    layers = layer_map(surgery_map)
    pairs: dict[str, str] = {}
    for side in (student.down, student.up):
        for index, block in enumerate(side):
            twin = _twin(block, layers)
            number = int(_NUMBER.findall(twin)[0])
            mine = index if side is student.down else student.levels - 1 - index
            theirs = number if side is student.down else teacher.levels - 1 - number
            if student.widths[mine] != teacher.widths[theirs] and not any_width:
                continue
            if side is student.up or (mine == student.levels - 1) == (theirs == teacher.levels - 1):
                pairs[block.name] = twin
            else:
                pairs[_last_layer(block)] = _last_layer(teacher.down[number])
    return pairs


def pairs_of(
    level: Level, student_config: Mapping[str, Any], teacher_config: Mapping[str, Any], surgery_map: SurgeryMap
) -> dict[str, str]:
    """The pairs student module -> teacher module of a level, of any widths.

    block: `feature_pairs`, as BK-SDM. layer: every resnet and every attention, as SSD-1B (Gupta et al. 2024, section
    3.3), 26 of it. self_attention: of every transformer block, as KOALA (Lee et al. 2023, section 3.2).
    """
    match level:
        case "block":
            return feature_pairs(student_config, teacher_config, surgery_map, any_width=True)
        case "layer":
            return _modules(surgery_map, _LAYERS)
        case "self_attention":
            return _modules(surgery_map, _SELF_ATTENTION)
        case _:
            assert_never(level)


def feature_widths(config: Mapping[str, Any], names: Sequence[str], tokens: int) -> dict[str, int]:
    """How many channels the outputs of these modules have; counted on a twin without weights."""
    return dict(_feature_widths(frozen(config), tuple(names), tokens))


@lru_cache(maxsize=64)
def _feature_widths(text: str, names: tuple[str, ...], tokens: int) -> dict[str, int]:
    config = json.loads(text)
    unet = skeleton(config)
    side = 2 ** len(config["block_out_channels"])
    x_t = torch.empty(1, config["in_channels"], side, side, device="meta")
    with torch.no_grad(), tap(unet, names) as tapped:
        _, found = forward(tapped, x_t, torch.zeros(1, device="meta"), blank(config, 1, tokens, "meta"))
    return {name: feature.shape[1 if feature.ndim == 4 else -1] for name, feature in found.items()}


def kept_channels(surgery_map: SurgeryMap, module: str, width: int) -> list[int] | None:
    """Which of the teacher's channels a student module's output has, in order; None where the map does not say."""
    for name, axes in surgery_map.kept.items():
        if name.startswith(f"{module}.") and name.endswith(_LAST) and len(axes.get(0, ())) == width:
            return axes[0]
    return None


def _modules(surgery_map: SurgeryMap, pattern: re.Pattern[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for student, teacher in surgery_map.parameters.items():
        mine, theirs = pattern.match(student), pattern.match(teacher)
        if mine and theirs:
            pairs[mine.group()] = theirs.group()
    return pairs


def _twin(block: Block, layers: Mapping[str, str]) -> str:
    """The teacher's block that a student's block was cut from."""
    return layers[f"{block.name}.resnets.0"].rsplit(".", 2)[0]


def _last_layer(block: Block) -> str:
    if block.depths:
        return f"{block.name}.attentions.{len(block.depths) - 1}.proj_out"
    return f"{block.name}.resnets.{block.resnets - 1}"


def innermost(config: Mapping[str, Any]) -> tuple[str, int]:
    """The module whose output lies deepest in a network of this config, and its channels."""
    levels = config["block_out_channels"]
    return ("mid_block" if config["mid_block_type"] else f"down_blocks.{len(levels) - 1}"), int(levels[-1])
