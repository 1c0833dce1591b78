"""A LoRA's file: opened, and put on a model for good."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from decant.errors import UserError, refuse
from decant.models.guard import Header, read_header
from decant.models.layout import Pipeline, networks
from decant.models.move.lora import Layer, as_wide_as, told_shape, whose
from decant.models.move.lora_keys import read_lora

FILE = "pytorch_lora_weights.safetensors"


def lora_header(file: Path) -> Header:
    """Of a LoRA's file, or of the one that diffusers puts into a folder.

    Raises:
        UserError: it is missing, damaged, or a pickle.
    """
    inside = file / FILE if file.is_dir() else file
    if inside.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise refuse(
            "--lora",
            f"{inside} is a pickle, which can run code when opened",
            allowed="a .safetensors file",
            hint="take the LoRA as safetensors",
        )
    return read_header(inside)


def merge_lora(pipeline: Pipeline, file: Path) -> None:
    """Add a LoRA into the weights of a pipeline on the CPU, in place and in their own dtype.

    Args:
        pipeline: its UNet and text encoders are changed, or nothing is.
        file: in any of the known formats of keys.

    Raises:
        UserError: the file is no LoRA, or a layer of it has no place or another shape; nothing is changed then.
    """
    found = networks(pipeline)
    lora = read_lora(load_file(lora_header(file).file), _layers_per_block(pipeline.unet.config))
    sums = [
        (weight, as_wide_as(layer, tuple(weight.shape)))
        for part, layers in lora.items()
        for weight, layer in _placed(part, layers, found.get(part), file)
    ]
    with torch.no_grad():
        for weight, layer in sums:
            weight.copy_(weight.float() + layer.delta())


def _placed(part: str, layers: Mapping[str, Layer], network: nn.Module | None, file: Path) -> list[tuple[Any, Layer]]:
    """Each layer beside the weight that it changes."""
    modules = dict(network.named_modules()) if network is not None else {}
    pairs = []
    for name, layer in layers.items():
        # The `text_model.` in front is there in some versions of transformers and not in others.
        module: Any = modules.get(name) or modules.get(name.removeprefix("text_model."))
        if module is None or not hasattr(module, "weight"):
            raise _homeless(part, name, file)
        shape = tuple(module.weight.shape)
        if as_wide_as(layer, shape).shape != shape:
            raise refuse(
                f"LoRA {file}, {part}.{name}.weight",
                f"made for a weight of {told_shape(layer.shape)}",
                allowed=f"{told_shape(shape)}, as the model has it",
                hint=whose(name, layer.shape, shape),
            )
        pairs.append((module.weight, layer))
    return pairs


def _homeless(part: str, name: str, file: Path) -> UserError:
    return refuse(
        f"LoRA {file}, {part}.{name}",
        "the model has no such module",
        allowed="modules of the model that the LoRA is put on",
        hint="a teacher's LoRA becomes a student's by: decant move --lora F --to STUDENT --out F2",
    )


def _layers_per_block(config: Mapping[str, Any]) -> int:
    """By which files of the one-file layout count their blocks."""
    layers = config["layers_per_block"]
    return max(layers) if isinstance(layers, list | tuple) else layers
