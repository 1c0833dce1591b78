"""The one loader: a pipeline folder, a hub id or `scenes` becomes a Stable Diffusion pipeline, or one clear
refusal.

Everything that a user can get wrong is looked at before any weight is read. Weights are safetensors; a pickle
is opened only when asked for by name, and then only as weights.
"""

import copy
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CLIPTextModel
from transformers.utils import logging as transformers_logging

from decant.errors import UserError, nearest, refuse

Architecture = Literal["sd15", "sd21", "musetalk"]

_INDEX = "model_index.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_STRANGERS = "config.json and weights are of two different networks; take both from one folder"
_LAYOUT = "a StableDiffusionPipeline folder: model_index.json, unet, vae, text_encoder, tokenizer, scheduler"


@dataclass(frozen=True)
class _Component:
    """A component that has weights: its folder, its class, and the stem of its weight files."""

    name: str
    kind: Any
    stem: str


_COMPONENTS = (
    _Component("unet", UNet2DConditionModel, "diffusion_pytorch_model"),
    _Component("vae", AutoencoderKL, "diffusion_pytorch_model"),
    _Component("text_encoder", CLIPTextModel, "model"),
)


def load(
    source: str | Path, *, dtype: torch.dtype = torch.float32, allow_pickle: bool = False
) -> StableDiffusionPipeline:
    """Open a Stable Diffusion 1.x or 2.x pipeline, on the CPU and without a safety checker.

    Args:
        source: a pipeline folder (nothing is fetched then), a hub id `owner/name`, or `scenes`, the shipped
        teacher. dtype: of all weights.
        allow_pickle: also read `.bin` weights, as weights alone; nothing in them is executed.

    Raises:
        UserError: when the source is missing, is of another kind, or its weights are pickled, truncated, not
            of its config, or do not fit each other.
    """
    folder = folder_of(source, allow_pickle=allow_pickle)
    _check_index(folder)
    _check_fit(folder)
    models = {part.name: _load_component(folder, part, dtype, allow_pickle) for part in _COMPONENTS}
    with _quiet(), _as_refusal(folder, "a tokenizer and a scheduler", "copy the whole pipeline again"):
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder, **models, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    _check_vocabulary(pipeline, folder)
    return pipeline


def save(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write a pipeline folder of safetensors that plain diffusers opens. The pipeline stays as it is.

    Safetensors takes only contiguous tensors, so a component in another memory format is saved from a copy.
    """
    components = {name: _contiguous(part) for name, part in pipeline.components.items()}
    whole = StableDiffusionPipeline(**components, requires_safety_checker=False)
    with _quiet():
        whole.save_pretrained(folder, safe_serialization=True)
    _forget_places(folder)


def with_unet(pipeline: StableDiffusionPipeline, unet: nn.Module) -> StableDiffusionPipeline:
    """The same pipeline around another UNet; all other components are shared, not copied."""
    return StableDiffusionPipeline(**{**pipeline.components, "unet": unet}, requires_safety_checker=False)


def fingerprint(folder: Path) -> str:
    """SHA-256 of a pipeline folder, as hexadecimal: every file's relative name and content, in order of name.

    The record and the card (`decant.json`, `README.md`) are left out, since they speak about the model.

    Raises:
        UserError: when the folder is not there.
    """
    if not folder.is_dir():
        raise _missing_folder(folder)
    digest = hashlib.sha256()
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in names:
        if name not in ("decant.json", "README.md"):
            digest.update(f"{name}\0{(folder / name).stat().st_size}\0".encode())
            digest.update(_file_digest(folder / name))
    return digest.hexdigest()


def architecture(name: str) -> dict[str, Any]:
    """The UNet config of a well-known architecture at full size: enough for counts, plans and speed.

    `sd15` is Stable Diffusion 1.4 and 1.5, `sd21` is 2.0 and 2.1 base, `musetalk` is MuseTalk 1.0 and 1.5.

    Raises:
        UserError: for an unknown name.
    """
    match name:
        case "sd15":
            special: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
        case "sd21":
            special = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "sample_size": 64}
            special["use_linear_projection"] = True
        case "musetalk":
            special = {
                "cross_attention_dim": 384,
                "attention_head_dim": 8,
                "sample_size": 32,
                "in_channels": 8,
            }
        case _:
            known = get_args(Architecture)
            raise refuse("architecture", repr(name), allowed=", ".join(known), hint=nearest(name, known))
    return _sd_layout() | special


def unet_config(source: str | Path) -> dict[str, Any]:
    """The UNet config of a source of `load`, or of a known architecture; no weights are read.

    Raises:
        UserError: when the source is missing or of another kind.
    """
    if isinstance(source, str) and source in get_args(Architecture):
        return architecture(source)
    folder = folder_of(source)
    _check_class(folder / _INDEX)
    return _read_json(folder / "unet" / "config.json")


def _sd_layout() -> dict[str, Any]:
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "use_linear_projection": False,
    }
