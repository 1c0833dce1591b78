"""The names under which tools keep a LoRA's tensors: peft, diffusers old and older, kohya with diffusers' names or with
those of the one-file layout (`ldm`), ComfyUI. All are read; peft and kohya are written.

Names differ between tools in their dots and underscores alone, so every name is first flattened to underscores and then
parsed by one grammar of a UNet's and a CLIP text encoder's modules.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Literal, TypeVar

import torch
from torch import Tensor

from decant.errors import UserError, refuse
from decant.models.move.lora import Layer, Lora, Part

Kind = Literal["down", "up", "mid", "alpha"]
_Number = TypeVar("_Number", int, float)

_KINDS: dict[Kind, re.Pattern[str]] = {
    "down": re.compile(r"(.+?)(?:\.lora_A(?:\.\w+)?|[._]lora\.down|\.lora_down|\.lora_linear_layer\.down)\.weight"),
    "up": re.compile(r"(.+?)(?:\.lora_B(?:\.\w+)?|[._]lora\.up|\.lora_up|\.lora_linear_layer\.up)\.weight"),
    "mid": re.compile(r"(.+?)\.lora_mid\.weight"),
    "alpha": re.compile(r"(.+?)(?:[._]lora)?\.alpha"),
}
# Adapters that are no plain LoRA, by what their keys hold.
_OTHERS = {
    r"dora_scale|lora_magnitude_vector": "DoRA, which depends on norms of the teacher that a student does not have",
    r"hada_w": "LoHa (LyCORIS), which diffusers does not open",
    r"lokr_": "LoKr (LyCORIS), whose factors do not follow rows and columns",
    r"oft_|boft_": "OFT, which turns the teacher's weights",
    r"on_input|ia3_": "IA3, which is no sum of weights",
    r"\.diff(_b)?$|set_weight|w_norm|b_norm": "differences of whole weights beside the LoRA",
    r"lora_embedding_|emb_params|bundle_emb": "embeddings of new words beside the LoRA",
    r"lora_(B|up)\.(\w+\.)?bias": "biases beside the LoRA",
}
_PREFIXES: dict[Part, re.Pattern[str]] = {
    "text_encoder_2": re.compile(r"text_encoder_2\.|lora_te2_|text_encoders\.clip_g\.(?:transformer\.)?"),
    "text_encoder": re.compile(r"text_encoder\.|lora_te1?_|text_encoders\.clip_l\.(?:transformer\.)?"),
    "unet": re.compile(
        r"unet\.|lora_unet_|base_model\.model\.(?:unet\.)?|(?:model\.)?diffusion_model\."
        r"|(?=(?:down|up|input|output)_blocks\.|mid(?:dle)?_block\.|conv_(?:in|out)\.|(?:time|add)_embedding\.)"
    ),
}
_ENDS = {
    "conv_in": "conv_in",
    "conv_out": "conv_out",
    "time_embedding_linear_1": "time_embedding.linear_1",
    "time_embedding_linear_2": "time_embedding.linear_2",
    "add_embedding_linear_1": "add_embedding.linear_1",
    "add_embedding_linear_2": "add_embedding.linear_2",
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}
_RESNET = {
    "conv1": "conv1",
    "conv2": "conv2",
    "time_emb_proj": "time_emb_proj",
    "conv_shortcut": "conv_shortcut",
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_LDM_MIDDLE = {0: "resnets.0", 1: "attentions.0", 2: "resnets.1"}
_BLOCK = re.compile(r"(down|up)_blocks_(\d+)_(attentions|resnets|downsamplers|upsamplers)_(\d+)_(.+)")
_MID = re.compile(r"mid_block_(attentions|resnets)_(\d+)_(.+)")
_LDM_BLOCK = re.compile(r"(input|output)_blocks_(\d+)_(\d)_(.+)")
_LDM_MID = re.compile(r"middle_block_([012])_(.+)")
_TRANSFORMER = re.compile(r"transformer_blocks_(\d+)_(?:(attn[12])_(to_[qkv]|to_out)(?:_0)?|ff_net_(0_proj|2))")
_TEXT = re.compile(r"(?:text_model_)?encoder_layers_(\d+)_(?:self_attn_(?:to_)?(q|k|v|out)(?:_proj)?|mlp_(fc[12]))")
_CARRIED = re.compile(r"(ss_|modelspec\.)(?!.*hash)")


def read_lora(tensors: Mapping[str, Tensor], layers: int = 2) -> Lora:
    """A LoRA from a file's tensors, in whatever of the known names they stand.

    Args:
        tensors: as the file holds them.
        layers: of every block of the teacher's UNet, by which the one-file layout counts its blocks.

    Raises:
        UserError: it is no LoRA, another kind of adapter, half of one, or of an unknown family.
    """
    found: dict[str, dict[Kind, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        name, kind = _kind(key)
        found[name][kind] = tensor
    parts: dict[Part, dict[str, Layer]] = defaultdict(dict)
    # Where a file has a module under both names, as some converters leave it, diffusers takes its own: so last wins.
    for name in sorted(found, key=lambda name: not re.search(r"(input|output)_blocks|middle_block", name)):
        part, module = _place(name, layers)
        parts[part][module] = _layer(name, found[name])
    if not parts:
        raise refuse("LoRA", "it holds no tensors", allowed="a LoRA", hint="copy the file again from where it came")
    return dict(parts)


def to_peft(lora: Lora) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata as diffusers writes them, for `load_lora_weights` of every version.

    The format has no place for alpha but its metadata, which most readers pass over: the scale is multiplied into
    ``lora_B``, and the metadata says alpha = rank.
    """
    tensors: dict[str, Tensor] = {}
    said: dict[str, object] = {}
    for part, layers in lora.items():
        for module, layer in layers.items():
            tensors[f"{part}.{module}.lora_A.weight"] = layer.down.contiguous()
            tensors[f"{part}.{module}.lora_B.weight"] = _scaled(layer.up, layer.scale)
        if layers:
            said |= {f"{part}.{key}": value for key, value in _adapter(layers).items()}
    return tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(said, indent=2, sort_keys=True)}


