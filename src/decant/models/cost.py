"""What a network costs before it is run: parameters, multiply-accumulates, megabytes on disk."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from decant.errors import refuse
from decant.models.families.unet import blank, forward
from decant.models.surgery.surgery import frozen, skeleton


def parameters(module: nn.Module) -> int:
    """Number of parameters; one that two layers share counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


def macs(unet: UNet2DConditionModel, latent: tuple[int, int, int], tokens: int) -> int:
    """Multiply-accumulates of one forward at batch 1, the attention products included.

    Counted on a twin without weights, built from the network's config, so a full-size one costs a second and
    no memory. Tools that leave the attention products out give less (339 instead of 402 G for SD 1.5).

    Args:
        unet: the network, on any device, the meta device too.
        latent: (C, h, w) of the latent that goes in.
        tokens: length of the condition, as the family says: 77 for SD 1.x and 2.x, 50 for MuseTalk.

    Raises:
        UserError: when C is not the network's number of input channels.
    """
    config = dict(unet.config)
    if latent[0] != config["in_channels"]:
        raise refuse(
            "latent",
            latent,
            allowed=f"({config['in_channels']}, height, width)",
            hint="the first number is the network's in_channels; height and width are pixels divided by 8",
        )
    return _macs(frozen(config), latent, tokens)


@lru_cache(maxsize=64)
def _macs(config: str, latent: tuple[int, int, int], tokens: int) -> int:
    """Remembered: every stage of a run counts the networks it has to do with."""
    x_t = torch.empty(1, *latent, device="meta")
    return _counted(json.loads(config), x_t, tokens).get_total_flops() // 2


def macs_by_module(config: Mapping[str, Any], tokens: int) -> dict[str, int]:
    """The same for every module of the network that a config builds, at the network's own size."""
    counter = _counted(config, torch.empty(1, *latent_of(config), device="meta"), tokens)
    root = f"{UNet2DConditionModel.__name__}."
    counts = {name.removeprefix(root): counted for name, counted in counter.get_flop_counts().items()}
    return {name: sum(counted.values()) // 2 for name, counted in counts.items()}


def latent_of(config: Mapping[str, Any], size: int | None = None) -> tuple[int, int, int]:
    """(C, h, w) that a UNet takes: of pictures of ``size`` pixels, or at the network's own size."""
    side = config["sample_size"] if size is None else size // 8
    height, width = side if isinstance(side, list | tuple) else (side, side)
    return config["in_channels"], height, width


def _counted(config: Mapping[str, Any], x_t: Tensor, tokens: int) -> FlopCounterMode:
    """One forward of a twin without weights, counted."""
    twin = skeleton(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward(twin, x_t, torch.zeros(1, device="meta"), blank(config, 1, tokens, "meta"))
    return counter


def size_mb(folder: Path) -> float:
    """Megabytes (10**6 bytes) of all files in a pipeline folder, or of a model that is one file.

    Raises:
        UserError: when it is not there.
    """
    if folder.is_file():
        return folder.stat().st_size / 1e6
    if not folder.is_dir():
        raise refuse("folder", folder, allowed="a folder", hint="give a pipeline folder that decant wrote")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
