"""Pipelines of well-known architectures at full size with random weights: enough to time, not to draw."""

from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import CLIPTextConfig

from decant.models.families.family import Name
from decant.models.guard import read_json
from decant.models.layout import INDEX, Component, Pipeline, assemble, check_class
from decant.models.single_file import shipped_layout

TextToImage = Literal["sd15", "sd21", "sdxl"]
_KINDS: dict[TextToImage, Name] = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}


def untrained(name: TextToImage, dtype: torch.dtype = torch.float32) -> Pipeline:
    """Text encoders, UNet and autoencoder of a well-known architecture on the CPU, their weights as before training."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with shipped_layout(_KINDS[name]) as folder:
            parts = check_class(folder / INDEX)[1].components
            return assemble(folder, {part.name: _new(folder / part.name, part, dtype) for part in parts})
    finally:
        torch.set_default_dtype(before)


def _new(where: Path, part: Component, dtype: torch.dtype) -> nn.Module:
    config = read_json(where / "config.json")
    text = part.name.startswith("text_encoder")
    network: nn.Module = part.kind(CLIPTextConfig(**config)) if text else part.kind.from_config(config)
    return nn.Module.to(network, dtype=dtype).eval()
