"""A description of a student: which parts of the teacher stay, and how wide. All indices are the teacher's."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

BlockRule = Literal["first", "even", "sensitive"]
ChannelRule = Literal["first", "magnitude", "activation", "taylor"]
Mid = Literal["whole", "resnet", "none"]


@dataclass(frozen=True)
class Part:
    """What stays of one block; None: everything.

    resnets, attentions: which. Where only resnets are named, the attentions at their places stay; () leaves none.
    depth: how many transformer blocks stay, in every attention that stays or in each; `Keep.rule` says which. blocks:
    which ones, of each attention that stays.
    """

    resnets: tuple[int, ...] | None = None
    attentions: tuple[int, ...] | None = None
    depth: int | tuple[int, ...] | None = None
    blocks: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class Keep:
    """A student described; `Keep()` is the teacher itself.

    levels: how many stay, from the outermost; the innermost ones go, with both their blocks. down, up: by the
    teacher's index of the block, only those that change. mid: whole, its first resnet alone, or nothing; mid_part names
    its transformer blocks. widths, heads: of each level that stays. rule: how a depth becomes a choice of transformer
    blocks. channels: how a width becomes a choice of channels.
    """

    levels: int | None = None
    down: Mapping[int, Part] = field(default_factory=dict)
    up: Mapping[int, Part] = field(default_factory=dict)
    mid: Mid = "whole"
    mid_part: Part = Part()
    widths: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    rule: BlockRule = "first"
    channels: ChannelRule = "first"
