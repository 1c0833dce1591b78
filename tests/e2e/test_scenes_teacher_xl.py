"""The second shipped teacher, of SDXL's layout: what diffusers makes of it, what it can do, and its published cuts."""

import json
import subprocess
import sys

import pytest
import torch

from decant.models.families.of import family_of
from decant.models.generate import generate
from decant.models.load import architecture, load, unet_config
from decant.models.shipped import shipped_folder
from decant.models.surgery.features import pairs_of
from decant.models.surgery.presets import published
from decant.models.surgery.surgery import build
from decant.scenes.captions import parse
from decant.scenes.checker import check
from decant.scenes.folder import captions_of
from decant.scenes.world import held_out

FOLDER = shipped_folder("scenes-xl")
FLOOR = 0.85
SAME = ("down_block_types", "up_block_types", "transformer_layers_per_block", "layers_per_block", "addition_embed_type")


def test_it_is_small_and_half_precision() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 12_000_000
    assert not [file for file in FOLDER.rglob("*") if file.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_it_has_the_layout_and_depths_of_sdxl() -> None:
    own, sdxl = unet_config("scenes-xl"), architecture("sdxl")
    assert {key: list(own[key]) if isinstance(own[key], tuple) else own[key] for key in SAME} == {
        key: sdxl[key] for key in SAME if key in sdxl
    } | {key: own[key] for key in SAME if key not in sdxl}
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline" and index["force_zeros_for_empty_prompt"] is True
    assert {"text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae", "unet", "scheduler"} <= index.keys()


def test_its_sizes_and_pooled_text_are_heard() -> None:
    """Neither is an input that the network passes over."""
    pipeline = load("scenes-xl")
    family, x_t, t = family_of(pipeline), torch.randn(1, 4, 8, 8), torch.tensor([400])
    told = {**family.condition(["a large red ring on a white background"]), "time_ids": torch.tensor([[64.0] * 6])}
    with torch.no_grad():
        plain = family.denoise(pipeline.unet, x_t, t, told)
        for key in ("text_embeds", "time_ids", "encoder_hidden_states"):
            other = family.denoise(pipeline.unet, x_t, t, {**told, key: told[key] + 1})
            assert (other - plain).abs().max() > 1e-3, key


@pytest.mark.slow
def test_plain_diffusers_opens_it_and_draws_the_same() -> None:
    code = """
import sys, torch
from diffusers import StableDiffusionXLPipeline
pipeline = StableDiffusionXLPipeline.from_pretrained(sys.argv[1])
noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
picture = pipeline("a large red ring on a white background", latents=noise, num_inference_steps=4,
                   guidance_scale=4.0, output_type="np").images[0]
assert not any(name.startswith("decant") for name in sys.modules)
print((picture * 255).round().astype("uint8").tobytes().hex())
"""
    done = subprocess.run([sys.executable, "-c", code, str(FOLDER)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    asked = ["a large red ring on a white background"]
    ours = next(generate(load("scenes-xl"), asked, [3], steps=4, guidance_scale=4.0))
    theirs = bytes.fromhex(done.stdout.strip())
    assert max(abs(a - b) for a, b in zip(ours.tobytes(), theirs, strict=True)) <= 1


@pytest.mark.slow
def test_it_draws_held_out_scenes() -> None:
    asked = captions_of(64, "held-out", first_seed=2_000_000)
    assert all(held_out(parse(text)) for _, text in asked)
    seeds, captions = zip(*asked, strict=True)
    pictures = generate(load("scenes-xl"), captions, seeds, steps=25, guidance_scale=4.0, batch_size=32)
    right = [check(picture, text).exact for picture, text in zip(pictures, captions, strict=True)]
    assert sum(right) / len(right) >= FLOOR


@pytest.mark.parametrize(
    ("student", "layers"), [("ssd-1b", 26), ("vega", 26), ("koala-1b", None), ("koala-700m", None)]
)
def test_the_published_students_are_cut_from_it(student: str, layers: int | None) -> None:
    unet = load("scenes-xl").unet
    surgery = published(dict(unet.config), unet.state_dict(), student)
    small = build(surgery)
    told = {"text_embeds": torch.zeros(1, 64), "time_ids": torch.full((1, 6), 64.0)}
    with torch.no_grad():
        answer = small(torch.randn(1, 4, 8, 8), 10, torch.zeros(1, 32, 128), added_cond_kwargs=told).sample
    assert answer.shape == (1, 4, 8, 8) and answer.isfinite().all()
    found = pairs_of("layer", surgery.config, dict(unet.config), surgery.surgery_map)
    assert layers is None or len(found) == layers
    assert pairs_of("self_attention", surgery.config, dict(unet.config), surgery.surgery_map)
