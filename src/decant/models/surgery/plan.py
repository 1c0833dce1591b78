"""A description made exact for one teacher: every part that stays by its index, or the reason why it cannot be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any, assert_never

from decant.errors import UserError, refuse
from decant.models.surgery.keep import BlockRule, Keep, Part
from decant.models.surgery.structure import Block, Structure, with_defaults

Damage = Mapping[str, float]


@dataclass(frozen=True)
class Kept:
    """What stays of one block, by the teacher's indices.

    attentions: as many as resnets, or none. blocks: the transformer blocks of each attention that stays.
    """

    source: str
    resnets: tuple[int, ...]
    attentions: tuple[int, ...]
    blocks: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Plan:
    """A student in full: its blocks in their order, and width and heads of each level."""

    down: tuple[Kept, ...]
    mid: Kept | None
    up: tuple[Kept, ...]
    widths: tuple[int, ...]
    heads: tuple[int, ...]

    @property
    def blocks(self) -> dict[str, Kept]:
        """By the student's name of the block."""
        named = {f"down_blocks.{i}": kept for i, kept in enumerate(self.down)}
        if self.mid is not None:
            named["mid_block"] = self.mid
        return named | {f"up_blocks.{i}": kept for i, kept in enumerate(self.up)}


def plan(config: Mapping[str, Any], keep: Keep, damage: Damage | None = None) -> Plan:
    """The plan of a description for the teacher that ``config`` builds.

    ``damage``: what the rule `sensitive` chooses by: transformer block -> how much its removal changes the output.

    Raises:
        UserError: the description names what is not there, keeps nothing of a block, or asks for what plain diffusers
            cannot build; the message says which part and why.
    """
    teacher = Structure.of(config)
    levels = _levels(teacher, keep)
    gone = teacher.levels - levels
    _check_named(keep, teacher, levels)

    def kept(block: Block, part: Part) -> Kept:
        return _kept(block, part, keep.rule, damage)

    made = Plan(
        tuple(kept(block, keep.down.get(i, Part())) for i, block in enumerate(teacher.down[:levels])),
        _kept_mid(teacher, keep, damage),
        tuple(kept(block, keep.up.get(gone + i, Part())) for i, block in enumerate(teacher.up[gone:])),
        _widths(teacher, keep, levels),
        keep.heads or teacher.heads[:levels],
    )
    _check_resnets(made)
    _check_mid(made)
    if made.widths != teacher.widths[:levels] or made.heads != teacher.heads[:levels]:
        _check_narrowed(config, teacher, made)
    return made


def _levels(teacher: Structure, keep: Keep) -> int:
    levels = teacher.levels if keep.levels is None else keep.levels
    if not 1 <= levels <= teacher.levels:
        raise refuse("levels", levels, allowed=f"1 to {teacher.levels}", hint="the innermost levels go first")
    return levels


def _check_named(keep: Keep, teacher: Structure, levels: int) -> None:
    """Every block that the description names must be there, and stay."""
    gone = teacher.levels - levels
    for side, named, there in (
        ("down", keep.down, range(levels)),
        ("up", keep.up, range(gone, teacher.levels)),
    ):
        for index in named:
            if index not in there:
                what = "it goes with its level" if 0 <= index < teacher.levels else "there is no such block"
                raise refuse(
                    f"{side}.{index}",
                    f"{side}_blocks.{index}: {what}",
                    allowed=f"{side} {_told(there)}",
                    hint=f"{levels} of the teacher's {teacher.levels} levels stay",
                )


def _kept(block: Block, part: Part, rule: BlockRule, damage: Damage | None) -> Kept:
    resnets = _chosen(f"{block.name}.resnets", part.resnets, block.resnets)
    if not resnets:
        raise refuse(
            f"{block.name}.resnets",
            "none",
            allowed=f"at least one of {_told(range(block.resnets))}",
            hint="a block without resnets cannot be built; `levels` takes out the innermost ones whole",
        )
    attentions = _attentions(block, part, resnets)
    return Kept(block.name, resnets, attentions, _blocks(block, part, attentions, rule, damage))


