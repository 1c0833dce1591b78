"""What every part of a scenes teacher's training needs: pictures, captions, pace, averages, the log."""

import json
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTokenizer

from decant.models.generate import generate
from decant.models.layout import Pipeline
from decant.models.pace import fast_products
from decant.scenes.captions import caption
from decant.scenes.classes import CLASSES
from decant.scenes.render import render
from decant.scenes.world import Scene, draw_scene, scenes
from decant.stages.pictures import save_strip

Talk = Callable[[str], None]


class Part(BaseModel):
    """One part of the recipe: at most an hour on two cores, from weights to weights."""

    model_config = ConfigDict(extra="forbid")
    name: str
    kind: Literal["vae", "denoiser", "decoder", "xl"]
    pictures: int
    steps: int
    batch_size: int
    learning_rate: float
    crop: int = 64
    l1_weight: float = 0.0
    compile: bool = False
    read_weight: float = 0.0
    stop_at: int | None = None


def training_pictures(n: int) -> Tensor:
    """The first ``n`` training scenes as uint8 (n, 3, 64, 64)."""
    drawn = np.stack([render(draw_scene(seed, "train"), seed) for seed in range(n)])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()


def to_unit(pictures: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def _one_cycle(optimiser: torch.optim.Optimizer, part: Part) -> torch.optim.lr_scheduler.OneCycleLR:
    """Cosine up over a twentieth of the steps, cosine down to nothing over the rest."""
    return torch.optim.lr_scheduler.OneCycleLR(
        optimiser, part.learning_rate, total_steps=part.steps + 1, pct_start=0.05, div_factor=25
    )


def _paced(part: Part, seed: int) -> Iterator[tuple[int, torch.Generator]]:
    """Every step to do now, and the generator that is its only randomness."""
    for step in range(part.stop_at or part.steps):
        yield step, torch.Generator().manual_seed(zlib.crc32(f"{seed} {part.name} {step}".encode()))


class Log:
    """Progress lines with the time left, and a JSON-lines file of the losses."""

    def __init__(self, part: Part, folder: Path, talk: Talk) -> None:
        self.part, self.talk, self.begin = part, talk, time.time()
        self.sums: dict[str, float] = {}
        self.count = 0
        self.file = (folder / "log.jsonl").open("w")

    def step(self, step: int, figures: dict[str, float], every: int = 100) -> None:
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1
        if (step + 1) % every and step + 1 != self.part.steps:
            return
        means = {name: total / self.count for name, total in self.sums.items()}
        spent = time.time() - self.begin
        left = spent / (step + 1) * (self.part.steps - step - 1)
        self.file.write(
            json.dumps({"part": self.part.name, "step": step + 1, "seconds": round(spent, 1), **means}) + "\n"
        )
        self.file.flush()
        shown = "  ".join(f"{name} {value:.5f}" for name, value in means.items())
        self.talk(f"{self.part.name}  {step + 1}/{self.part.steps}  {shown}  {left / 60:.1f} min left")
        self.sums, self.count = {}, 0


@torch.no_grad()
def encoded(vae: AutoencoderKL, pictures: Tensor, chunk: int = 64) -> tuple[Tensor, Tensor]:
    """Scaled latent mean and standard deviation of uint8 (n, 3, 64, 64), each (n, 4, 8, 8)."""
    nn.Module.to(vae.eval(), memory_format=torch.channels_last)
    moments = []
    for part in pictures.split(chunk):
        posterior = vae.encode(to_unit(part).to(memory_format=torch.channels_last)).latent_dist
        moments.append(torch.stack([posterior.mean, posterior.std]) * vae.config["scaling_factor"])
    mean, std = torch.cat(moments, dim=1).contiguous()
    return mean, std


def stratified_timesteps(n: int, total: int, generator: torch.Generator) -> Tensor:
    """One timestep in each of ``n`` equal strata of [0, total): uniform over all, less variance in a batch."""
    return ((torch.arange(n) + torch.rand(n, generator=generator)) * total / n).long()


Assembled = Callable[[Any], Pipeline]
Losses = Callable[[torch.Generator], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Training:
    """What one part trains: a module, whose average is kept at ``decay``, and what is dropped afterwards.

    losses: of a step's generator the scalar to minimise, and scalars for the log. fast: with `fast_products`.
    """

    module: nn.Module
    optimiser: torch.optim.Optimizer
    decay: float
    losses: Losses
    beside: tuple[nn.Parameter, ...] = ()
    fast: bool = False


def trained(part: Part, seed: int, training: Training, out: Path, talk: Talk) -> Iterator[tuple[int, nn.Module]]:
    """After every update: (how many there were, the averaged module). Gradients are clipped at norm 1."""
    module, optimiser = training.module, training.optimiser
    parameters = [*module.parameters(), *training.beside]
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(training.decay))
    schedule, log = _one_cycle(optimiser, part), Log(part, out, talk)
    for step, generator in _paced(part, seed):
        optimiser.zero_grad()
        with fast_products() if training.fast else nullcontext():
            loss, figures = training.losses(generator)
            loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        average.update_parameters(module)
        log.step(step, {name: value.item() for name, value in figures.items()})
        yield step + 1, average.module


def written(part: Part, training: Training, seed: int, out: Path, talk: Talk, assembled: Assembled) -> None:
    """Train a part of a whole pipeline; writes its folder and what it draws, every thousand updates and at the end."""
    for step, average in trained(part, seed, training, out, talk):
        if step % 1000 == 0 or step == (part.stop_at or part.steps):
            pipeline = assembled(average.eval())
            pipeline.save_pretrained(out)
            seeds, captions = zip(*((k, caption(s, k)) for k, s in scenes(8, "train")), strict=True)
            drawn = generate(pipeline, captions, seeds, guidance_scale=4.0)
            save_strip(list(drawn), out / "samples" / f"step-{step:05d}.png")
            talk(f"{part.name}  weights of step {step} written")


class Reader(nn.Module):
    """What a caption asks for, read off the text encoder's last states: a head that training drops afterwards.

    Without it the encoder never learned which of two things stands where: "A left of B" and "B left of A" hold the same
    words, and the gradient through the UNet did not tell them apart in 13,000 steps. The published teachers' encoders
    could read before their UNets were trained, too.
    """

    POSITIONS = 8  # behind the end of every caption, where a causal encoder has seen all of it

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, sum(CLASSES))

    def forward(self, states: Tensor, asked: Tensor, positions: int = POSITIONS) -> Tensor:
        """Cross-entropy of (B, L, D) states against (B, 8) classes, summed over the classes: a scalar."""
        answers = self.head(states[:, -positions:]).split(CLASSES, dim=-1)
        wanted = asked.unsqueeze(1).expand(-1, positions, -1)
        pairs = zip(answers, wanted.unbind(-1), strict=True)
        losses = [nn.functional.cross_entropy(a.flatten(0, 1), w.flatten()) for a, w in pairs]
        return torch.stack(losses).sum()


def tokens_of(shown: list[Scene], tokenizer: CLIPTokenizer, dropout: float, generator: torch.Generator) -> Tensor:
    """Captions in a fresh phrasing each time, some left empty for guidance, as (B, L) tokens."""
    seeds = torch.randint(0, 2**31, (len(shown),), generator=generator).tolist()
    empty = (torch.rand(len(shown), generator=generator) < dropout).tolist()
    texts = ["" if drop else caption(scene, seed) for scene, seed, drop in zip(shown, seeds, empty, strict=True)]
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
