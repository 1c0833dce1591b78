"""A small autoencoder in a pipeline's VAE's place: its shape, its counts, and what opens it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline, StableDiffusionXLPipeline

from decant.errors import UserError
from decant.models.cost import parameters
from decant.models.families.of import family_of
from decant.models.generate import generate
from decant.models.layout import rebuilt
from decant.models.load import load, save, vae_config
from decant.models.single_file import write_single_file
from decant.models.small_vae import check_teacher, decode_macs, encode_macs, new_small_vae, small_config

SD = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4}


def with_small_vae(pipeline: Any, *, encoder: bool = True) -> Any:
    config = small_config(dict(pipeline.vae.config), 8, None)
    return rebuilt(pipeline, vae=new_small_vae(config, 0, encoder=encoder))


def edit(folder: Path, **values: Any) -> None:
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_for_sd_15_it_is_taesd() -> None:
    """1,222,531 parameters a half; 71 and 61 G multiply-accumulates where the KL autoencoder takes 1257 and 558."""
    small = new_small_vae(small_config(vae_config("sd15"), None, None), 0, encoder=True)
    assert parameters(small.decoder) == 1_222_531 and parameters(small.encoder) == 1_222_532
    published = AutoencoderTiny()
    assert {n: p.shape for n, p in small.named_parameters()} == {n: p.shape for n, p in published.named_parameters()}
    with torch.device("meta"):
        large = AutoencoderKL.from_config(vae_config("sd15"))
    counts = [decode_macs(vae, (4, 64, 64)) / 1e9 for vae in (large, small)]
    counts += [encode_macs(vae, (512, 512)) / 1e9 for vae in (large, small)]
    assert [round(count) for count in counts] == [1257, 71, 558, 61]


@pytest.mark.parametrize(("widths", "width"), [([128, 256, 512, 512], 64), ([32, 64, 64, 96], 32), ([16, 64], 16)])
def test_its_width_and_factor_follow_the_teachers(widths: list[int], width: int) -> None:
    small = new_small_vae(
        small_config({"block_out_channels": widths, "latent_channels": 7}, None, None), 0, encoder=True
    )
    assert set(small.config["decoder_block_out_channels"]) == {width}
    with torch.no_grad():
        latent = small.encode(torch.zeros(1, 3, 32, 32)).latents
        side = 32 // 2 ** (len(widths) - 1)
        assert latent.shape == (1, 7, side, side)
        assert small.decode(latent).sample.shape == (1, 3, 32, 32)


def test_blocks_for_another_factor_are_refused() -> None:
    with pytest.raises(UserError, match=r"4 numbers.*8 times smaller"):
        small_config(SD, None, (3, 3, 1))


def test_a_teacher_whose_latents_are_shifted_by_channel_or_that_is_small_is_refused() -> None:
    pipeline = load("scenes")
    assert check_teacher(pipeline, "teacher") is pipeline.vae
    with pytest.raises(UserError, match="AutoencoderTiny"):
        check_teacher(with_small_vae(pipeline), "teacher")
    pipeline.vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with pytest.raises(UserError, match="latents_mean"):
        check_teacher(pipeline, "teacher")


def test_plain_diffusers_and_decant_draw_the_same_with_it(tmp_path: Path) -> None:
    save(with_small_vae(load("scenes")), tmp_path / "small")
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "small")
    assert isinstance(plain.vae, AutoencoderTiny) and plain.vae_scale_factor == 8
    plain.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    asked: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "np"}
    opened = load(tmp_path / "small")
    theirs = plain("a red circle", latents=latents.clone(), **asked).images[0]
    opened.set_progress_bar_config(disable=True)
    mine = opened("a red circle", latents=latents.clone(), **asked).images[0]
    assert theirs.shape == (64, 64, 3) and abs(mine - theirs).max() < 1e-5
    assert next(generate(opened, ["a red circle"], [0], steps=1)).shape == (64, 64, 3)


def test_sdxl_opens_with_it(make_sdxl: Callable[..., Any], tmp_path: Path) -> None:
    pipeline = make_sdxl()
    save(with_small_vae(pipeline), tmp_path / "small")
    plain = StableDiffusionXLPipeline.from_pretrained(tmp_path / "small")
    assert isinstance(plain.vae, AutoencoderTiny)
    assert next(generate(load(tmp_path / "small"), ["a"], [0], steps=1)).shape == (64, 64, 3)


def test_its_latents_have_no_spread_and_need_an_encoder(tmp_path: Path) -> None:
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pipeline = with_small_vae(load("scenes"))
    mean, std = family_of(pipeline).encode(pictures)
    assert torch.equal(mean, pipeline.vae.encode(pictures).latents.detach()) and not std.any()
    save(with_small_vae(pipeline, encoder=False), tmp_path / "half")
    with pytest.raises(UserError, match="without an encoder"):
        family_of(load(tmp_path / "half")).encode(pictures)


def test_one_file_has_no_place_for_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"AutoencoderTiny(.|\n)*AutoencoderKL"):
        write_single_file(with_small_vae(load("scenes")), tmp_path / "small.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"latent_channels": 8}, "latent channels"),
        ({"upsampling_scaling_factor": 4}, "twice as large"),
        ({"num_encoder_blocks": [1, 3, 3], "encoder_block_out_channels": [8, 8, 8]}, "as many levels"),
        ({"num_decoder_blocks": [3, 3, 3, 10**6]}, "num_decoder_blocks"),
        ({"_class_name": "AutoencoderKL"}, "AutoencoderTiny"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    save(with_small_vae(load("scenes")), tmp_path / "small")
    edit(tmp_path / "small", **values)
    with pytest.raises(UserError, match=said):
        load(tmp_path / "small")
