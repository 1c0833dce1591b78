"""The shipped teacher: what plain diffusers makes of it, and what it can do."""

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from decant.models.generate import generate
from decant.models.load import load
from decant.models.scenes_teacher import UNET_CONFIG
from decant.scenes.captions import parse
from decant.scenes.checker import check
from decant.scenes.folder import captions_of
from decant.scenes.world import held_out

GUIDANCE = 4.0
FLOOR = 0.9

FOLDER = Path(str(resources.files("decant.scenes") / "teacher"))


def test_it_is_small_and_half_precision() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 28_000_000
    assert not [file for file in FOLDER.rglob("*") if file.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_it_has_the_layout_of_stable_diffusion() -> None:
    config = json.loads((FOLDER / "unet" / "config.json").read_text())
    assert config["layers_per_block"] == UNET_CONFIG["layers_per_block"] == 2
    assert len(config["block_out_channels"]) == 4
    assert config["mid_block_type"] == "UNetMidBlock2DCrossAttn"
    scheduler = json.loads((FOLDER / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["beta_schedule"], scheduler["prediction_type"]) == ("scaled_linear", "epsilon")


@pytest.mark.slow
def test_plain_diffusers_opens_it_and_draws_the_same() -> None:
    code = """
import sys, torch
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1])
noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
picture = pipeline("a large red ring on a white background", latents=noise, num_inference_steps=4,
                   guidance_scale=4.0, output_type="np").images[0]
assert not any(name.startswith("decant") for name in sys.modules)
print((picture * 255).round().astype("uint8").tobytes().hex())
"""
    done = subprocess.run([sys.executable, "-c", code, str(FOLDER)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours = next(generate(load("scenes"), ["a large red ring on a white background"], [3], steps=4, guidance_scale=4.0))
    theirs = bytes.fromhex(done.stdout.strip())
    assert max(abs(a - b) for a, b in zip(ours.tobytes(), theirs, strict=True)) <= 1


@pytest.mark.slow
def test_it_draws_held_out_scenes() -> None:
    """A floor, so that a broken file is noticed; the measured figure is in docs/results.md."""
    asked = captions_of(64, "held-out", first_seed=2_000_000)
    assert all(held_out(parse(caption)) for _, caption in asked)
    seeds, captions = zip(*asked, strict=True)
    pictures = generate(load("scenes"), captions, seeds, steps=25, guidance_scale=GUIDANCE, batch_size=32)
    right = [check(picture, caption).exact for picture, caption in zip(pictures, captions, strict=True)]
    assert sum(right) / len(right) >= FLOOR
