"""The pairs of modules whose outputs a feature loss compares, from a map."""

import re
from collections.abc import Mapping
from typing import Any

from decant.models.surgery.structure import Block, Structure
from decant.models.surgery.surgery import SurgeryMap, layer_map

_NUMBER = re.compile(r"_blocks\.(\d+)")


def feature_pairs(
    student_config: Mapping[str, Any], teacher_config: Mapping[str, Any], surgery_map: SurgeryMap
) -> dict[str, str]:
    """The pairs student module -> teacher module whose outputs BK-SDM compares (its equation 3), where both have one
    width: all down and up blocks, without the mid block.

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
            if student.widths[mine] != teacher.widths[theirs]:
                continue
            if side is student.up or (mine == student.levels - 1) == (theirs == teacher.levels - 1):
                pairs[block.name] = twin
            else:
                pairs[_last_layer(block)] = _last_layer(teacher.down[number])
    return pairs


def _twin(block: Block, layers: Mapping[str, str]) -> str:
    """The teacher's block that a student's block was cut from."""
    return layers[f"{block.name}.resnets.0"].rsplit(".", 2)[0]


def _last_layer(block: Block) -> str:
    if block.depths:
        return f"{block.name}.attentions.{len(block.depths) - 1}.proj_out"
    return f"{block.name}.resnets.{block.resnets - 1}"
