"""Pipelines of well-known architectures at full size with random weights: enough to time, not to draw."""

from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from decant.models.guard import read_json
from decant.models.layout import Pipeline, assemble
from decant.models.load import architecture
from decant.models.single_file import shipped_layout

TextToImage = Literal["sd15", "sd21"]
# OpenCLIP ViT-H/14's text model without its last layer, where it differs from CLIP ViT-L/14's.
_SD21_TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}


def untrained(name: TextToImage, dtype: torch.dtype = torch.float32) -> Pipeline:
    """Text encoder, UNet and autoencoder of ``sd15`` or ``sd21`` on the CPU, their weights as before training."""
    layout = shipped_layout()
    text: dict[str, Any] = read_json(layout / "text_encoder" / "config.json")
    text |= _SD21_TEXT if name == "sd21" else {}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        parts: dict[str, nn.Module] = {
            "unet": UNet2DConditionModel.from_config(architecture(name)),
            "vae": AutoencoderKL.from_config(read_json(layout / "vae" / "config.json")),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**text)),
        }
    finally:
        torch.set_default_dtype(before)
    return assemble(layout, {part: nn.Module.to(net, dtype=dtype).eval() for part, net in parts.items()})
