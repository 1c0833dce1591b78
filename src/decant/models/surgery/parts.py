"""What can be taken out of a network, part by part."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from decant.models.surgery.keep import Keep, Part
from decant.models.surgery.structure import Block, Structure

PartKind = Literal["transformer block", "attentions", "layers", "mid attention", "mid block", "level"]


@dataclass(frozen=True)
class Removable:
    """A part. modules: what goes with it. keep: the student without it; None for one transformer block, which plain
    diffusers may not be able to leave out alone, and which is passed by instead.
    """

    name: str
    kind: PartKind
    modules: tuple[str, ...]
    keep: Keep | None


def removable(config: Mapping[str, Any]) -> list[Removable]:
    """Every part of the network that a config builds which a student can go without, in the order of a forward."""
    structure = Structure.of(config)
    parts = [part for block in structure.blocks for part in _inside(block, structure)]
    for level, down in enumerate(structure.down):
        parts += _layers(structure, level, down)
    if structure.mid is not None:
        if structure.mid.depths:
            inside = tuple(f"mid_block.{name}" for name in ("attentions.0", "resnets.1"))
            parts.append(Removable("mid_block.attentions", "mid attention", inside, Keep(mid="resnet")))
        parts.append(Removable("mid_block", "mid block", ("mid_block",), Keep(mid="none")))
    if structure.levels > 1:
        inner = structure.levels - 1
        modules = (f"down_blocks.{inner - 1}.downsamplers.0", f"down_blocks.{inner}", "up_blocks.0")
        parts.append(Removable(f"level {inner}", "level", modules, Keep(levels=inner)))
    return parts


def _inside(block: Block, structure: Structure) -> list[Removable]:
    """Transformer blocks one by one, and all attentions of the block together."""
    parts = [
        Removable(name, "transformer block", (name,), None)
        for attention, depth in enumerate(block.depths)
        for name in (f"{block.name}.attentions.{attention}.transformer_blocks.{i}" for i in range(depth))
    ]
    if block.depths and block is not structure.mid:
        side, _, index = block.name.partition("_blocks.")
        without = {int(index): Part(attentions=())}
        keep = Keep(down=without) if side == "down" else Keep(up=without)
        modules = tuple(f"{block.name}.attentions.{i}" for i in range(len(block.depths)))
        parts.append(Removable(f"{block.name}.attentions", "attentions", modules, keep))
    return parts


def _layers(structure: Structure, level: int, down: Block) -> list[Removable]:
    """A level's layer on the way down with one on the way up: one cannot go without the other."""
    index = structure.levels - 1 - level
    up = structure.up[index]
    parts = []
    for out in range(1, down.resnets):
        for back in range(1, up.resnets - 1):
            keep = Keep(
                down={level: Part(resnets=_without(down.resnets, out))},
                up={index: Part(resnets=_without(up.resnets, back))},
            )
            modules = (*_layer(down, out), *_layer(up, back))
            parts.append(Removable(f"{down.name}.{out} and {up.name}.{back}", "layers", modules, keep))
    return parts


def _without(count: int, index: int) -> tuple[int, ...]:
    return tuple(i for i in range(count) if i != index)


def _layer(block: Block, index: int) -> Sequence[str]:
    names = [f"{block.name}.resnets.{index}"]
    return [*names, f"{block.name}.attentions.{index}"] if block.depths else names


@contextmanager
def passed_by(network: nn.Module, name: str) -> Iterator[None]:
    """The network without one transformer block: what it reads passes by it."""
    parent_name, _, child = name.rpartition(".")
    parent = network.get_submodule(parent_name)
    own = parent.get_submodule(child)
    setattr(parent, child, _Through())
    try:
        yield
    finally:
        setattr(parent, child, own)


class _Through(nn.Module):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states
