"""Trainings of several players, killed and stopped on their way, end in the very same bits."""

import random
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from decant.scenes.folder import draw_folder
from processes import here, stopped_on_its_way

STEPS = 9
SETTINGS = (f"steps={STEPS}", "batch_size=2", "held_out=0.2", "held_out_most=2", "checkpoint_every=1", "device=cpu")
KINDS = {
    "consistency": ("consistency", "ema=0.9", "guidance_embedding=true", "teacher_guidance_scale=[2.0, 6.0]"),
    "dmd": ("dmd", "critic=0.01", "fake_updates=1", "ema=0.9", "sample_steps=2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_training_goes_on_to_the_same_weights(kind: str, tmp_path: Path) -> None:
    pictures = draw_folder(tmp_path / "pictures", 40, "train")
    verb, *own = KINDS[kind]
    chosen = [word for setting in (*SETTINGS, *own) for word in ("--set", setting)]

    def words(out: Path) -> list[str]:
        return [verb, "scenes-xl", "--teacher", "scenes-xl", "--data", str(pictures), "--out", str(out), *chosen]

    chance = random.Random(seed := random.randrange(2**32))
    print(f"seed {seed}")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = here(*words(whole))
    assert done.returncode == 0, done.stderr
    stopped_on_its_way(words(killed), killed, (signal.SIGKILL, signal.SIGTERM), 3, chance)
    one, other = (load_file(out / "unet" / "diffusion_pytorch_model.safetensors") for out in (whole, killed))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