def to_kohya(lora: Lora, metadata: Mapping[str, str], encoders: int = 1) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata as kohya's trainer writes them with diffusers' names.

    One alpha for all modules of a part: diffusers passes over those that differ from the most frequent one. Where they
    differ, the difference is multiplied into ``lora_up``.

    Args:
        lora: module names as in diffusers.
        metadata: of the file that it came from; kohya's own keys go along, hashes left out.
        encoders: text encoders of the pipeline: one is `lora_te_`, two are `lora_te1_` and `lora_te2_`.
    """
    first = "lora_te_" if encoders == 1 else "lora_te1_"
    prefixes = {"unet": "lora_unet_", "text_encoder": first, "text_encoder_2": "lora_te2_"}
    tensors = {}
    for part, layers in lora.items():
        alpha = _most_frequent(layer.alpha for layer in layers.values()) if layers else 1.0
        for module, layer in layers.items():
            name = prefixes[part] + module.replace(".", "_")
            tensors[f"{name}.lora_down.weight"] = layer.down.contiguous()
            tensors[f"{name}.lora_up.weight"] = _scaled(layer.up, layer.alpha / alpha)
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    carried = {key: value for key, value in metadata.items() if _CARRIED.match(key)}
    unet = lora.get("unet", {})
    if unet:
        rank = _most_frequent(layer.rank for layer in unet.values())
        alpha = _most_frequent(layer.alpha for layer in unet.values())
        carried |= {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(alpha)}
    return tensors, {"format": "pt", **carried}


def module_of(name: str, layers: int = 2) -> str | None:
    """A UNet module's name in diffusers from its name in any tool, None where a UNet has no such module.

    ``lora_unet_`` and the like are already taken off: ``input_blocks_4_1_proj_in`` and
    ``down_blocks.1.attentions.0.proj_in`` are both the latter.
    """
    flat = name.replace(".", "_").replace("_processor_", "_")
    if flat in _ENDS:
        return _ENDS[flat]
    if block := _BLOCK.fullmatch(flat):
        side, level, kind, index, rest = block.groups()
        return _join(f"{side}_blocks.{level}", f"{kind}.{index}", rest)
    if middle := _MID.fullmatch(flat):
        kind, index, rest = middle.groups()
        return _join("mid_block", f"{kind}.{index}", rest)
    if middle := _LDM_MID.fullmatch(flat):
        return _join("mid_block", _LDM_MIDDLE[int(middle[1])], middle[2])
    if block := _LDM_BLOCK.fullmatch(flat):
        return _from_ldm(block[1], int(block[2]), int(block[3]), block[4], layers)
    return None


def _from_ldm(side: str, number: int, place: int, rest: str, layers: int) -> str | None:
    """Blocks of the one-file layout are counted through: on the way down the samplers count as blocks of their own."""
    level, index = divmod(number - (side == "input"), layers + 1)
    way = "down" if side == "input" else "up"
    if rest in ("op", "conv"):
        return f"{way}_blocks.{level}.{way}samplers.0.conv"
    return _join(f"{way}_blocks.{level}", f"{('resnets', 'attentions')[min(place, 1)]}.{index}", rest)


def _join(block: str, layer: str, rest: str) -> str | None:
    inside = _inside(layer.split(".", maxsplit=1)[0], rest)
    return inside and f"{block}.{layer}.{inside}"


def _inside(kind: str, rest: str) -> str | None:
    if kind == "resnets":
        return _RESNET.get(rest)
    if kind != "attentions":
        return "conv" if rest == "conv" else None
    if rest in ("proj_in", "proj_out"):
        return rest
    found = _TRANSFORMER.fullmatch(rest)
    if found is None:
        return None
    number, attention, way, feed = found.groups()
    if attention:
        return f"transformer_blocks.{number}.{attention}.{'to_out.0' if way == 'to_out' else way}"
    return f"transformer_blocks.{number}.ff.net.{feed.replace('_', '.')}"


def _text_module(name: str) -> str | None:
    """A CLIP text encoder's module, with the `text_model.` that every reader knows."""
    flat = name.replace(".", "_")
    if flat == "text_projection":
        return flat
    found = _TEXT.fullmatch(flat)
    if found is None:
        return None
    number, way, feed = found.groups()
    return f"text_model.encoder.layers.{number}." + (f"mlp.{feed}" if feed else f"self_attn.{way}_proj")


