"""What a cut changed, in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from decant.models.surgery.structure import Block, Structure
from decant.models.surgery.surgery import Surgery, layer_map


def changes(teacher_config: Mapping[str, Any], surgery: Surgery) -> list[str]:
    """One sentence for every block of the teacher that changed, and for every level that was narrowed."""
    teacher, student = Structure.of(teacher_config), Structure.of(surgery.config)
    kept = set(layer_map(surgery.surgery_map).values())
    blocks = _transformer_blocks(surgery)
    told = [line for block in teacher.blocks for line in _of_block(block, kept, blocks)]
    for level, (before, after) in enumerate(zip(teacher.widths, student.widths, strict=False)):
        if before != after:
            told.append(f"level {level}: {after} of {before} channels stay")
    for level, (before, after) in enumerate(zip(teacher.heads, student.heads, strict=False)):
        if before != after:
            told.append(f"level {level}: {after} of {before} attention heads stay")
    return told or ["nothing changed"]


def _of_block(block: Block, kept: set[str], blocks: Mapping[str, set[int]]) -> list[str]:
    resnets = [i for i in range(block.resnets) if f"{block.name}.resnets.{i}" in kept]
    attentions = [i for i in range(len(block.depths)) if f"{block.name}.attentions.{i}" in kept]
    if not resnets:
        return [f"{block.name}: removed"]
    said = []
    for part, stay, whole in (("resnets", resnets, block.resnets), ("attentions", attentions, len(block.depths))):
        if len(stay) < whole:
            said.append(f"{len(stay)} of {whole} {part} stay ({_listed(stay)})" if stay else f"all {part} removed")
    for index in attentions:
        stay = sorted(blocks.get(f"{block.name}.attentions.{index}", set()))
        if len(stay) < block.depths[index]:
            of = f"of {block.depths[index]} transformer blocks of attention {index} stay"
            said.append(f"{len(stay)} {of} ({_listed(stay)})" if stay else f"0 {of}")
    return [f"{block.name}: {'; '.join(said)}"] if said else []


def _transformer_blocks(surgery: Surgery) -> dict[str, set[int]]:
    """The teacher's attention -> its transformer blocks that stay."""
    found: dict[str, set[int]] = {}
    for source in surgery.surgery_map.parameters.values():
        attention, _, rest = source.partition(".transformer_blocks.")
        if rest:
            found.setdefault(attention, set()).add(int(rest.split(".", 1)[0]))
    return found


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)
