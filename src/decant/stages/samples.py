"""Latents for prompts that have no pictures: the teacher's own samples, or random ones."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, assert_never

import torch
from torch import Tensor, nn

from decant.data.latents import Drawer
from decant.maths.seeds import seed_of
from decant.models.cost import latent_of
from decant.models.digest import module_digest
from decant.models.families.of import family_of
from decant.models.generate import generate_latents
from decant.models.layout import Pipeline
from decant.models.samplers import Sampler

FromPrompts = Literal["samples", "random"]


@dataclass(frozen=True)
class Sampling:
    """How the teacher draws. ``seed``: with it, a prompt decides its own starting noise."""

    how: FromPrompts = "samples"
    steps: int = 25
    guidance_scale: float = 7.5
    seed: int = 0
    sampler: Sampler = "ddim"


def drawer(pipeline: Pipeline, size: int, sampling: Sampling, device: torch.device) -> Drawer:
    """What draws latents at ``size`` pixels; nothing is drawn yet."""
    match sampling.how:
        case "samples":
            return _Samples(pipeline, size, sampling, device)
        case "random":
            return _Random(latent_of(pipeline.unet.config, size))
    assert_never(sampling.how)


@dataclass(frozen=True)
class _Samples:
    """Samples of a pipeline."""

    pipeline: Pipeline
    size: int
    sampling: Sampling
    device: torch.device

    @cached_property
    def made_by(self) -> dict[str, str]:
        scheduler = json.dumps(dict(self.pipeline.scheduler.config), sort_keys=True, default=str)
        told = [
            module_digest(self.pipeline.unet),
            family_of(self.pipeline).made_by()["captions"],
            hashlib.sha256(scheduler.encode()).hexdigest(),
        ]
        by = {} if self.sampling.sampler == "ddim" else {"sampler": self.sampling.sampler}
        return by | {
            "teacher": " ".join(told),
            "steps": str(self.sampling.steps),
            "guidance_scale": str(self.sampling.guidance_scale),
            "seed": str(self.sampling.seed),
            "device": self.device.type,
        }

    def draw(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        for module in (self.pipeline.unet, *family_of(self.pipeline).encoders()["captions"]):
            nn.Module.to(module, self.device)
        latents = generate_latents(
            self.pipeline,
            captions,
            [seed_of(self.sampling.seed, "prompt", caption) % 2**63 for caption in captions],
            steps=self.sampling.steps,
            guidance_scale=self.sampling.guidance_scale,
            sampler=self.sampling.sampler,
            size=self.size,
        )
        return latents.float(), torch.zeros_like(latents, dtype=torch.float32)


@dataclass(frozen=True)
class _Random:
    """Standard normal latents, drawn anew in every step: what some published scripts train on."""

    shape: tuple[int, ...]

    @property
    def made_by(self) -> dict[str, str]:
        return {"random": str(self.shape)}

    def draw(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(captions), *self.shape), torch.ones(len(captions), *self.shape)
