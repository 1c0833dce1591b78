"""A few pictures at several noise levels: on them a teacher is measured before it is cut, and a student beside it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from decant.data.batch import Batch
from decant.data.latents import Latents
from decant.data.source import read
from decant.errors import refuse
from decant.losses.output import mse
from decant.maths.prediction import target
from decant.models.families.family import Family
from decant.stages.encode import encode_data
from decant.stages.stage import Inputs
from decant.train.draw import Draw

LEVELS = 4


@dataclass(frozen=True)
class Call:
    """One forward: what a network sees, and what a perfect one would answer, (B, C, h, w). level: of noise."""

    level: int
    x_t: Tensor
    t: Tensor
    batch: Batch
    goal: Tensor


@dataclass(frozen=True)
class Calibration:
    """The pictures, encoded, and everything that a forward needs beside the network.

    purpose: of the draws, so that different measurements draw different noise.
    """

    family: Family
    data: Latents
    seed: int
    purpose: str = "calibration"

    def calls(self, device: torch.device, batch_size: int = 16) -> Iterator[Call]:
        """Every picture at a timestep in each quarter of the schedule, batch by batch; drawn from (seed, level,
        picture) alone.
        """
        for level in range(LEVELS):
            for start in range(0, self.data.n, batch_size):
                yield self._call(level, tuple(range(start, min(start + batch_size, self.data.n))), device)

    def answer(self, net: nn.Module, call: Call) -> Tensor:
        """The network's output, (B, C, h, w)."""
        output: Tensor = self.family.denoise(net, call.x_t, call.t, call.batch.condition)
        return output

    def loss(self, net: nn.Module, call: Call) -> Tensor:
        """The training loss: how far the network's answer is from a perfect one's."""
        return mse(self.answer(net, call), call.goal).mean()

    def _call(self, level: int, places: tuple[int, ...], device: torch.device) -> Call:
        batch, draw = self.data.batch(places).to(device), Draw(self.seed, level, places)
        shape, total = tuple(batch.mean.shape[1:]), len(self.family.schedule.alpha)
        t = ((level + draw.uniform(f"{self.purpose} timestep")) * total / LEVELS).long().to(device)
        noise = draw.normal(f"{self.purpose} noise", shape).to(device)
        x_0 = batch.latents(draw.normal(f"{self.purpose} latent", shape).to(device))
        alpha, sigma = self.family.schedule.at(t, x_0.ndim)
        goal = target(self.family.prediction, x_0, noise, alpha, sigma)
        return Call(level, self.family.corrupt(x_0, noise, t), t, batch, goal)


def calibration(family: Family, size: int, pictures: int, inputs: Inputs, device: torch.device) -> Calibration:
    """The first pictures of ``inputs.data``, encoded at ``size`` pixels.

    Raises:
        UserError: there is no data.
    """
    if inputs.data is None:
        raise refuse("data", "none", allowed="a folder of pictures with captions to measure on", hint="--data DIR")
    chosen = read(inputs.data, index=inputs.kept / "index").first(pictures)
    return Calibration(family, encode_data(family, chosen, size, inputs, device, "calibration"), inputs.seed)
