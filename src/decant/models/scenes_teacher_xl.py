"""The networks of the second scenes teacher: SDXL's layout and transformer depths, small widths, ordinary classes."""

from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from decant.models.scenes_teacher import LATENT_SIDE, TEXT_LENGTH, new_scheduler

TEXT_WIDTHS = (48, 80)
POOLED = 64
_SIZES = 6  # original height and width, crop top and left, target height and width
_SIZE_WIDTH = 16

UNET_CONFIG: dict[str, Any] = {
    "sample_size": LATENT_SIDE,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (56, 48, 32),  # the depth of 10 is what costs: 60 of the 70 blocks are of the last width
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": sum(TEXT_WIDTHS),
    "attention_head_dim": [4, 4, 4],
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": _SIZE_WIDTH,
    "projection_class_embeddings_input_dim": POOLED + _SIZES * _SIZE_WIDTH,
}


def new_unet() -> UNet2DConditionModel:
    """An untrained UNet of three levels, without attention in the first, 2 and 10 transformer blocks in the others."""
    return UNet2DConditionModel(**UNET_CONFIG)


def new_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Untrained CLIP text encoders: (B, 32) tokens -> (B, 32, 48) and (B, 32, 80), pooled (B, 64).

    As in SDXL, the UNet reads the states before the last layer of each, and the second's pooled text.
    """
    first, second = (_text_config(tokenizer, width, layers) for width, layers in zip(TEXT_WIDTHS, (3, 4), strict=True))
    return CLIPTextModel(first), CLIPTextModelWithProjection(second)


def _text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=POOLED,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def assemble(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
    tokenizer: CLIPTokenizer,
) -> StableDiffusionXLPipeline:
    """The pipeline of these parts, as plain diffusers opens it; an empty prompt is zeros, as in SDXL."""
    kind: Any = StableDiffusionXLPipeline
    return kind(
        vae=vae,
        text_encoder=text_encoders[0],
        text_encoder_2=text_encoders[1],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
