"""Take out steps and guidance by matching the teacher's distribution: one to four steps."""

import copy
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from decant.errors import UnfitError, refuse
from decant.methods.dmd import DMD, FAKE, Knobs
from decant.models.critic import Critic
from decant.models.samplers import Drawing, Sampler
from decant.models.surgery.features import innermost
from decant.models.taps import tap
from decant.stages.few_steps import few_steps
from decant.stages.lora import add_lora, is_lora
from decant.stages.players import Players
from decant.stages.stage import Inputs, Stage
from decant.stages.training_settings import Scale, Training


class DmdSettings(Training):
    """How to distil by distribution matching. Defaults are DMD2's, but for the batch."""

    learning_rate: float = Field(1e-5, gt=0, description="of AdamW, at its highest")
    teacher_guidance_scale: Scale = Field(7.5, description="of the teacher whose distribution is matched")
    fake_updates: int = Field(5, ge=1, description="of the fake score for each of the student's")
    fake_learning_rate: float | None = Field(None, gt=0, description="of the fake score; null: the student's")
    critic: float = Field(
        0.0, ge=0, description="weight of a discriminator in the fake score, which sees the pictures; 0: none"
    )
    fake_critic: float = Field(1e-2, gt=0, description="weight of the discriminator's own loss")
    roles: Literal["apart", "shared"] = Field(
        "apart", description="shared: one network, with a LoRA for the student and one for the fake score"
    )
    sample_steps: int = Field(4, ge=1, le=16, description="sampler steps that the student is made for")
    sampler: Sampler | None = Field("lcm-trailing", description="what the student's folder says it is sampled by")

    @model_validator(mode="after")
    def _shared(self) -> Self:
        if self.roles == "shared" and self.lora is None:
            hint = "set lora too, such as lora.rank=64"
            raise UnfitError("roles", "shared", allowed="apart: shared roles are LoRAs of one network", hint=hint)
        if self.roles == "shared" and self.critic:
            allowed = "0 of shared roles: a discriminator has a fake score of its own to sit in"
            raise UnfitError("critic", self.critic, allowed=allowed, hint="set roles=apart, or critic=0")
        return self


def run(settings: DmdSettings, inputs: Inputs, out: Path) -> dict[str, Any]:
    """Train the student in ``inputs.source`` towards ``inputs.teacher``; writes the student's pipeline folder."""
    student = Drawing(settings.sample_steps, 1.0, "as-is")
    return few_steps(settings, inputs, out, student, lambda them: (them, _method(settings, them, inputs.seed)))


def _method(settings: DmdSettings, players: Players, seed: int) -> DMD:
    fake_lr = settings.fake_learning_rate or settings.learning_rate
    knobs = Knobs(
        sampler_steps=settings.sample_steps,
        guidance_scale=settings.teacher_guidance_scale,
        fake_updates=settings.fake_updates,
        fake_lr_scale=fake_lr / settings.learning_rate,
        critic=settings.critic,
        fake_critic=settings.fake_critic,
        ema=settings.ema,
    )
    student, teacher = players.student, players.teacher.unet
    if settings.roles == "shared":
        assert settings.lora is not None, "the door has seen to it"
        _check_twin(student, teacher)
        add_lora(student, settings.lora, seed + 1, FAKE)
        return DMD.shared(players.family, student, knobs)
    fake: nn.Module = copy.deepcopy(teacher)
    if settings.critic:
        place, channels = innermost(dict(teacher.config))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fake = Critic(tap(fake, [place]), channels)
    trained = is_lora if settings.lora is not None else lambda name: True
    return DMD.of(players.family, student, teacher, fake, knobs, prediction=players.prediction, trained=trained)


def _check_twin(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a student that is not, without its LoRA, the teacher itself."""
    own = {name.replace(".base_layer", ""): p for name, p in student.named_parameters() if not is_lora(name)}
    theirs = dict(teacher.named_parameters())
    if own.keys() != theirs.keys() or any(not torch.equal(own[name], theirs[name]) for name in theirs):
        hint = "start from the teacher, or set roles=apart"
        raise refuse("roles", "shared, with a student that is not the teacher", allowed="the teacher itself", hint=hint)


STAGE = Stage(settings=DmdSettings, run=run, data="required", ranks="all")
