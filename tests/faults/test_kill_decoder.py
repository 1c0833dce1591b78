"""A small decoder's training, killed and stopped on its way, ends in the very same bits."""

import random
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from decant.scenes.folder import draw_folder
from processes import Begun, here

KILLS = 4
SETTINGS = (
    "steps=24", "batch_size=4", "width=8", "blocks=[1,1,1,1]", "ema=0.9", "crops=2", "flip=true", "samples=4",
    "sample_steps=1", "checkpoint_every=1", "latency_repeats=0", "device=cpu",
)  # fmt: skip


def lines_in(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.exists() else 0


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
    losses = tmp_path / ".killed.work" / "killed" / "partial" / "losses.jsonl"
    for number in [*[signal.SIGKILL] * KILLS, signal.SIGTERM]:
        child = Begun(words(killed), tmp_path / "said")
        more = lines_in(losses) + chance.randrange(1, 3)
        child.wait_for(lambda more=more: lines_in(losses) >= more)
        time.sleep(chance.uniform(0, 0.05))
        child.signal(number)
        assert child.wait() in (-number, 128 + number), child.said
        assert not killed.exists()
    went_on = here(*words(killed))
    assert went_on.returncode == 0 and "goes on from the checkpoint" in went_on.stderr, went_on.stderr
    one, other = (load_file(out / "vae" / "diffusion_pytorch_model.safetensors") for out in (whole, killed))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
