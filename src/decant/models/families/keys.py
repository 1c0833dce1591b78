"""Names of Stable Diffusion 1.x, 2.x and SDXL tensors in the one-file layouts that people download.

CompVis' `ldm` and Stability's `sgm`, with the text encoders as `transformers` or as OpenCLIP names them. Every name
follows from the diffusers name and the number of layers in a block, so the table reads and writes.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from decant.models.families.family import Name

Part = Literal["unet", "vae", "text_encoder", "text_encoder_2"]


@dataclass(frozen=True)
class Place:
    """Where one file keeps a tensor: under a name, there as the ``third`` 0, 1 or 2 of its rows, or transposed."""

    name: str
    third: int | None = None
    turned: bool = False


def prefixes(kind: Name) -> dict[Part, str]:
    """How the names of each part's tensors begin in one file."""
    networks: dict[Part, str] = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
    match kind:
        case "sd1":
            return {**networks, "text_encoder": "cond_stage_model.transformer.text_model."}
        case "sd2":
            return {**networks, "text_encoder": "cond_stage_model.model."}
        case "sdxl":
            first, second = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
            return {**networks, "text_encoder": first, "text_encoder_2": second}


_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
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
_CLIP_ENDS = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
}
_CLIP_BLOCK = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_CLIP_JOINED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # the order of the rows of in_proj
_CLIP_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_UNET_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_UNET_MID = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_VAE_BLOCK = re.compile(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)")
_VAE_MID = re.compile(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def naming(kind: Name, part: Part, config: Mapping[str, Any]) -> Callable[[str], Place]:
    """The function from a tensor's diffusers name to its place in one file, for a component of this config."""
    prefix = prefixes(kind)[part]
    match part:
        case "unet":
            return lambda name: Place(prefix + _unet(name, config))
        case "vae":
            return lambda name: Place(prefix + _vae(name, len(config["block_out_channels"])))
        case "text_encoder" | "text_encoder_2" if prefix.endswith(".model."):
            return lambda name: _open_clip(prefix, name.removeprefix("text_model."))
        case _:
            return lambda name: Place(prefix + name.removeprefix("text_model."))


def unread(kind: Name, part: Part, config: Mapping[str, Any]) -> tuple[str, ...]:
    """How the names of tensors begin that one file has and diffusers' network does not.

    SD 2.x reads its text encoder before the last layer, so diffusers' has one layer fewer; it projects nothing.
    """
    prefix = prefixes(kind)[part]
    if not prefix.endswith(".model."):
        return ()
    names = (f"{prefix}logit_scale", f"{prefix}attn_mask")
    last = f"{prefix}transformer.resblocks.{config['num_hidden_layers']}."
    return names if part == "text_encoder_2" else (*names, last, f"{prefix}text_projection")


def ema_name(name: str) -> str:
    """Where a training checkpoint keeps the average of a UNet tensor: its name in one file without any dots."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def is_vae_attention(name: str) -> bool:
    """Whether a VAE tensor is a matrix that the one-file layout stores as a 1 x 1 convolution."""
    return bool(re.search(r"mid_block\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight$", name))


def _open_clip(prefix: str, name: str) -> Place:
    if name == "text_projection.weight":
        return Place(prefix + "text_projection", turned=True)
    layer = _CLIP_LAYER.fullmatch(name)
    if layer is None:
        stem, _, leaf = name.rpartition(".")
        return Place(prefix + (_CLIP_ENDS.get(name) or f"{_CLIP_ENDS[stem]}.{leaf}"))
    number, inside, leaf = layer.groups()
    block = f"{prefix}transformer.resblocks.{number}."
    if inside in _CLIP_JOINED:
        return Place(f"{block}attn.in_proj_{leaf}", third=_CLIP_JOINED.index(inside))
    return Place(f"{block}{_CLIP_BLOCK[inside]}.{leaf}")


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