def _kind(key: str) -> tuple[str, Kind]:
    for pattern, what in _OTHERS.items():
        if re.search(pattern, key):
            raise refuse(
                f"LoRA, {key[:120]}",
                f"it holds {what}",
                allowed="plain LoRA: lora_down and lora_up (lora_A and lora_B), alpha, and lora_mid of convolutions",
                hint="merge it into the teacher and extract a plain LoRA from the difference, then move that",
            )
    for kind, name in _KINDS.items():
        if found := name.fullmatch(key):
            return found[1], kind
    raise refuse(
        f"LoRA, {key[:120]}",
        "this is no key of a LoRA",
        allowed="keys of peft, diffusers or kohya, such as lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
        hint="is this a whole model, or an embedding?",
    )


def _place(name: str, layers: int) -> tuple[Part, str]:
    for part, pattern in _PREFIXES.items():
        if prefix := pattern.match(name):
            rest = name[prefix.end() :]
            module = module_of(rest, layers) if part == "unet" else _text_module(rest)
            if module is not None:
                return part, module
    raise refuse(
        f"LoRA, {name[:120]}",
        "neither a UNet nor a CLIP text encoder has such a module",
        allowed="a LoRA of Stable Diffusion 1.x, 2.x or SDXL",
        hint="it is of another family, such as Flux or SD3",
    )


def _layer(name: str, found: Mapping[Kind, Tensor]) -> Layer:
    if "down" not in found or "up" not in found:
        raise _broken(name, f"has {' and '.join(sorted(found))} alone", "both lora_down and lora_up (lora_A, lora_B)")
    down, up = found["down"], found["up"]
    if "mid" in found:
        down = _without_mid(name, down, found["mid"])
    if down.ndim not in (2, 4) or up.ndim not in (2, 4) or up.flatten(1).shape[1] != down.shape[0] or not down.shape[0]:
        raise _broken(name, f"down {tuple(down.shape)}, up {tuple(up.shape)}", "(r, in) and (out, r), or convolutions")
    up = up.reshape(up.shape[0], -1, *(1,) * (down.ndim - 2))
    alpha = found.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise _broken(name, f"alpha of {alpha.numel()} numbers", "one number")
    # Without an alpha, and with kohya's 0, the scale is 1.
    scale = float(alpha) if alpha is not None else 0.0
    layer = Layer(down, up, scale or float(down.shape[0]))
    if not all(bool(tensor.isfinite().all()) for tensor in (down, up, torch.tensor(layer.alpha))):
        raise _broken(name, "holds numbers that are not finite", "finite numbers")
    return layer


def _without_mid(name: str, down: Tensor, mid: Tensor) -> Tensor:
    """LoCon's three factors as two: down (r, in, 1, 1) and mid (r, r, kh, kw) are one convolution (r, in, kh, kw)."""
    if mid.ndim != 4 or mid.shape[1] != down.shape[0] or down.flatten(1).shape[1] != down.shape[1]:
        raise _broken(name, f"down {tuple(down.shape)}, mid {tuple(mid.shape)}", "(r, in, 1, 1) and (r, r, kh, kw)")
    return torch.einsum("ab...,bi->ai...", mid.float(), down.float().flatten(1))


def _broken(name: str, found: str, allowed: str) -> UserError:
    return refuse(f"LoRA, {name[:120]}", found, allowed=allowed, hint="the file is damaged; copy it again")


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    """Scaled in its own dtype where that is exact, else in single precision."""
    if scale == 1:
        return tensor.contiguous()
    product = tensor.float() * scale
    stored = product.to(tensor.dtype)
    return stored if torch.equal(stored.float(), product) else product


def _adapter(layers: Mapping[str, Layer]) -> dict[str, object]:
    """What `peft.LoraConfig` needs to know; a pattern for every rank but the most frequent.

    peft takes names by their ends. So they are given without `text_model.`, which the text encoders of some versions of
    transformers have and those of others do not.
    """
    rank = _most_frequent(layer.rank for layer in layers.values())
    ranks = {module.removeprefix("text_model."): layer.rank for module, layer in layers.items()}
    others = {module: own for module, own in ranks.items() if own != rank}
    pattern = {"rank_pattern": others, "alpha_pattern": others}
    return {"r": rank, "lora_alpha": rank, "target_modules": sorted(ranks), "bias": "none", **pattern}


def _most_frequent(values: Iterable[_Number]) -> _Number:
    return Counter(values).most_common(1)[0][0]
