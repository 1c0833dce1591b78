"""A tiny distillation that checkpoints often: what test_kill_resume kills."""

from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from decant.data.batch import Batch
from decant.data.order import stream
from decant.maths.schedules import scaled_linear
from decant.methods.kd import KD, Knobs
from decant.models.families.sd1 import SD1
from decant.train.loop import loop
from decant.train.state import RunSettings, TrainState

RUN = RunSettings(steps=80, seed=1, lr=1e-3, schedule="one_cycle", warmup=6, clip=0.5)
N = 10


def unet(layers: int, seed: int) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=layers,
        norm_num_groups=8,
        cross_attention_dim=8,
        attention_head_dim=4,
    )


def batches(step: int) -> Sequence[Batch]:
    """Two micro-batches of two, from a source of ten samples."""
    made = torch.Generator().manual_seed(0)
    mean, std = torch.randn(N, 4, 8, 8, generator=made), torch.rand(N, 4, 8, 8, generator=made)
    tokens, empty = torch.randn(N, 5, 8, generator=made), torch.zeros(N, 5, 8)
    samples = stream(RUN.seed, step, 4, N)
    found = []
    for mine in (samples[:2], samples[2:]):
        at = [position % N for position in mine]
        condition, null = {"encoder_hidden_states": tokens[at]}, {"encoder_hidden_states": empty[at]}
        found.append(Batch(mine, mean[at], std[at], condition, null))
    return found


def method() -> KD:
    """Every kind of term, and an average."""
    family = SD1("epsilon", scaled_linear(0.00085, 0.012, 1000), None, None, None)
    pairs = {"down_blocks.0": "down_blocks.0", "up_blocks.1": "up_blocks.1"}
    knobs = Knobs(min_snr_gamma=5.0, caption_dropout=0.3, guidance_scale=3.0, ema=0.95)
    return KD.of(family, unet(1, 0), unet(2, 1), pairs, knobs)


def work(ready: Connection, folder: Path, every: int) -> None:
    """Train to the end, from the checkpoint in ``folder`` if any, saving after every ``every`` updates and the last.

    ``ready`` gets the step it starts from, before the first update.
    """
    torch.set_num_threads(1)
    trained = method()
    state = TrainState.start(trained, RUN, device="cpu")
    state.resume(folder)
    ready.send(state.step)
    for step in loop(trained, batches, state):
        if step.step % every == 0 or step.step == RUN.steps:
            state.save(folder)
