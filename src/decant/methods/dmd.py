"""Distribution matching: a student of few steps whose pictures a frozen teacher finds as likely as its own.

Yin et al. 2024, "One-step Diffusion with Distribution Matching Distillation", arXiv 2311.18828, eqs. 7-8; Yin et al.
2024, "Improved Distribution Matching Distillation for Fast Image Synthesis" (DMD2), arXiv 2405.14867: the fake score
learns several times for each update of the student, the student's inputs come from its own sampler, and a discriminator
may sit in the fake score.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from decant.data.batch import Batch
from decant.losses.matching import matching
from decant.losses.output import mse
from decant.losses.term import Term
from decant.maths import timesteps
from decant.maths.guidance import guide
from decant.maths.prediction import Prediction, target, to_x_0
from decant.models.critic import Critic
from decant.models.families.family import Family
from decant.models.roles import act
from decant.train.draw import Draw
from decant.train.method import Player

Condition = Mapping[str, Tensor]
STUDENT, FAKE = "default", "fake"  # the LoRAs of the roles, where one network plays all


@dataclass(frozen=True)
class Knobs:
    """sampler_steps: of the student. guidance_scale: of the teacher. fake_updates: of the fake score for each of the
    student's. fake_lr_scale: its learning rate by the student's. critic: weight of the discriminator's term in the
    student's turn, and fake_critic in the fake's; 0 for none. noise_range: the part of the timesteps at which scores
    are compared. ema: decay of the student's average.
    """

    sampler_steps: int = 4
    guidance_scale: float = 7.5
    fake_updates: int = 5
    fake_lr_scale: float = 1.0
    critic: float = 0.0
    fake_critic: float = 1e-2
    noise_range: tuple[float, float] = (0.02, 0.98)
    ema: float | None = None


@dataclass(frozen=True, eq=False)
class DMD:
    """The method; make it with ``DMD.of`` or, where one network with LoRAs plays all roles, ``DMD.shared``."""

    family: Family
    players: Mapping[str, Player]
    frozen: Mapping[str, nn.Module]
    prediction: Prediction
    knobs: Knobs = Knobs()

    @classmethod
    def of(
        cls,
        family: Family,
        student: nn.Module,
        teacher: nn.Module,
        fake: nn.Module,
        knobs: Knobs = Knobs(),
        prediction: Prediction | None = None,
        trained: Callable[[str], bool] = lambda name: True,
    ) -> "DMD":
        """Three networks. ``fake`` begins as the teacher; it is a `Critic` where there is a discriminator."""
        assert isinstance(fake, Critic) == bool(knobs.critic), "a critic where its opinion counts"
        learns = frozenset(name for name, _ in student.named_parameters() if trained(name))
        players = {
            "student": Player(student, learns, knobs.ema),
            "fake": _fake(fake, frozenset(name for name, _ in fake.named_parameters()), knobs),
        }
        return cls(family, players, {"teacher": teacher}, prediction or family.prediction, knobs)

    @classmethod
    def shared(cls, family: Family, network: nn.Module, knobs: Knobs = Knobs()) -> "DMD":
        """One network with two LoRAs, ``STUDENT`` and ``FAKE``; without either it is the teacher."""
        assert not knobs.critic, "a discriminator has a fake score of its own to sit in"
        names = [name for name, _ in network.named_parameters()]
        mine, fake = (
            frozenset(name for name in names if f".lora_A.{role}." in name or f".lora_B.{role}." in name)
            for role in (STUDENT, FAKE)
        )
        players = {"student": Player(network, mine, knobs.ema), "fake": _fake(network, fake, knobs)}
        return cls(family, players, {}, family.prediction, knobs)

    def turn(self, step: int) -> str:
        """The fake score's, ``fake_updates`` times, then the student's: it learns from what has been caught up."""
        return "student" if step % (self.knobs.fake_updates + 1) == self.knobs.fake_updates else "fake"

    def terms(self, player: str, nets: Mapping[str, nn.Module], batch: Batch, draw: Draw, step: int) -> Sequence[Term]:
        """The student's: ``matching``, and ``adversarial``. The fake's: ``denoising``, and ``critic``."""
        if player == "student":
            terms = self._student_terms(nets, batch, draw)
        else:
            with torch.no_grad():
                drawn = self._drawn(nets, batch, draw)
            terms = self._fake_terms(nets, batch, draw, drawn.clone())
        self._act(
            nets, STUDENT if player == "student" else FAKE
        )  # what is recomputed in the backward pass is this one's
        return terms

    def _student_terms(self, nets: Mapping[str, nn.Module], batch: Batch, draw: Draw) -> list[Term]:
        drawn = self._drawn(nets, batch, draw)
        t, noise = self._level(draw, drawn)
        with torch.no_grad():
            x_t = self.family.corrupt(drawn.detach(), noise, t)
            real = self._real(nets, batch, x_t, t)
            answer, _ = self._score(nets, x_t, t, batch.condition)
            fake = to_x_0(self.family.prediction, answer, x_t, *self._at(t, x_t))
        terms = [Term("matching", matching(drawn, real, fake))]
        if self.knobs.critic:
            _, opinion = self._score(nets, self.family.corrupt(drawn, noise, t), t, batch.condition)
            terms.append(Term("adversarial", softplus(-opinion), self.knobs.critic))
        return terms

    def _fake_terms(self, nets: Mapping[str, nn.Module], batch: Batch, draw: Draw, drawn: Tensor) -> list[Term]:
        t = timesteps.uniform(draw.uniform("timestep"), len(self.family.schedule.alpha)).to(drawn.device)
        noise = draw.normal("noise", tuple(drawn.shape[1:])).to(drawn.device)
        answer, opinion = self._score(nets, self.family.corrupt(drawn, noise, t), t, batch.condition)
        goal = target(self.family.prediction, drawn, noise, *self._at(t, drawn))
        terms = [Term("denoising", mse(answer, goal))]
        if self.knobs.critic:
            x_0 = batch.latents(draw.normal("latent", tuple(drawn.shape[1:])).to(drawn.device))
            _, of_real = self._score(nets, self.family.corrupt(x_0, noise, t), t, batch.condition)
            terms.append(Term("critic", softplus(opinion) + softplus(-of_real), self.knobs.fake_critic))
        return terms

    def _drawn(self, nets: Mapping[str, nn.Module], batch: Batch, draw: Draw) -> Tensor:
        """x_0 ``(B, C, h, w)`` of one of the student's steps, begun where its own sampler would have been.

        Each sample stops at a step of its own; only that step has a gradient. Yin et al. 2024 (DMD2), section 4.5.
        """
        steps, shape = self.knobs.sampler_steps, tuple(batch.mean.shape[1:])
        device = batch.mean.device
        grid = timesteps.trailing(len(self.family.schedule.alpha), steps).to(device)
        stops = timesteps.uniform(draw.uniform("step"), steps).to(device)
        x_t = draw.normal("start", shape).to(device)
        for step in range(steps - 1):
            going = (stops > step).nonzero().flatten()
            noise = draw.normal(f"renoise {step}", shape).to(device)
            if not len(going):
                break
            with torch.no_grad():
                t = grid[step].expand(len(going))
                x_0 = self._student(nets, x_t[going], t, {k: v[going] for k, v in batch.condition.items()})
                x_t = x_t.index_copy(
                    0, going, self.family.corrupt(x_0, noise[going], grid[step + 1].expand(len(going)))
                )
        return self._student(nets, x_t, grid[stops], batch.condition)

    def _student(self, nets: Mapping[str, nn.Module], x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self._act(nets, STUDENT)
        output = self.family.denoise(nets["student"], x_t, t, condition)
        return to_x_0(self.prediction, output, x_t, *self._at(t, x_t))

    def _real(self, nets: Mapping[str, nn.Module], batch: Batch, x_t: Tensor, t: Tensor) -> Tensor:
        """Where the guided teacher would lead, ``(B, C, h, w)``: both halves in one call."""
        both = {name: torch.cat([value, batch.null[name]]) for name, value in batch.condition.items()}
        self._act(nets, None)
        teacher = nets["student" if self._one else "teacher"]
        output = self.family.denoise(teacher, torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        conditional, unconditional = output.chunk(2)
        output = guide(conditional, unconditional, self.knobs.guidance_scale)
        return to_x_0(self.family.prediction, output, x_t, *self._at(t, x_t))

    def _score(
        self, nets: Mapping[str, nn.Module], x_t: Tensor, t: Tensor, condition: Condition
    ) -> tuple[Tensor, Tensor]:
        """The fake score's answer ``(B, C, h, w)``, and the discriminator's opinion ``(B,)``, zeros without one."""
        self._act(nets, FAKE)
        answer = self.family.denoise(nets["fake"], x_t, t, condition)
        if isinstance(answer, tuple):
            return answer[0], answer[1]["opinion"]
        return answer, answer.new_zeros(len(answer))

    def _level(self, draw: Draw, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps ``(B,)`` at which scores are compared, and noise ``(B, C, h, w)``."""
        total = len(self.family.schedule.alpha)
        low, high = (round(part * total) for part in self.knobs.noise_range)
        t = low + timesteps.uniform(draw.uniform("timestep"), high - low)
        return t.to(drawn.device), draw.normal("noise", tuple(drawn.shape[1:])).to(drawn.device)

    def _at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.family.schedule.at(t, like.ndim)

    def _act(self, nets: Mapping[str, nn.Module], role: str | None) -> None:
        if self._one:
            act(nets["student"], role)

    @property
    def _one(self) -> bool:
        """Whether one network plays all roles."""
        return not self.frozen


def _fake(module: nn.Module, parameters: frozenset[str], knobs: Knobs) -> Player:
    return Player(module, parameters, updates_each=knobs.fake_updates, lr_scale=knobs.fake_lr_scale)