def _attentions(block: Block, part: Part, resnets: tuple[int, ...]) -> tuple[int, ...]:
    if not block.depths:
        if part.attentions:
            raise refuse(
                f"{block.name}.attentions", part.attentions, allowed="none", hint="the teacher has none in this block"
            )
        return ()
    if part.attentions is None:
        return resnets
    attentions = _chosen(f"{block.name}.attentions", part.attentions, len(block.depths))
    if attentions and len(attentions) != len(resnets):
        raise refuse(
            f"{block.name}.attentions",
            list(attentions),
            allowed=f"{len(resnets)} of them, one after each resnet that stays, or none at all",
            hint="plain diffusers builds a block with an attention after every resnet, or after none; "
            "an attention may keep no transformer block: `blocks: [[], ...]`",
        )
    return attentions


def _blocks(
    block: Block, part: Part, attentions: tuple[int, ...], rule: BlockRule, damage: Damage | None
) -> tuple[tuple[int, ...], ...]:
    """The transformer blocks that stay in each attention that stays."""
    place = f"{block.name}.{'depth' if part.blocks is None else 'blocks'}"
    if part.depth is not None and part.blocks is not None:
        raise refuse(place, "with a depth beside it", allowed="one of them", hint="blocks says which, depth how many")
    asked: Sequence[Any] | None = part.blocks
    if part.depth is not None:
        asked = part.depth if isinstance(part.depth, tuple) else (part.depth,) * len(attentions)
    if asked is None:
        return tuple(tuple(range(block.depths[index])) for index in attentions)
    if len(asked) != len(attentions):
        raise refuse(
            place,
            f"for {len(asked)} attentions",
            allowed=f"for each of the {len(attentions)} that stay",
            hint=f"attentions that stay: {list(attentions)}",
        )
    names = [f"{block.name}.attentions.{index}" for index in attentions]
    depths = [block.depths[index] for index in attentions]
    if part.blocks is not None:
        return tuple(
            _chosen(f"{name}.transformer_blocks", which, depth)
            for name, which, depth in zip(names, part.blocks, depths, strict=True)
        )
    return tuple(
        _by_rule(name, count, depth, rule, damage) for name, count, depth in zip(names, asked, depths, strict=True)
    )


def _by_rule(name: str, count: int, depth: int, rule: BlockRule, damage: Damage | None) -> tuple[int, ...]:
    """Which ``count`` of ``depth`` transformer blocks stay."""
    if not 0 <= count <= depth:
        raise refuse(f"{name}.depth", count, allowed=f"0 to {depth}", hint=f"the teacher has {depth} blocks there")
    match rule:
        case "first":
            return tuple(range(count))
        case "even":
            # The first and the last stay, as far as two do; the others lie evenly between them.
            return tuple(round(i * (depth - 1) / (count - 1)) for i in range(count)) if count > 1 else (0,) * count
        case "sensitive":
            names = [f"{name}.transformer_blocks.{i}" for i in range(depth)]
            missing = [each for each in names if damage is None or each not in damage]
            if missing:
                raise refuse(
                    "rule",
                    f"sensitive, without a measure for {missing[0]}",
                    allowed="sensitive with the file that `decant importance` wrote for this teacher",
                    hint="decant importance TEACHER --out importance.json",
                )
            assert damage is not None
            worst = sorted(range(depth), key=lambda i: -damage[names[i]])
            return tuple(sorted(worst[:count]))
        case _:
            assert_never(rule)


def _kept_mid(teacher: Structure, keep: Keep, damage: Damage | None) -> Kept | None:
    if keep.mid == "none" or teacher.mid is None:
        if teacher.mid is None and keep.mid == "resnet":
            raise refuse("mid", "resnet", allowed="whole or none", hint="the teacher has no mid block")
        return None
    if keep.mid == "resnet":
        return Kept("mid_block", (0,), (), ())
    if not teacher.mid.depths:
        return Kept("mid_block", (0,), (), ())
    attentions = (0,)
    return Kept("mid_block", (0, 1), attentions, _blocks(teacher.mid, keep.mid_part, attentions, keep.rule, damage))


def _chosen(place: str, which: Sequence[int] | None, there: int) -> tuple[int, ...]:
    """The indices as they are, checked: each once, in order, and there."""
    if which is None:
        return tuple(range(there))
    if list(which) != sorted(set(which)) or not set(which) <= set(range(there)):
        raise refuse(
            place,
            list(which),
            allowed=f"some of {_told(range(there))}, each once and in order" if there else "none",
            hint="indices are the teacher's, counted from 0",
        )
    return tuple(which)


