"""A small autoencoder in the place of a pipeline's: diffusers' `AutoencoderTiny`, as TAESD is one.

It decodes the latents of its teacher as the UNet gives them, scaled: its own scaling factor is 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from decant.errors import refuse
from decant.models.layout import Pipeline

_BLOCKS = 3  # of TAESD, at every level but the one of pixels, which has one
_WIDEST = 64  # of TAESD


def check_teacher(pipeline: Pipeline, place: str) -> AutoencoderKL:
    """The autoencoder of a teacher, where a small one can stand in its place.

    Raises:
        UserError: it is a small one already, shifts its latents channel by channel, or its pictures have no 3 colours.
    """
    vae = pipeline.vae
    if not isinstance(vae, AutoencoderKL):
        hint = "name the teacher that the small decoder learned from"
        raise refuse(f"{place}: vae", type(vae).__name__, allowed="AutoencoderKL", hint=hint)
    config = vae.config
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        hint = "such as Playground's: its latents are not those that this version's UNets are trained on"
        raise refuse(f"{place}: vae", "latents_mean and latents_std", allowed="one scaling_factor alone", hint=hint)
    if (config["in_channels"], config["out_channels"]) != (3, 3):
        said = f"{config['in_channels']} channels in, {config['out_channels']} out"
        raise refuse(f"{place}: vae", said, allowed="pictures of 3 colours", hint="take a text-to-image teacher")
    return vae


def small_config(teacher: Mapping[str, Any], width: int | None, blocks: Sequence[int] | None) -> dict[str, Any]:
    """The config of a small autoencoder for the latents of the KL autoencoder of a config.

    width: channels at every level; None for those of the teacher's narrowest, at most 64 as TAESD has. blocks: residual
    blocks at each level of the decoder, from the latents to the pixels; the encoder has the same, backwards. None for
    TAESD's: 3 at every level, 1 at the last.

    Raises:
        UserError: blocks for another number of levels than the teacher's.
    """
    levels = len(teacher["block_out_channels"])
    blocks = (_BLOCKS,) * (levels - 1) + (1,) if blocks is None else tuple(blocks)
    if len(blocks) != levels:
        factor = 2 ** (levels - 1)
        allowed = f"{levels} numbers: the teacher's latents are {factor} times smaller than its pictures"
        raise refuse("decoder.blocks", list(blocks), allowed=allowed, hint="a number for each level, such as 3 3 3 1")
    width = min(_WIDEST, *teacher["block_out_channels"]) if width is None else width
    return {
        "encoder_block_out_channels": [width] * levels,
        "decoder_block_out_channels": [width] * levels,
        "num_encoder_blocks": list(blocks[::-1]),
        "num_decoder_blocks": list(blocks),
        "latent_channels": teacher.get("latent_channels", 4),
        "scaling_factor": 1.0,
    }


def new_small_vae(config: Mapping[str, Any], seed: int, *, encoder: bool) -> AutoencoderTiny:
    """An untrained small autoencoder; without an encoder its encoder is zeros, which is told from a trained one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderTiny.from_config(dict(config))
    for weight in () if encoder else vae.encoder.parameters():
        weight.data.zero_()
    return vae


class Halves(nn.Module):
    """Both halves of a small autoencoder as one network to train: latents to pictures, and pictures to latents."""

    def __init__(self, vae: AutoencoderTiny) -> None:
        super().__init__()
        self.decoder, self.encoder = vae.decoder, vae.encoder

    def forward(self, latents: Tensor, pictures: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Scaled latents (B, C, h, w) and pictures (B, 3, H, W) in [-1, 1], each as the other; None for no pictures."""
        return self.decoder(latents), self.encoder(pictures) if pictures is not None else None


def decode_macs(vae: nn.Module, latent: tuple[int, int, int]) -> int:
    """Multiply-accumulates of decoding one latent (C, h, w), the attention products included; no weights are used."""
    return _counted(vae, "decode", latent)


def encode_macs(vae: nn.Module, size: tuple[int, int]) -> int:
    """Multiply-accumulates of encoding one picture of (height, width) pixels."""
    return _counted(vae, "encode", (3, *size))


def _counted(vae: Any, what: str, shape: tuple[int, ...]) -> int:
    with torch.device("meta"):
        twin = type(vae).from_config(dict(vae.config))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            getattr(twin, what)(torch.empty(1, *shape))
    return counter.get_total_flops() // 2
