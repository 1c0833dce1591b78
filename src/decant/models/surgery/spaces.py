"""Which channels every axis of every parameter runs over.

A space is a set of channels that must be cut alike: those of a level's residual stream, those inside one resnet, one
attention's tokens, the queries and keys of its heads, and so on. An axis is one space, several joined (a resnet of
an up block reads the block below and a skip), or none where nothing is ever cut (pictures, text).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from decant.models.surgery.structure import Structure, with_defaults

Kind = Literal["level", "inner", "tokens", "qk", "v", "ff", "time", "sinus"]
Axes = tuple[tuple["Space", ...], ...]

_RESNET = re.compile(r"((?:(down|up)_blocks\.(\d+)|mid_block)\.resnets\.(\d+))\.(.+)")
_ATTENTION = re.compile(r"((?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+))\.(.+)")
_SAMPLER = re.compile(r"(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0\.conv\.(weight|bias)")
_BLOCK = re.compile(r"(transformer_blocks\.\d+)\.(.+)")


@dataclass(frozen=True)
class Space:
    """Channels that are cut alike. name: of what they lie in, by the teacher's names; level: whose width it has."""

    kind: Kind
    name: str
    level: int


@dataclass(frozen=True)
class Spaces:
    """The spaces of a network's parameters. Resnets of equal width in a row share their stream."""

    structure: Structure
    time: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """The spaces of the network that a config builds."""
        structure = Structure.of(config)
        return cls(structure, with_defaults(config)["time_embedding_dim"] or 4 * structure.widths[0])

    def axes(self, parameter: str, source: str | None = None) -> Axes | None:
        """The spaces of every axis of a parameter; None for a parameter that surgery does not know.

        ``source``: the teacher's name of it, which names the spaces inside resnets and attentions.
        """
        source = source or parameter
        if match := _RESNET.fullmatch(parameter):
            inside = Space("inner", _place(_RESNET, source), self._level(match))
            return self._resnet(match, inside)
        if match := _ATTENTION.fullmatch(parameter):
            return self._attention(match, source)
        if match := _SAMPLER.fullmatch(parameter):
            stream = self._stream(self._level(match))
            return _pair(match[3], (stream,), (stream,))
        return self._outside(parameter)

    def size(self, space: Space) -> int:
        """How many channels a space has in this network."""
        if space.kind == "time":
            return self.time
        return self.structure.widths[space.level] * (4 if space.kind == "ff" else 1)

    def _level(self, match: re.Match[str]) -> int:
        last = self.structure.levels - 1
        if match[0].startswith("mid_block"):
            return last
        side, index = match[0].split("_", 1)[0], int(match[0].split(".")[1])
        return index if side == "down" else last - index

    def _stream(self, level: int) -> Space:
        """The residual stream of a level: one with that of the level outside where no shortcut lies between."""
        widths = self.structure.widths
        while level and widths[level - 1] == widths[level]:
            level -= 1
        return Space("level", "", level)

    def _reads(self, match: re.Match[str]) -> tuple[Space, ...]:
        """What a resnet reads: a way down one stream, a way up what lies below and a skip."""
        level, number = self._level(match), int(match[4])
        if match[2] != "up":
            return (self._stream(max(level - 1, 0) if match[2] == "down" and number == 0 else level),)
        last = self.structure.levels - 1
        below = min(level + 1, last) if number == 0 else level
        is_last = number == self.structure.up[last - level].resnets - 1
        return (self._stream(below), self._stream(max(level - 1, 0) if is_last else level))

    def _resnet(self, match: re.Match[str], inside: Space) -> Axes | None:  # noqa: PLR0911 (a return for every layer)
        level, reads = self._stream(self._level(match)), self._reads(match)
        time = Space("time", "", 0)
        part, _, kind = match[5].rpartition(".")
        match part:
            case "norm1":
                return (reads,)
            case "conv1":
                return _pair(kind, (inside,), reads)
            case "time_emb_proj":
                return _pair(kind, (inside,), (time,))
            case "norm2":
                return ((inside,),)
            case "conv2":
                return _pair(kind, (level,), (inside,))
            case "conv_shortcut":
                return _pair(kind, (level,), reads)
        return None

    def _attention(self, match: re.Match[str], source: str) -> Axes | None:
        at = self._level(match)
        stream, tokens = self._stream(at), Space("tokens", _place(_ATTENTION, source), at)
        part, _, kind = match[5].rpartition(".")
        match part:
            case "norm":
                return ((stream,),)
            case "proj_in":
                return _pair(kind, (tokens,), (stream,))
            case "proj_out":
                return _pair(kind, (stream,), (tokens,))
        if (inside := _BLOCK.fullmatch(match[5])) and (whole := _BLOCK.fullmatch(_rest(_ATTENTION, source))):
            return _transformer_block(inside[2], f"{tokens.name}.{whole[1]}", tokens)
        return None

    def _outside(self, parameter: str) -> Axes | None:  # noqa: PLR0911 (a return for every layer)
        """What lies outside all blocks."""
        stream, time, none = self._stream(0), Space("time", "", 0), ()
        part, _, kind = parameter.rpartition(".")
        match part:
            case "conv_in":
                return _pair(kind, (stream,), none)
            case "conv_norm_out":
                return ((stream,),)
            case "conv_out":
                return _pair(kind, none, (stream,))
            case "time_embedding.linear_1":
                return _pair(kind, (time,), (Space("sinus", "", 0),))
            case "time_embedding.cond_proj":
                return _pair(kind, (Space("sinus", "", 0),), none)
            case "time_embedding.linear_2" | "add_embedding.linear_2":
                return _pair(kind, (time,), (time,))
            case "add_embedding.linear_1":
                return _pair(kind, (time,), none)
        return (none, none) if part.startswith("encoder_hid_proj") else None


def _transformer_block(inside: str, name: str, tokens: Space) -> Axes | None:
    part, _, kind = inside.rpartition(".")
    pieces = part.split(".")
    match pieces:
        case ["norm1" | "norm2" | "norm3"]:
            return ((tokens,),)
        case ["attn1" | "attn2" as attention, "to_q" | "to_k" | "to_v" as to]:
            space = Space("v" if to == "to_v" else "qk", f"{name}.{attention}", tokens.level)
            reads = () if attention == "attn2" and to != "to_q" else (tokens,)
            return _pair(kind, (space,), reads)
        case ["attn1" | "attn2" as attention, "to_out", "0"]:
            return _pair(kind, (tokens,), (Space("v", f"{name}.{attention}", tokens.level),))
        case ["ff", "net", "0", "proj"]:
            # GEGLU: the values, then their gates.
            space = Space("ff", name, tokens.level)
            return _pair(kind, (space, space), (tokens,))
        case ["ff", "net", "2"]:
            return _pair(kind, (tokens,), (Space("ff", name, tokens.level),))
    return None


def _pair(kind: str, out: tuple[Space, ...], reads: tuple[Space, ...]) -> Axes:
    return (out,) if kind == "bias" else (out, reads)


def _place(pattern: re.Pattern[str], source: str) -> str:
    match = pattern.fullmatch(source)
    assert match is not None, source
    return match[1]


def _rest(pattern: re.Pattern[str], source: str) -> str:
    match = pattern.fullmatch(source)
    assert match is not None, source
    return match[5]
