"""A small decoder's training, killed and stopped on its way, ends in the very same bits."""

import random
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from decant.scenes.folder import draw_folder
from processes import here, stopped_on_its_way

KILLS = 4
SETTINGS = (
    "steps=24", "batch_size=4", "width=8", "blocks=[1,1,1,1]", "ema=0.9", "crops=2", "flip=true", "samples=4",
    "sample_steps=1", "checkpoint_every=1", "latency_repeats=0", "device=cpu",
)  # fmt: skip


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    pictures = draw_folder(tmp_path / "pictures", 40, "train")
    chosen = [word for setting in SETTINGS for word in ("--set", setting)]

    def words(out: Path) -> list[str]:
        return ["decoder", "--teacher", "scenes", "--data", str(pictures), "--out", str(out), *chosen]

    chance = random.Random(seed := random.randrange(2**32))
    print(f"seed {seed}")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert here(*words(whole)).returncode == 0
    stopped_on_its_way(words(killed), killed, [*[signal.SIGKILL] * KILLS, signal.SIGTERM], 2, chance)
    one, other = (load_file(out / "vae" / "diffusion_pytorch_model.safetensors") for out in (whole, killed))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
