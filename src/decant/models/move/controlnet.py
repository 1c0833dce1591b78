"""A ControlNet of a teacher, for a student that was cut from it.

Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models", arXiv 2302.05543. A ControlNet is a copy
of the UNet's way down, whose every output passes a convolution of one pixel (a zero convolution) and is added to the
UNet's own. Its copy is cut as the UNet was; its zero convolutions go where their outputs are added.
"""

import inspect
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from torch import Tensor

from decant.errors import UserError, refuse
from decant.models.move.lora import lacking
from decant.models.surgery.surgery import SurgeryMap, pick

# Of a ControlNet itself; everything else of its config is the UNet's.
_OWN = (
    "in_channels",
    "conditioning_channels",
    "controlnet_conditioning_channel_order",
    "conditioning_embedding_out_channels",
    "global_pool_conditions",
)
_MIDDLES = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)


@dataclass(frozen=True)
class Left:
    """Parameters of a ControlNet that have no place in a student, by part of the network."""

    part: str
    parameters: int
    why: str


@dataclass(frozen=True)
class MovedControlNet:
    """A ControlNet for a student: the config that builds it, every weight, and what was left of the teacher's."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    dropped: tuple[Left, ...]


def move_controlnet(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    surgery_map: SurgeryMap,
    student: Mapping[str, Any],
) -> MovedControlNet:
    """The ControlNet of a teacher for its student, as plain diffusers has it.

    A student without a mid block gets the least one that diffusers builds, behind a zero convolution of zeros: what
    diffusers adds in the mid block's place is then exactly nothing.

    Args:
        config: of the teacher's ControlNet.
        weights: of it.
        surgery_map: from the student's UNet to the teacher's.
        student: config of the student's UNet.

    Raises:
        UserError: it is of another family, or diffusers' ControlNet cannot be built for this student.
    """
    moved = _config(config, student)
    blank = skeleton(moved)
    own = {name: tuple(tensor.shape) for name, tensor in blank.state_dict().items()}
    sources = {name: _Source.of(name, surgery_map) for name in own if not _is_zero(name)}
    sources |= _zero_convolutions(config, moved, surgery_map)
    if student["mid_block_type"] is None:
        sources = {name: source for name, source in sources.items() if not _is_middle(name)}
    cut = {}
    for name, shape in own.items():
        if name in sources:
            cut[name] = sources[name].cut(name, weights, shape)
        else:
            cut[name] = _nothing(name, shape, weights)
    return MovedControlNet(moved, cut, _dropped(weights, {source.name for source in sources.values()}))


def skeleton(config: Mapping[str, Any]) -> ControlNetModel:
    """The ControlNet that a config builds, on the meta device: names and shapes, and no memory."""
    with torch.device("meta"):
        return ControlNetModel.from_config(dict(config)).eval()


@dataclass(frozen=True)
class _Source:
    """Where a tensor of the student's ControlNet comes from, and what is kept along its axes."""

    name: str
    axes: Mapping[int, list[int]]

    @classmethod
    def of(cls, name: str, surgery_map: SurgeryMap) -> "_Source":
        """The UNet's own source; what only a ControlNet has reads pictures, and ends in conv_in's channels."""
        if name.startswith("controlnet_cond_embedding."):
            rows = surgery_map.kept.get("conv_in.weight", {}).get(0)
            ends = rows is not None and name.startswith("controlnet_cond_embedding.conv_out.")
            return cls(name, {0: rows} if ends and rows is not None else {})
        return cls(surgery_map.parameters.get(name, name), surgery_map.kept.get(name, {}))

    def cut(self, name: str, weights: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """The kept part of the teacher's tensor.

        Raises:
            UserError: there is no such tensor, or it does not give the student's shape.
        """
        found = weights.get(self.name)
        inside = found is not None and all(max(kept) < found.shape[axis] for axis, kept in self.axes.items())
        if found is None or not inside:
            raise _foreign(self.name, found, name, shape)
        cut = pick(found, self.axes)
        if cut.shape != shape:
            raise _foreign(self.name, found, name, shape)
        return cut


def _config(config: Mapping[str, Any], student: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the student's ControlNet.

    Raises:
        UserError: with the key for which diffusers' ControlNet is too simple.
    """
    known = inspect.signature(ControlNetModel.__init__).parameters
    shared = {key: value for key, value in student.items() if key in known and key not in _OWN}
    for key in ("layers_per_block", "cross_attention_dim"):
        shared[key] = _one(key, shared[key])
    if student["mid_block_type"] not in _MIDDLES:
        raise _cannot("mid_block_type", student["mid_block_type"], "UNetMidBlock2DCrossAttn, UNetMidBlock2D or none")
    shared["mid_block_type"] = student["mid_block_type"] or "UNetMidBlock2D"
    own = {key: config[key] for key in _OWN if key in config}
    return {"_class_name": "ControlNetModel", **shared, **own}


def _one(key: str, value: Any) -> Any:
    values = list(value) if isinstance(value, list | tuple) else [value]
    if len(set(values)) != 1:
        raise _cannot(key, value, "one number for all levels")
    return values[0]


def _cannot(key: str, value: object, allowed: str) -> UserError:
    return refuse(
        f"student, unet.{key}",
        value,
        allowed=f"{allowed}: diffusers' ControlNetModel builds no other",
        hint="cut a student that is alike in every level, such as bk-base",
    )


def _is_zero(name: str) -> bool:
    return name.startswith(("controlnet_down_blocks.", "controlnet_mid_block."))


def _is_middle(name: str) -> bool:
    return name.startswith(("mid_block.", "controlnet_mid_block."))


def _zero_convolutions(
    teacher: Mapping[str, Any], student: Mapping[str, Any], surgery_map: SurgeryMap
) -> dict[str, _Source]:
    """Zero convolutions by the layer whose output they read; in and out are the same channels."""
    theirs = _residuals(teacher)
    found: dict[str, _Source] = {}
    for number, module in enumerate(_residuals(student)):
        source = surgery_map.parameters[f"{module}.weight"].removesuffix(".weight")
        kept = surgery_map.kept.get(f"{module}.weight", {}).get(0)
        found |= _zero(f"controlnet_down_blocks.{number}", f"controlnet_down_blocks.{theirs.index(source)}", kept)
    middle = surgery_map.kept.get("mid_block.resnets.0.conv2.weight", {}).get(0)
    return found | _zero("controlnet_mid_block", "controlnet_mid_block", middle)


def _zero(module: str, source: str, kept: list[int] | None) -> dict[str, _Source]:
    rows = {} if kept is None else {0: kept}
    both = {} if kept is None else {0: kept, 1: kept}
    return {f"{module}.weight": _Source(f"{source}.weight", both), f"{module}.bias": _Source(f"{source}.bias", rows)}


def _residuals(config: Mapping[str, Any]) -> list[str]:
    """What the way down gives to the way up, in order: the module whose rows are the channels of each."""
    layers, levels = _one("layers_per_block", config["layers_per_block"]), len(config["block_out_channels"])
    found = ["conv_in"]
    for level in range(levels):
        found += [f"down_blocks.{level}.resnets.{layer}.conv2" for layer in range(layers)]
        found += [f"down_blocks.{level}.downsamplers.0.conv"] if level < levels - 1 else []
    return found


def _nothing(name: str, shape: tuple[int, ...], weights: Mapping[str, Tensor]) -> Tensor:
    """Of a block that gives back what it is given: zeros, and ones for the factors of norms."""
    like = weights["conv_in.weight"]
    norm = ".norm" in name and name.endswith(".weight")
    return torch.full(shape, float(norm), dtype=like.dtype, device=like.device)


def _dropped(weights: Mapping[str, Tensor], used: set[str]) -> tuple[Left, ...]:
    counts: Counter[tuple[str, str]] = Counter()
    for name, tensor in weights.items():
        if name not in used:
            counts[_part(name, used)] += tensor.numel()
    return tuple(Left(part, count, why) for (part, why), count in counts.items())


def _part(name: str, used: set[str]) -> tuple[str, str]:
    module = name.rpartition(".")[0]
    if _is_zero(name):
        return module, "the student has no such residual"
    return lacking(module, used)


def _foreign(source: str, found: Tensor | None, name: str, shape: tuple[int, ...]) -> UserError:
    told = "missing" if found is None else f"of {' x '.join(map(str, found.shape))}"
    return refuse(
        f"ControlNet, {source}",
        told,
        allowed=f"what gives {' x '.join(map(str, shape))}, as {name} of the student has it",
        hint="it is a ControlNet of another family; move one that was made for this student's teacher",
    )
