"""The networks of the scenes teacher: Stable Diffusion 1.x layout, small widths, ordinary classes."""

from collections.abc import Iterable
from itertools import product
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LATENT_SIDE = 8
TEXT_WIDTH = 128
TEXT_LENGTH = 32  # the longest caption has 20 tokens; the 45 fewer of CLIP's 77 are a third of the UNet's work at 8 x 8
START, END = "<|startoftext|>", "<|endoftext|>"

UNET_CONFIG: dict[str, Any] = {
    "sample_size": LATENT_SIDE,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 96, 128, 128),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 32,
}
VAE_CONFIG: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (32, 64, 64, 96),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 16,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


def new_vae() -> AutoencoderKL:
    """An untrained autoencoder: factor 8, 4 latent channels, (B, 3, 64, 64) <-> (B, 4, 8, 8)."""
    return AutoencoderKL(**VAE_CONFIG)


def new_unet() -> UNet2DConditionModel:
    """An untrained UNet of four levels, two layers a block, a mid block and cross-attention: SD 1.x's layout."""
    return UNet2DConditionModel(**UNET_CONFIG)


def new_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer: any text tokenises; every word of the given captions is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(sorted(set(captions)), trainer)
    merges = [tuple(pair) for pair in _merges(learner)]
    symbols = [letter + end for end, letter in product(("", "</w>"), alphabet)]
    symbols += list(dict.fromkeys("".join(pair) for pair in merges))
    vocabulary = {symbol: index for index, symbol in enumerate([*dict.fromkeys(symbols), START, END])}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,  # type: ignore[arg-type]
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=TEXT_LENGTH,
    )


def _merges(learner: Tokenizer) -> list[list[str]]:
    import json

    return [
        pair if isinstance(pair, list) else pair.split(" ") for pair in json.loads(learner.to_str())["model"]["merges"]
    ]


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text encoder of three layers, (B, 32) tokens -> (B, 32, 128)."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.x's schedule: scaled-linear betas, epsilon prediction, 1,000 steps."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def assemble(
    unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """The pipeline of these parts, as plain diffusers opens it; there is no safety checker."""
    kind: Any = StableDiffusionPipeline  # its annotations forbid what it documents: no safety checker
    return kind(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
