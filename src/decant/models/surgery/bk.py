"""Block removal of BK-SDM: Base, Small and Tiny from any UNet of the Stable Diffusion 1.x layout.

Kim et al., "BK-SDM: A Lightweight, Fast, and Cheap Version of Stable Diffusion", arXiv 2305.15798.
The paper cuts two layers per block to one; here any number is cut to one: a down block keeps its first pair,
an up block its first and its last (the last resnet alone takes the skip of the level above, so no other fits).
A Base may be cut on to Small and a Small to Tiny, which gives the map and the shapes of the one cut.
"""

import inspect
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from decant.errors import UserError, nearest, refuse
from decant.models.surgery.surgery import Surgery, SurgeryMap, pick, skeleton

Student = Literal["bk-base", "bk-small", "bk-tiny"]

_UP_LAYER = re.compile(r"up_blocks\.(\d+)\.(.+)")
_LAST_PAIR = re.compile(r"(resnets|attentions)\.1\.")
_PER_LEVEL = ("attention_head_dim", "num_attention_heads", "cross_attention_dim", "only_cross_attention")
_LAYOUT = "a UNet2DConditionModel of the Stable Diffusion 1.x layout with at least two layers in every block"


def bk(config: Mapping[str, Any], weights: Mapping[str, Tensor], student: Student) -> Surgery:
    """Cut a BK-SDM student out of a teacher UNet, without touching the teacher.

    Args:
        config: the teacher's diffusers config; keys that it leaves out take diffusers' defaults.
        weights: the teacher's state dict. Tensors on the meta device give a student on the meta device.
        student: `bk-base` keeps the mid block, `bk-small` drops it, `bk-tiny` drops the innermost level too.

    Raises:
        UserError: for a UNet of another layout or one already cut, and for weights of another config.
    """
    if student not in get_args(Student):
        raise refuse(
            "student",
            repr(student),
            allowed=", ".join(get_args(Student)),
            hint=nearest(str(student), get_args(Student)),
        )
    teacher = _with_defaults(config)
    _check_layout(teacher)
    _check_cut(teacher, student)
    student_config = _student_config(teacher, student)
    surgery_map = _surgery_map(teacher, student, _shapes(student_config), weights)
    cut = {
        name: pick(weights[source], surgery_map.kept.get(name, {})) for name, source in surgery_map.parameters.items()
    }
    return Surgery(student_config, cut, surgery_map)


def feature_pairs(config: Mapping[str, Any], student: Student) -> dict[str, str]:
    """The pairs student module -> teacher module whose outputs BK-SDM compares (its equation 3).

    Base and Small: the outputs of all down and up blocks, without the mid block. Tiny's innermost down block
    has lost its downsampler, so there the last attention's `proj_out` stands for the block on the teacher's
    side.
    """
    teacher = _with_defaults(config)
    levels = len(teacher["block_out_channels"])
    if student != "bk-tiny":
        blocks = [f"{side}_blocks.{level}" for side in ("down", "up") for level in range(levels)]
        return {block: block for block in blocks}
    inner = levels - 2
    last = _layers(teacher)[inner] - 1
    pairs = {f"down_blocks.{level}": f"down_blocks.{level}" for level in range(inner)}
    pairs[f"down_blocks.{inner}.attentions.0.proj_out"] = f"down_blocks.{inner}.attentions.{last}.proj_out"
    return pairs | {f"up_blocks.{level}": f"up_blocks.{level + 1}" for level in range(levels - 1)}


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as JSON has it (lists, no private keys), with diffusers' defaults for what it omits."""
    signature = inspect.signature(UNet2DConditionModel.__init__).parameters
    defaults = {name: p.default for name, p in signature.items() if p.default is not inspect.Parameter.empty}
    public = {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}
    return {key: _plain(value) for key, value in (defaults | public).items()}


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _layers(config: Mapping[str, Any]) -> list[int]:
    """Resnets of each down block; the up block of the same level has one more."""
    layers = config["layers_per_block"]
    return list(layers) if isinstance(layers, list) else [layers] * len(config["block_out_channels"])


def _check_layout(config: Mapping[str, Any]) -> None:
    """Refuse what is not of the SD 1.x layout, naming the key of the config that shows it."""
    levels = len(config["block_out_channels"])
    if config.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise _foreign("_class_name", config)
    if levels < 4:
        raise refuse(
            "unet.block_out_channels",
            config["block_out_channels"],
            allowed="four or more levels",
            hint="three levels are what bk-tiny leaves: cut the teacher it came from",
        )
    if config["addition_embed_type"] is not None:
        raise _foreign("addition_embed_type", config)
    if config["down_block_types"] != ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"]:
        raise _foreign("down_block_types", config)
    if config["up_block_types"] != ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1):
        raise _foreign("up_block_types", config)
    if config["mid_block_type"] not in ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None):
        raise _foreign("mid_block_type", config)


def _foreign(key: str, config: Mapping[str, Any]) -> UserError:
    return refuse(
        f"unet.{key}",
        config[key],
        allowed=_LAYOUT,
        hint="BK-SDM cuts Stable Diffusion 1.x, 2.x and MuseTalk; SDXL has its own students",
    )


