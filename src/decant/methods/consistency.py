"""Latent consistency distillation: the student leads from any point of the guided teacher's way straight to its end.

Luo et al. 2023, "Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference", arXiv
2310.04378, eqs. 12-17, and its LoRA: Luo et al. 2023, "LCM-LoRA", arXiv 2311.05556. Two points of one trajectory, a
step of the teacher's solver apart, must lead to the same end; the one nearer to it is believed, without a gradient.
With phases the way has several ends, one after the other: Wang et al. 2024, "Phased Consistency Models", arXiv
2405.18407, eqs. 4-6.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor, nn

from decant.data.batch import Batch
from decant.losses.output import huber, mse
from decant.losses.term import Term
from decant.maths import timesteps
from decant.maths.consistency import boundary, bridges, ddim_step, guidance_embedding, phase_edges
from decant.maths.guidance import guide
from decant.maths.prediction import Prediction, to_epsilon, to_x_0
from decant.models.families.family import Family
from decant.train.draw import Draw
from decant.train.method import Player, average_of

Condition = Mapping[str, Tensor]
Distance = Literal["mse", "huber"]


@dataclass(frozen=True)
class Knobs:
    """guidance_scale: of the teacher's solver; two numbers: drawn for each sample between them. embedding: width of
    what tells the student its guidance, None for one that is not told. solver_steps: of the teacher's whole way, of
    which a training step bridges one. phases: parts of that way, each with an end of its own. own_way: the part of the
    updates that begin at points which the student itself has come to, from pure noise, and learn where the teacher's
    solver leads from there in own_way_steps to the end of the phase.
    distance: between the two ends. ema: decay of the average that is believed; None
    believes the student itself, as a LoRA does.
    """

    guidance_scale: float | tuple[float, float] = 7.5
    embedding: int | None = None
    solver_steps: int = 50
    phases: int = 1
    own_way: float = 0.0
    own_way_steps: int = 5
    distance: Distance = "huber"
    ema: float | None = None


@dataclass(frozen=True, eq=False)
class Consistency:
    """The method; make it with ``Consistency.of``. prediction: what the student answers."""

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
        knobs: Knobs = Knobs(),
        prediction: Prediction | None = None,
        trained: Callable[[str], bool] = lambda name: True,
    ) -> "Consistency":
        """``trained`` says by its name which of the student's parameters are: all, or those of a LoRA."""
        learns = frozenset(name for name, _ in student.named_parameters() if trained(name))
        player = Player(student, learns, knobs.ema, run_average=knobs.ema is not None)
        return cls(family, {"student": player}, {"teacher": teacher}, prediction or family.prediction, knobs)

    def turn(self, step: int) -> str:
        """Always the student's."""
        return "student"

    def terms(self, player: str, nets: Mapping[str, nn.Module], batch: Batch, draw: Draw, step: int) -> Sequence[Term]:
        """``consistency``: how far apart the ends are that are reached from two points of one trajectory.

        In the updates of the student's own way ``own_way``: from the end that the teacher comes to.
        """
        if int((step + 1) * self.knobs.own_way) > int(step * self.knobs.own_way):
            return [self._own_way(nets, batch, draw)]
        device, shape = batch.mean.device, tuple(batch.mean.shape[1:])
        ways = bridges(len(self.family.schedule.alpha), self.knobs.solver_steps, self.knobs.phases)
        place = timesteps.uniform(draw.uniform("timestep"), len(ways[0]))
        t, t_before, until = (each[place].to(device) for each in ways)
        x_0 = batch.latents(draw.normal("latent", shape).to(device))
        x_t = self.family.corrupt(x_0, draw.normal("noise", shape).to(device), t)
        scale = self._scale(draw).to(device)
        x_before = self._solved(nets["teacher"], batch, x_t, t, t_before, scale)
        told = self._told(batch.condition, scale)
        with torch.no_grad():
            goal = self._end(self._believed(nets), x_before, t_before, until, told).clone()
        end = self._end(nets["student"], x_t, t, until, told)
        return [Term("consistency", self._distance(end, goal))]

    def _own_way(self, nets: Mapping[str, nn.Module], batch: Batch, draw: Draw) -> Term:
        """From where the student begins one of its steps, the phases equally likely, to where it should end."""
        phases, steps, device = self.knobs.phases, self.knobs.own_way_steps, batch.mean.device
        edges = phase_edges(len(self.family.schedule.alpha), phases).to(device)
        phase, scale = draw.integers("phase", phases).to(device), self._scale(draw).to(device)
        told = self._told(batch.condition, scale)
        x_t = draw.normal("noise", tuple(batch.mean.shape[1:])).to(device)
        for number in range(1, phases):
            here, there = (edges[each].expand(len(phase)) for each in (number - 1, number))
            with torch.no_grad():
                on = self._end(self._believed(nets), x_t, here, there, told)
            x_t = torch.where((phase >= number).view(-1, *(1,) * (x_t.ndim - 1)), on, x_t)
        t, end = edges[phase], edges[phase + 1]
        goal, here = x_t, t
        for number in range(1, steps + 1):
            there = (t - ((t - end) * number / steps).round().to(t.dtype)).clamp(min=0)
            goal, here = self._solved(nets["teacher"], batch, goal, here, there, scale), there
        return Term("own_way", self._distance(self._end(nets["student"], x_t, t, here, told), goal))

    def _believed(self, nets: Mapping[str, nn.Module]) -> nn.Module:
        return nets[average_of("student")] if self.knobs.ema is not None else nets["student"]

    def _solved(
        self, teacher: nn.Module, batch: Batch, x_t: Tensor, t: Tensor, t_before: Tensor, scale: Tensor
    ) -> Tensor:
        """The point that the guided teacher's solver comes to at ``t_before``: both halves in one call."""
        schedule, kind = self.family.schedule, self.family.prediction
        both = {name: torch.cat([value, batch.null[name]]) for name, value in batch.condition.items()}
        with torch.inference_mode():
            output = self.family.denoise(teacher, torch.cat([x_t, x_t]), torch.cat([t, t]), both)
            conditional, unconditional = output.chunk(2)
            output = guide(conditional, unconditional, scale.view(-1, *(1,) * (x_t.ndim - 1)))
            here, there = schedule.at(t, x_t.ndim), schedule.at(t_before, x_t.ndim)
            x_0, noise = to_x_0(kind, output, x_t, *here), to_epsilon(kind, output, x_t, *here)
            solved = ddim_step(x_0, noise, *there)
        return solved.clone()

    def _end(self, net: nn.Module, x_t: Tensor, t: Tensor, until: Tensor, told: Condition) -> Tensor:
        """The consistency function: where ``x_t`` leads, ``(B, C, h, w)``; with phases, at the timesteps ``until``."""
        output, schedule = self.family.denoise(net, x_t, t, told), self.family.schedule
        here = schedule.at(t, x_t.ndim)
        x_0 = to_x_0(self.prediction, output, x_t, *here)
        if self.knobs.phases > 1:
            noise = to_epsilon(self.prediction, output, x_t, *here)
            return ddim_step(x_0, noise, *schedule.at(until, x_t.ndim))
        c_skip, c_out = boundary(t, x_t.ndim)
        return c_skip * x_t + c_out * x_0

    def _scale(self, draw: Draw) -> Tensor:
        """The guidance of every sample, ``(B,)``."""
        scale = self.knobs.guidance_scale
        if isinstance(scale, tuple):
            low, high = scale
            return low + (high - low) * draw.uniform("guidance")
        return torch.full((len(draw.samples),), float(scale))

    def _told(self, condition: Condition, scale: Tensor) -> Condition:
        if self.knobs.embedding is None:
            return condition
        return {**condition, "timestep_cond": guidance_embedding(scale, self.knobs.embedding)}

    def _distance(self, end: Tensor, goal: Tensor) -> Tensor:
        match self.knobs.distance:
            case "mse":
                return mse(end, goal)
            case "huber":
                return huber(end, goal)
            case _:
                assert_never(self.knobs.distance)
