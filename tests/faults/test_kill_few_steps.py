"""Trainings of several players, killed and stopped on their way, end in the very same bits."""

import random
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from decant.scenes.folder import draw_folder
from processes import Begun, here

STEPS = 12
SETTINGS = (f"steps={STEPS}", "batch_size=2", "held_out=0.2", "held_out_most=2", "checkpoint_every=1", "device=cpu")
KINDS = {
    "consistency": ("consistency", "ema=0.9", "guidance_embedding=true", "teacher_guidance_scale=[2.0, 6.0]"),
    "dmd": ("dmd", "critic=0.01", "fake_updates=2", "ema=0.9", "sample_steps=2"),
    "one network": ("dmd", "lora.rank=2", "roles=shared", "fake_updates=1", "sample_steps=2"),
}


def lines_in(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.exists() else 0


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
    losses = tmp_path / ".killed.work" / "killed" / "partial" / "losses.jsonl"
    for number in (signal.SIGKILL, signal.SIGTERM):
        child = Begun(words(killed), tmp_path / "said")
        more = lines_in(losses) + chance.randrange(1, 4)
        child.wait_for(lambda more=more: lines_in(losses) >= more)
        time.sleep(chance.uniform(0, 0.1))
        child.signal(number)
        assert child.wait() in (-number, 128 + number), child.said
        assert not killed.exists()
    went_on = here(*words(killed))
    assert went_on.returncode == 0 and "goes on from the checkpoint" in went_on.stderr, went_on.stderr
    one, other = (load_file(out / "unet" / "diffusion_pytorch_model.safetensors") for out in (whole, killed))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
