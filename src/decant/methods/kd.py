"""Knowledge distillation: the student learns the data, the teacher's output, and the teacher's features.

Kim et al. 2023, "BK-SDM: A Lightweight, Fast, and Cheap Version of Stable Diffusion", eqs. 1-3: task, output
and feature terms. Segmind's small and tiny, SSD-1B and Vega, KOALA are the same with other weights, pairs and
teachers; with ``guidance_scale`` the output term follows the guided teacher, so that the student needs no guidance.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, assert_never

import torch
from torch import Tensor, nn

from decant.data.batch import Batch
from decant.losses.cosine import cosine_distance
from decant.losses.output import huber, mse
from decant.losses.term import Term
from decant.maths import timesteps
from decant.maths.consistency import ddim_step
from decant.maths.guidance import guide
from decant.maths.prediction import Prediction, converted, target, to_epsilon, to_x_0
from decant.maths.ramp import Ramp, ever, value_at
from decant.maths.weights import min_snr
from decant.models.families.family import Family
from decant.models.projection import Projected, Projection
from decant.models.taps import Tapped, tap
from decant.train.draw import Draw
from decant.train.method import Player

Condition = Mapping[str, Tensor]
Distance = Literal["mse", "huber", "cosine"]


@dataclass(frozen=True)
class Timesteps:
    """Where timesteps are drawn from. uniform: all. trailing: ``count`` of them, which may shrink with the run (a
    progressive chain). own_way: the same, and x_t is not a noisy picture but what the teacher's own steps of DDIM come
    to from pure noise. log_normal: by noise level, ``mean`` and ``std`` of ln(sigma).
    """

    kind: Literal["uniform", "trailing", "own_way", "log_normal"] = "uniform"
    count: float | Ramp = 1000
    mean: float = -1.2
    std: float = 1.2


@dataclass(frozen=True)
class Knobs:
    """What makes one published recipe of this method differ from another.

    task, output, feature: weights of the terms, which may follow the run; one that is 0 from first to last is not
    computed. output_distance, feature_distance: how far apart two answers are; the task's is always the squared error.
    min_snr_gamma: weighs task and output by min-SNR, and the features too with feature_snr. caption_dropout: the share
    of samples trained without their caption. guidance_scale: of the output term's teacher, None for the plain one; two
    numbers: drawn for each sample between them. timesteps: see `Timesteps`. steps: of the whole run, for what follows
    it. switches: with several teachers, the steps at which the second, third, ... takes over. prediction: what the
    student answers, None for the same as the teacher; where it is another, the teacher's answer is converted.
    compared_as: what both outputs are turned into for the output term, None for what the student answers. ema: decay of
    the student's average, None for none.
    """

    task: float | Ramp = 1.0
    output: float | Ramp = 1.0
    feature: float | Ramp = 1.0
    output_distance: Distance = "mse"
    feature_distance: Distance = "mse"
    min_snr_gamma: float | None = None
    feature_snr: bool = False
    caption_dropout: float | Ramp = 0.0
    guidance_scale: float | tuple[float, float] | None = None
    timesteps: Timesteps = Timesteps()
    steps: int = 1
    switches: tuple[int, ...] = ()
    prediction: Prediction | None = None
    compared_as: Prediction | None = None
    ema: float | None = None

    def progress(self, step: int) -> float:
        """How much of the run is over at update ``step``, counted from 0: 0 at the first, 1 at the last."""
        return min(1.0, step / max(1, self.steps - 1))


@dataclass(frozen=True, eq=False)
class KD:
    """The method; make it with ``KD.of``.

    pairs: student module -> teacher module whose outputs a feature term compares; empty without feature
    terms.
    """

    family: Family
    players: Mapping[str, Player]
    frozen: Mapping[str, nn.Module]
    pairs: Mapping[str, str] = field(default_factory=dict)
    knobs: Knobs = Knobs()

    @classmethod
    def of(
        cls,
        family: Family,
        student: nn.Module,
        teachers: nn.Module | Sequence[nn.Module],
        pairs: Mapping[str, str],
        knobs: Knobs = Knobs(),
        projections: Mapping[str, Projection] | None = None,
        trained: Callable[[str], bool] = lambda name: True,
    ) -> "KD":
        """Tap the networks at ``pairs`` (``SurgeryMap.features``), as far as the terms need it.

        ``projections`` are trained beside the student, by the student module whose feature they map. ``trained`` says
        by its name which of the student's parameters are trained: all, or those of a LoRA. Networks already tapped at
        those modules are taken as they are. Raises UserError for a module that is not there.
        """
        teachers = [teachers] if isinstance(teachers, nn.Module) else list(teachers)
        assert len(knobs.switches) == len(teachers) - 1, "one switch fewer than teachers"
        pairs = dict(pairs) if ever(knobs.feature) else {}
        student = _tapped(student, list(pairs))
        if pairs and projections:
            assert isinstance(student, Tapped)
            student = Projected(student, projections)
        learns = frozenset(name for name, _ in student.named_parameters() if "projections." in name or trained(name))
        needed = teachers if ever(knobs.output) or pairs else []
        frozen = {_teacher_name(n): _tapped(each, list(pairs.values())) for n, each in enumerate(needed)}
        return cls(family, {"student": Player(student, learns, knobs.ema)}, frozen, pairs, knobs)

    def turn(self, step: int) -> str:
        """Always the student's."""
        return "student"

    def terms(self, player: str, nets: Mapping[str, nn.Module], batch: Batch, draw: Draw, step: int) -> Sequence[Term]:
        """``task``, ``output`` and ``feature/<student module>`` of every pair, for one timestep a sample; on the
        teacher's own way for all of its timesteps, their mean.
        """
        progress = self.knobs.progress(step)
        condition = self._condition(batch, draw, value_at(self.knobs.caption_dropout, progress))
        if self.knobs.timesteps.kind == "own_way":
            points = self._own_way(nets, batch, draw, condition, step)
            return [_folded(term, len(points)) for term in self._terms(nets, _joined(points), progress)]
        x_t, t, goal = self._corrupted(batch, draw, progress)
        # The teacher first: the student's activations do not lie in memory yet.
        taught, inside = self._taught(nets, batch, draw, x_t, t, condition, step)
        return self._terms(nets, _Asked(x_t, t, condition, taught, inside, goal), progress)

    def _terms(self, nets: Mapping[str, nn.Module], asked: "_Asked", progress: float) -> list[Term]:
        knobs, x_t, t = self.knobs, asked.x_t, asked.t
        output, features = self._run(nets["student"], x_t, t, asked.condition)
        weight, terms = self._weight(t), []
        if ever(knobs.task):
            assert asked.goal is not None, "the door has seen to a picture"
            terms.append(Term("task", mse(output, asked.goal), value_at(knobs.task, progress) * weight))
        if asked.taught is not None and ever(knobs.output):
            apart = self._output_distance(output, asked.taught, x_t, t)
            terms.append(Term("output", apart, value_at(knobs.output, progress) * weight))
        return terms + self._feature_terms(features, asked.inside, weight, value_at(knobs.feature, progress))

    def _taught(
        self,
        nets: Mapping[str, nn.Module],
        batch: Batch,
        draw: Draw,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        step: int,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The teacher's output, guided if asked for, and its features; None where no term needs it."""
        if not self.frozen:
            return None, {}
        teacher = nets[self._teacher_at(step)]
        with torch.inference_mode():
            if ever(self.knobs.output) and self.knobs.guidance_scale is not None:
                taught, features = self._guided(teacher, batch, draw, x_t, t, condition)
            else:
                taught, features = self._run(teacher, x_t, t, condition)
        # A loss keeps its target for the backward pass, which what inference mode makes may not be.
        return taught.clone(), {name: features.pop(name).clone() for name in list(features)}

    def _teacher_at(self, step: int) -> str:
        return _teacher_name(sum(step >= switch for switch in self.knobs.switches))

    def _own_way(
        self, nets: Mapping[str, nn.Module], batch: Batch, draw: Draw, condition: Condition, step: int
    ) -> list["_Asked"]:
        """Where each of the teacher's own steps of DDIM begins, from pure noise on, and what it answers there."""
        schedule, kind = self.family.schedule, self.family.prediction
        count = round(value_at(self.knobs.timesteps.count, self.knobs.progress(step)))
        way = timesteps.trailing(len(schedule.alpha), min(len(schedule.alpha), count)).to(batch.mean.device)
        x_t, points = draw.normal("noise", tuple(batch.mean.shape[1:])).to(batch.mean.device), list[_Asked]()
        for number, timestep in enumerate(way):
            t = timestep.expand(len(x_t))
            taught, inside = self._taught(nets, batch, draw, x_t, t, condition, step)
            assert taught is not None, "the door has seen to a teacher"
            points.append(_Asked(x_t, t, condition, taught, inside))
            at, there = schedule.at(t, x_t.ndim), schedule.at(way[number + 1 : number + 2], x_t.ndim)
            if number + 1 < len(way):
                x_t = ddim_step(to_x_0(kind, taught, x_t, *at), to_epsilon(kind, taught, x_t, *at), *there)
        return points

    def _guided(
        self, teacher: nn.Module, batch: Batch, draw: Draw, x_t: Tensor, t: Tensor, condition: Condition
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Both halves in one call; features are those of the conditional half."""
        both = {name: torch.cat([value, batch.null[name]]) for name, value in condition.items()}
        output, features = self._run(teacher, torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        conditional, unconditional = output.chunk(2)
        scale = self._scale(draw)
        scale = scale.to(output).view(-1, 1, 1, 1) if isinstance(scale, Tensor) else scale
        taught = guide(conditional, unconditional, scale)
        return taught, {name: feature[: len(x_t)] for name, feature in features.items()}

    def _scale(self, draw: Draw) -> float | Tensor:
        scale = self.knobs.guidance_scale
        assert scale is not None
        if isinstance(scale, tuple):
            low, high = scale
            return low + (high - low) * draw.uniform("guidance")
        return scale

    def _corrupted(self, batch: Batch, draw: Draw, progress: float) -> tuple[Tensor, Tensor, Tensor]:
        """x_t ``(B, C, h, w)``, t ``(B,)`` and what a perfect student answers ``(B, C, h, w)``."""
        device, shape = batch.mean.device, tuple(batch.mean.shape[1:])
        x_0 = batch.latents(draw.normal("latent", shape).to(device))
        noise = draw.normal("noise", shape).to(device)
        t = self._timesteps(draw.uniform("timestep"), progress).to(device)
        alpha, sigma = self.family.schedule.at(t, x_0.ndim)
        goal = target(self.prediction, x_0, noise, alpha, sigma)
        return self.family.corrupt(x_0, noise, t), t, goal

    @property
    def prediction(self) -> Prediction:
        """What the student answers."""
        return self.knobs.prediction or self.family.prediction

    def _output_distance(self, output: Tensor, taught: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """(B,) between the student's output and the teacher's, both as the same prediction."""
        alpha, sigma = self.family.schedule.at(t, x_t.ndim)
        kind = self.knobs.compared_as or self.prediction
        mine = converted(self.prediction, kind, output, x_t, alpha, sigma)
        return _distance(self.knobs.output_distance)(
            mine, converted(self.family.prediction, kind, taught, x_t, alpha, sigma)
        )

    def _timesteps(self, u: Tensor, progress: float) -> Tensor:
        how, total = self.knobs.timesteps, len(self.family.schedule.alpha)
        match how.kind:
            case "uniform":
                return timesteps.uniform(u, total)
            case "trailing":
                count = min(total, round(value_at(how.count, progress)))
                return timesteps.on_grid(u, timesteps.trailing(total, count))
            case "own_way":
                raise AssertionError("its timesteps come with its points")
            case "log_normal":
                snr = self.family.schedule.snr(torch.arange(total))
                return timesteps.log_normal(u, snr, how.mean, how.std)
            case _:
                assert_never(how.kind)

    def _condition(self, batch: Batch, draw: Draw, dropout: float) -> Condition:
        if not dropout:
            return batch.condition
        dropped = draw.uniform("dropout") < dropout
        return {
            name: torch.where(dropped.to(kept.device).view(-1, *(1,) * (kept.ndim - 1)), batch.null[name], kept)
            for name, kept in batch.condition.items()
        }

    def _weight(self, t: Tensor) -> float | Tensor:
        if self.knobs.min_snr_gamma is None:
            return 1.0
        return min_snr(self.prediction, self.family.schedule.snr(t), self.knobs.min_snr_gamma)

    def _run(self, net: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, dict[str, Tensor]]:
        answer = self.family.denoise(net, x_t, t, condition)
        return answer if isinstance(answer, tuple) else (answer, {})

    def _feature_terms(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], snr: float | Tensor, weight: float
    ) -> list[Term]:
        distance = _distance(self.knobs.feature_distance)
        weighted = weight * snr if self.knobs.feature_snr else weight
        return [
            Term(f"feature/{mine}", distance(student[mine], teacher[theirs]), weighted)
            for mine, theirs in self.pairs.items()
        ]


@dataclass(frozen=True)
class _Asked:
    """Points ``x_t`` ``(B, C, h, w)`` at ``t`` ``(B,)``, what the teacher answers there, and a perfect student."""

    x_t: Tensor
    t: Tensor
    condition: Condition
    taught: Tensor | None
    inside: Mapping[str, Tensor]
    goal: Tensor | None = None


def _joined(points: Sequence[_Asked]) -> _Asked:
    """All points of all samples in one batch: the first of each sample, then the second of each, and so on."""
    taught = [point.taught for point in points if point.taught is not None]
    return _Asked(
        torch.cat([point.x_t for point in points]),
        torch.cat([point.t for point in points]),
        {name: torch.cat([point.condition[name] for point in points]) for name in points[0].condition},
        torch.cat(taught),
        {name: torch.cat([point.inside[name] for point in points]) for name in points[0].inside},
    )


def _folded(term: Term, points: int) -> Term:
    """A term of all points as one of the samples: the mean over those of each."""
    if isinstance(term.weight, Tensor) and term.weight.ndim:
        return Term(term.name, term.weighted.view(points, -1).mean(0))
    return Term(term.name, term.value.view(points, -1).mean(0), term.weight)


def _distance(kind: Distance) -> Callable[[Tensor, Tensor], Tensor]:
    match kind:
        case "mse":
            return mse
        case "huber":
            return huber
        case "cosine":
            return cosine_distance
        case _:
            assert_never(kind)


def _teacher_name(number: int) -> str:
    return "teacher" if number == 0 else f"teacher-{number + 1}"


def _tapped(net: nn.Module, names: Sequence[str]) -> nn.Module:
    return net if isinstance(net, Tapped) or not names else tap(net, names)