def _check_cut(config: Mapping[str, Any], student: Student) -> None:
    """Refuse a teacher with nothing left to cut, or whose widths give bk-tiny channels without a source."""
    widths = config["block_out_channels"]
    if min(_layers(config)) < 2 and not _cuts_on(config, student):
        raise refuse(
            "unet.layers_per_block",
            config["layers_per_block"],
            allowed="2 or more in every block, or a bk-base cut on to bk-small or bk-tiny, or a bk-small to bk-tiny",
            hint="this network is already cut: use the teacher it came from",
        )
    if student == "bk-tiny" and widths[-1] < widths[-2]:
        raise refuse(
            "unet.block_out_channels",
            widths,
            allowed="for bk-tiny, a last level at least as wide as the one before",
            hint="use bk-small, which keeps the last level",
        )


def _cuts_on(config: Mapping[str, Any], student: Student) -> bool:
    """Whether a network with one layer in every block has something left that ``student`` goes without."""
    if set(_layers(config)) != {1}:
        return False
    match student:
        case "bk-base":
            return False
        case "bk-small":
            return config["mid_block_type"] is not None
        case "bk-tiny":
            return True


def _student_config(teacher: Mapping[str, Any], student: Student) -> dict[str, Any]:
    """The config of the student: one layer per block, and one level less for bk-tiny."""
    config = dict(teacher)
    config["layers_per_block"] = 1
    config["transformer_layers_per_block"] = _cut_depths(config["transformer_layers_per_block"], keep_last=False)
    config["reverse_transformer_layers_per_block"] = _cut_depths(
        config["reverse_transformer_layers_per_block"], keep_last=True
    )
    if student != "bk-base":
        config["mid_block_type"] = None
    return _without_innermost_level(config) if student == "bk-tiny" else config


def _cut_depths(depths: Any, *, keep_last: bool) -> Any:
    """Transformer depths after the cut: of a nested list, each attention's own, the kept attentions' stay."""
    if not isinstance(depths, list):
        return depths
    return [([d[0], d[-1]] if keep_last else [d[0]]) if isinstance(d, list) else d for d in depths]


def _without_innermost_level(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every per-level list loses the innermost level: the last of a down list, the first of an up list."""
    outer_first = ("block_out_channels", "down_block_types", "transformer_layers_per_block", *_PER_LEVEL)
    inner_first = ("up_block_types", "reverse_transformer_layers_per_block")
    shorter = {key: config[key][:-1] for key in outer_first if isinstance(config[key], list)}
    shorter |= {key: config[key][1:] for key in inner_first if isinstance(config[key], list)}
    return {**config, **shorter}


def _shapes(config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Name and shape of every parameter of the network that a config builds, without memory for any."""
    return {name: tensor.shape for name, tensor in skeleton(config).state_dict().items()}


def _surgery_map(
    teacher: Mapping[str, Any],
    student: Student,
    shapes: Mapping[str, torch.Size],
    weights: Mapping[str, Tensor],
) -> SurgeryMap:
    """Pair every student parameter with the teacher's, and check that it is there and fits."""
    parameters, kept = {}, {}
    for name, shape in shapes.items():
        parameters[name] = source = _source(name, teacher, student)
        if source not in weights:
            raise _not_of_the_config(source, "missing")
        axes = _kept_axes(name, teacher, student, len(shape))
        found = list(weights[source].shape)
        if [len(axes.get(axis, range(size))) for axis, size in enumerate(found)] != list(shape):
            raise _not_of_the_config(source, found)
        if axes:
            kept[name] = axes
    return SurgeryMap(parameters, kept, feature_pairs(teacher, student))


def _not_of_the_config(name: str, found: object) -> UserError:
    return refuse(
        f"unet weights, {name}",
        found,
        allowed="the weights that belong to the config",
        hint="config.json and weights are of two different networks; take both from one folder",
    )


def _source(name: str, teacher: Mapping[str, Any], student: Student) -> str:
    """The teacher's name of a student parameter; only up blocks change theirs."""
    match = _UP_LAYER.fullmatch(name)
    if match is None:
        return name
    block = int(match[1]) + (student == "bk-tiny")
    last = _layers(teacher)[-1 - block]
    return f"up_blocks.{block}." + _LAST_PAIR.sub(rf"\g<1>.{last}.", match[2], count=1)


def _kept_axes(name: str, teacher: Mapping[str, Any], student: Student, ndim: int) -> dict[int, list[int]]:
    """Input channels kept where bk-tiny's first up block reads a narrower block than its teacher's did.

    That resnet reads [block below, skip]. With the innermost level gone, the block below is the level's own,
    so of the teacher's channels for it as many stay as there are, the first ones; all of the skip's stay.
    """
    inner, level = teacher["block_out_channels"][-1], teacher["block_out_channels"][-2]
    reads_below = re.match(r"up_blocks\.0\.resnets\.0\.(norm1|conv1\.weight|conv_shortcut\.weight)", name)
    if student != "bk-tiny" or inner == level or reads_below is None:
        return {}
    return {0 if ndim == 1 else 1: [*range(level), *range(inner, inner + level)]}
