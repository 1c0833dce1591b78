"""What a UNet2DConditionModel is built of, read from its config: blocks, resnets, attentions, transformer blocks."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from decant.errors import refuse

_DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
_MID = {"UNetMidBlock2DCrossAttn": True, "UNetMidBlock2D": False, None: False}


@dataclass(frozen=True)
class Block:
    """One block by its name, such as ``down_blocks.2``.

    resnets: how many. depths: transformer blocks of each attention; () where the block has no attention.
    """

    name: str
    resnets: int
    depths: tuple[int, ...]


@dataclass(frozen=True)
class Structure:
    """Blocks in the order in which a picture passes them; widths and heads by level, outermost first."""

    down: tuple[Block, ...]
    mid: Block | None
    up: tuple[Block, ...]
    widths: tuple[int, ...]
    heads: tuple[int, ...]

    @property
    def levels(self) -> int:
        """How many resolutions there are."""
        return len(self.widths)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All of them."""
        return (*self.down, *([self.mid] if self.mid else []), *self.up)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """The structure that a config builds; keys that it leaves out take diffusers' defaults.

        Raises:
            UserError: for a network of another class, or with blocks of other kinds than Stable Diffusion's.
        """
        config = with_defaults(config)
        _check_kinds(config)
        levels = len(config["block_out_channels"])
        layers, depths = _per_level(config["layers_per_block"], levels), _depths(config)
        down = tuple(
            _block(f"down_blocks.{i}", layers[i], _DOWN[config["down_block_types"][i]], depths[i])
            for i in range(levels)
        )
        back = config["reverse_transformer_layers_per_block"] or depths[::-1]
        up = tuple(
            _block(f"up_blocks.{i}", layers[-1 - i] + 1, _UP[config["up_block_types"][i]], back[i])
            for i in range(levels)
        )
        heads = config["num_attention_heads"] or config["attention_head_dim"]
        return cls(
            down,
            _mid(config["mid_block_type"], depths[-1]),
            up,
            tuple(config["block_out_channels"]),
            tuple(_per_level(heads, levels)),
        )


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as JSON has it (lists, no private keys), with diffusers' defaults for what it omits."""
    signature = inspect.signature(UNet2DConditionModel.__init__).parameters
    defaults = {name: p.default for name, p in signature.items() if p.default is not inspect.Parameter.empty}
    public = {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}
    return {key: _plain(value) for key, value in (defaults | public).items()}


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _per_level(value: Any, levels: int) -> list[Any]:
    return list(value) if isinstance(value, list) else [value] * levels


def _depths(config: Mapping[str, Any]) -> list[Any]:
    return _per_level(config["transformer_layers_per_block"], len(config["block_out_channels"]))


def _block(name: str, resnets: int, attends: bool, depth: Any) -> Block:
    if not attends:
        return Block(name, resnets, ())
    return Block(name, resnets, tuple(depth) if isinstance(depth, list) else (depth,) * resnets)


def _mid(kind: str | None, depth: Any) -> Block | None:
    match kind:
        case None:
            return None
        case "UNetMidBlock2D":
            return Block("mid_block", 1, ())
        case _:
            return Block("mid_block", 2, (depth[0] if isinstance(depth, list) else depth,))


def _check_kinds(config: Mapping[str, Any]) -> None:
    if config.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise refuse(
            "unet._class_name",
            config["_class_name"],
            allowed="UNet2DConditionModel",
            hint="surgery of other networks is another file of models/surgery",
        )
    for key, known in (("down_block_types", _DOWN), ("up_block_types", _UP)):
        for kind in config[key]:
            if kind not in known:
                raise refuse(f"unet.{key}", kind, allowed=", ".join(known), hint="the blocks of Stable Diffusion")
    if config["mid_block_type"] not in _MID:
        allowed = ", ".join(str(kind) for kind in _MID)
        raise refuse("unet.mid_block_type", config["mid_block_type"], allowed=allowed, hint="see diffusers' UNet")
    if config["dual_cross_attention"]:
        raise refuse("unet.dual_cross_attention", True, allowed="false", hint="Versatile Diffusion is not cut")
