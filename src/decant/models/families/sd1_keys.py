"""Names of Stable Diffusion 1.x tensors in the one-file layout (CompVis' `ldm`) that people download.

Every name follows from the diffusers name and the number of layers in a block, so the table reads and writes.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

Part = Literal["unet", "vae", "text_encoder", "text_encoder_2"]

PREFIXES: dict[Part, str] = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.text_model.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}

_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_UNET_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_UNET_MID = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_VAE_BLOCK = re.compile(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)")
_VAE_MID = re.compile(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def naming(part: Part, config: Mapping[str, Any]) -> Callable[[str], str]:
    """The function from a tensor's diffusers name to its name in one file, for a component of this config."""
    prefix = PREFIXES[part]
    match part:
        case "unet":
            return lambda name: prefix + _unet(name, config)
        case "vae":
            return lambda name: prefix + _vae(name, len(config["block_out_channels"]))
        case "text_encoder" | "text_encoder_2":
            return lambda name: prefix + name.removeprefix("text_model.")


def ema_name(name: str) -> str:
    """Where a training checkpoint keeps the average of a UNet tensor: its name in one file without any dots."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def is_vae_attention(name: str) -> bool:
    """Whether a VAE tensor is a matrix that the one-file layout stores as a 1 x 1 convolution."""
    return bool(re.search(r"mid_block\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight$", name))


def _unet(name: str, config: Mapping[str, Any]) -> str:
    stem, _, leaf = name.rpartition(".")
    if stem in _UNET_ENDS:
        return f"{_UNET_ENDS[stem]}.{leaf}"
    if middle := _UNET_MID.fullmatch(name):
        kind, index, rest = middle.groups()
        return f"middle_block.{2 * int(index) + (kind == 'attentions')}.{_inside(kind, rest)}"
    block = _UNET_BLOCK.fullmatch(name)
    if block is None:
        raise KeyError(name)
    side, level, kind, index, rest = block.groups()
    layers = config["layers_per_block"]
    number = int(level) * (layers + 1) + (int(index) if kind in ("resnets", "attentions") else layers)
    where = f"input_blocks.{1 + number}" if side == "down" else f"output_blocks.{number}"
    match kind:
        case "downsamplers":
            return f"{where}.0.{rest.replace('conv.', 'op.')}"
        case "upsamplers":  # stands behind the attention where its block has one
            attends = "Attn" in config["up_block_types"][int(level)]
            return f"{where}.{2 if attends else 1}.{rest}"
        case _:
            return f"{where}.{int(kind == 'attentions')}.{_inside(kind, rest)}"


def _inside(kind: str, rest: str) -> str:
    if kind == "attentions":
        return rest
    layer, _, leaf = rest.rpartition(".")
    return f"{_UNET_RESNET[layer]}.{leaf}"


def _vae(name: str, levels: int) -> str:
    if middle := _VAE_MID.fullmatch(name):
        side, kind, index, rest = middle.groups()
        if kind == "resnets":
            return f"{side}.mid.block_{int(index) + 1}.{_shortcut(rest)}"
        layer, _, leaf = rest.rpartition(".")
        return f"{side}.mid.attn_{int(index) + 1}.{_VAE_ATTENTION[layer]}.{leaf}"
    block = _VAE_BLOCK.fullmatch(name)
    if block is None:
        return name.replace("conv_norm_out", "norm_out")
    side, way, level, kind, index, rest = block.groups()
    number = int(level) if way == "down" else levels - 1 - int(level)
    if kind == "resnets":
        return f"{side}.{way}.{number}.block.{index}.{_shortcut(rest)}"
    return f"{side}.{way}.{number}.{way}sample.{rest}"


def _shortcut(rest: str) -> str:
    return rest.replace("conv_shortcut", "nin_shortcut")