def _widths(teacher: Structure, keep: Keep, levels: int) -> tuple[int, ...]:
    for name, listed in (("widths", keep.widths), ("heads", keep.heads)):
        if listed is not None and len(listed) != levels:
            raise refuse(name, list(listed), allowed=f"{levels} numbers, one a level", hint="the outermost first")
    return keep.widths or teacher.widths[:levels]


def _check_resnets(made: Plan) -> None:
    """An up block takes every output of its level's down block, and one from outside."""
    for level, down in enumerate(made.down):
        up = made.up[len(made.down) - 1 - level]
        if len(up.resnets) != len(down.resnets) + 1:
            raise refuse(
                f"{up.source}.resnets",
                list(up.resnets),
                allowed=f"{len(down.resnets) + 1} of them: one more than the {len(down.resnets)} of {down.source}",
                hint="each resnet of an up block takes one output of the way down; change both blocks of a level",
            )


def _check_mid(made: Plan) -> None:
    """diffusers builds the mid attention as deep as the first one of the innermost down block."""
    if made.mid is None or not made.mid.attentions or not made.down[-1].attentions:
        return
    inner, mid = len(made.down[-1].blocks[0]), len(made.mid.blocks[0])
    if inner != mid:
        raise refuse(
            "mid.depth",
            mid,
            allowed=f"{inner}, as deep as {made.down[-1].source}.attentions.{made.down[-1].attentions[0]}",
            hint="plain diffusers has one number for both; change both, or let mid be resnet or none",
        )


def _check_narrowed(config: Mapping[str, Any], teacher: Structure, made: Plan) -> None:
    """Widths that the student's norms, heads and shortcuts can be built with."""
    groups = with_defaults(config)["norm_num_groups"]
    for level, (width, whole, heads, before) in enumerate(
        zip(made.widths, teacher.widths, made.heads, teacher.heads, strict=False)
    ):
        if heads < 1 or heads > before:
            raise refuse(f"heads of level {level}", heads, allowed=f"1 to {before}", hint="heads are taken out whole")
        step = lcm(groups, heads)
        if width > whole or width < 1 or width % step:
            allowed = ", ".join(str(each) for each in range(step, whole + 1, step)) or "no width"
            raise refuse(
                f"width of level {level}",
                width,
                allowed=f"{allowed}: multiples of {groups} groups and {heads} heads, at most {whole}",
                hint=f"nearest: {max(step, min(whole // step * step, round(width / step) * step))}",
            )
        if width // heads > whole // before:
            raise _wider_heads(level, width, heads, whole // before)
    for level in range(1, len(made.widths)):
        _check_shortcut(level, teacher.widths, made.widths)
    _check_special(with_defaults(config))


def _wider_heads(level: int, width: int, heads: int, dim: int) -> UserError:
    return refuse(
        f"heads of level {level}",
        f"{heads} heads of {width // heads} channels",
        allowed=f"heads of at most {dim} channels, the teacher's",
        hint=f"{-(-width // dim)} heads or more, or a smaller width",
    )


def _check_shortcut(level: int, whole: Sequence[int], widths: Sequence[int]) -> None:
    """A resnet has a shortcut convolution where its width changes, and only there."""
    outer, inner = widths[level - 1], widths[level]
    if (whole[level - 1] == whole[level]) != (outer == inner):
        same = "the same" if whole[level - 1] == whole[level] else "two different ones"
        raise refuse(
            f"widths of levels {level - 1} and {level}",
            f"{outer} and {inner}",
            allowed=f"{same}, as in the teacher ({whole[level - 1]} and {whole[level]})",
            hint=f"diffusers builds down_blocks.{level}.resnets.0 with a shortcut convolution where the width changes, "
            "and without one where it does not; the teacher's must have a place",
        )


def _check_special(config: Mapping[str, Any]) -> None:
    for key, plain in (
        ("resnet_time_scale_shift", "default"),
        ("class_embed_type", None),
        ("num_class_embeds", None),
        ("attention_type", "default"),
        ("cross_attention_norm", None),
        ("time_embedding_type", "positional"),
    ):
        if config[key] != plain:
            hint = "take blocks out instead of channels"
            raise refuse(f"unet.{key}", config[key], allowed=f"{plain} in a network that is narrowed", hint=hint)


def _told(there: range) -> str:
    return f"{there.start} to {there.stop - 1}" if len(there) > 1 else f"{there.start}" if there else "none"
