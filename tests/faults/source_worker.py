"""A tiny distillation on a real source, looked at, encoded through the cache and trained on: what is killed there."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from kill_worker import RUN, method
from torch import Tensor

from decant.data.batch import Batch
from decant.data.latents import Cache, encode_all
from decant.data.order import stream
from decant.data.picture import Frame, View
from decant.data.source import read
from decant.train.loop import loop
from decant.train.state import TrainState

STEPS = 24
SETTINGS = replace(RUN, steps=STEPS)


class Letters:
    """In the place of a VAE and a text encoder: means of patches, and the caption's letters. Tells of every call."""

    def __init__(self, told: Connection) -> None:
        self.told = told

    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        self.told.send("encoding")
        mean = torch.nn.functional.avg_pool2d(pictures, 8)
        mean = torch.cat([mean, mean.mean(1, keepdim=True)], dim=1)
        return mean, mean.abs() / 4

    def condition(self, captions: Sequence[str]) -> dict[str, Tensor]:
        letters = [[ord(letter) / 128 for letter in caption.ljust(40)[:40]] for caption in captions]
        return {"encoder_hidden_states": torch.tensor(letters).reshape(-1, 5, 8)}

    def null(self, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.zeros_like(value) for name, value in condition.items()}

    def framing(self, frames: Sequence[Frame]) -> dict[str, Tensor]:
        return {}

    def made_by(self) -> dict[str, str]:
        return {"pictures": "patches", "captions": "letters"}


def work(told: Connection, data: str, folder: Path) -> None:
    """All of a run on ``data`` to its end, going on from what ``folder`` holds.

    ``told`` gets "looking", "encoding" for every call of the encoder, then the step it starts from, and every step.
    """
    torch.set_num_threads(1)
    told.send("looking")
    found = read(data, index=folder / "index")
    cache = Cache(folder / "cache", folder / "cache", lambda line: None)
    views = View.several("crop", 2, flip=True)
    latents = encode_all(found, 64, Letters(told), cache, seed=SETTINGS.seed, views=views)

    def batches(step: int) -> list[Batch]:
        samples = stream(SETTINGS.seed, step, 4, latents.n)
        return [latents.batch(samples[:2]), latents.batch(samples[2:])]

    trained = method()
    state = TrainState.start(trained, SETTINGS, device="cpu")
    state.resume(folder / "steps")
    told.send(state.step)
    for step in loop(trained, batches, state):
        state.save(folder / "steps")
        told.send(step.step)
