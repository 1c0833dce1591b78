"""A finished network of another origin, made to take what a teacher's network takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from decant.errors import UserError, refuse
from decant.models.surgery.presets import Student, published
from decant.models.surgery.structure import with_defaults
from decant.models.surgery.surgery import SurgeryMap, skeleton

# What a student shares with its teacher besides the latents' channels and the width of the text.
_SAME = (
    "out_channels",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
    "class_embed_type",
    "encoder_hid_dim",
)
_SHAPE = ("block_out_channels", "layers_per_block", "down_block_types", "mid_block_type", "up_block_types")


@dataclass(frozen=True)
class Fitted:
    """A network that fits its teacher: config and weights, and what was changed in words."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    changes: list[str]


def fit(config: Mapping[str, Any], weights: Mapping[str, Tensor], teacher: Mapping[str, Any], seed: int) -> Fitted:
    """The network with the teacher's input channels and text width.

    Input channels beyond its own begin at zero, so that it answers as before until it has learned to use them. Keys and
    values of another text width begin anew, as an untrained network's do.

    Raises:
        UserError: it differs from the teacher in what no such change mends.
    """
    config, teacher = dict(with_defaults(config)), with_defaults(teacher)
    for key in _SAME:
        if config[key] != teacher[key]:
            raise refuse(f"model: {key}", config[key], allowed=f"{teacher[key]}, as the teacher's", hint=_hint(teacher))
    new = {**config, "in_channels": teacher["in_channels"], "cross_attention_dim": teacher["cross_attention_dim"]}
    fitted, changes = dict(weights), []
    if config["in_channels"] != teacher["in_channels"]:
        fitted["conv_in.weight"] = _widened(weights["conv_in.weight"], teacher["in_channels"])
        changes.append(f"conv_in: {config['in_channels']} -> {teacher['in_channels']} input channels, new ones zero")
    if config["cross_attention_dim"] != teacher["cross_attention_dim"]:
        renewed = _renewed(new, weights, seed)
        fitted |= renewed
        before, after = config["cross_attention_dim"], teacher["cross_attention_dim"]
        changes.append(f"cross-attention: {len(renewed)} key and value matrices begun anew, {before} -> {after} wide")
    return Fitted(new, fitted, changes or ["nothing changed"])


def published_map(config: Mapping[str, Any], teacher: Mapping[str, Any]) -> tuple[str, SurgeryMap] | None:
    """The published student of the teacher that this network is built as, by its name, and the map that such a cut has.

    None where there is none: then no one knows which of its layers is which of the teacher's.
    """
    own = with_defaults(config)
    for name in get_args(Student):
        try:
            surgery = published(teacher, skeleton(teacher).state_dict(), name)
        except UserError:
            continue
        if all(with_defaults(surgery.config)[key] == own[key] for key in _SHAPE):
            return name, surgery.surgery_map
    return None


def _widened(weight: Tensor, channels: int) -> Tensor:
    wide = weight.new_zeros(weight.shape[0], channels, *weight.shape[2:])
    shared = min(channels, weight.shape[1])
    wide[:, :shared] = weight[:, :shared]
    return wide


def _renewed(config: Mapping[str, Any], weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Key and value matrices whose shapes the new config changes, as a fresh network has them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = UNet2DConditionModel.from_config(dict(config)).state_dict()
    return {name: value for name, value in fresh.items() if ".attn2." in name and value.shape != weights[name].shape}


def _hint(teacher: Mapping[str, Any]) -> str:
    kind = "SDXL" if teacher["addition_embed_type"] else "Stable Diffusion 1.x, 2.x or MuseTalk"
    return f"take a student of the same kind of teacher: this one is of {kind}'s layout"
