"""A whole Stable Diffusion pipeline of the 1.x layout, small enough to be made anew in every test."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64, 64, 64),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}


def _tokenizer() -> CLIPTokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _pipeline(prediction_type: str = "epsilon", **unet: Any) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 32),
        norm_num_groups=8,
        latent_channels=4,
        scaling_factor=0.5,
    )
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(**{**UNET, **unet}).eval(),
        vae=vae.eval(),
        text_encoder=_text_encoder(tokenizer).eval(),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            clip_sample=False,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture
def make_pipeline() -> Callable[..., StableDiffusionPipeline]:
    """`make_pipeline(prediction_type, **unet_settings)`: seeded, on the CPU, 64 px pictures."""
    return _pipeline


@pytest.fixture
def pipeline() -> StableDiffusionPipeline:
    """A tiny pipeline of one's own."""
    return _pipeline()


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as plain diffusers saves it, for all tests: to be read, and never changed."""
    where = tmp_path_factory.mktemp("saved") / "teacher"
    _pipeline().save_pretrained(where)
    return where


@pytest.fixture
def folder(tmp_path: Path, saved: Path) -> Path:
    """The same, a copy of one's own, to be broken at will."""
    return shutil.copytree(saved, tmp_path / "teacher")
