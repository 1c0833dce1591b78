"""Knowledge distillation: the student learns the data, the teacher's output, and the teacher's features.

Kim et al. 2023, "BK-SDM: A Lightweight, Fast, and Cheap Version of Stable Diffusion", eqs. 1-3: task, output
and feature terms. Segmind's small and tiny, SSD-1B and Vega are the same with other weights and pairs; with
``guidance_scale`` the output term follows the guided teacher, so that the student needs no guidance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from decant.data.batch import Batch
from decant.losses.feature import feature_mse
from decant.losses.output import mse
from decant.losses.term import Term
from decant.maths.guidance import guide
from decant.maths.prediction import target
from decant.maths.timesteps import uniform
from decant.maths.weights import min_snr
from decant.models.families.family import Family
from decant.models.taps import Tapped, tap
from decant.train.draw import Draw
from decant.train.method import Player

Condition = Mapping[str, Tensor]


@dataclass(frozen=True)
class Knobs:
    """What makes one published recipe of this method differ from another.

    task, output, feature: weights of the terms; one of 0 is not computed. min_snr_gamma: weighs task and
    output by min-SNR. caption_dropout: the share of samples trained without their caption. guidance_scale: of
    the output term's teacher, None for the plain one. ema: decay of the student's average, None for none.
    """

    task: float = 1.0
    output: float = 1.0
    feature: float = 1.0
    min_snr_gamma: float | None = None
    caption_dropout: float = 0.0
    guidance_scale: float | None = None
    ema: float | None = None


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
        teacher: nn.Module,
        pairs: Mapping[str, str],
        knobs: Knobs = Knobs(),
    ) -> "KD":
        """Tap both networks at ``pairs`` (``SurgeryMap.features``), as far as the terms need it.

        Networks already tapped at those modules are taken as they are. Raises UserError for a module that is
        not there.
        """
        pairs = dict(pairs) if knobs.feature else {}
        student = _tapped(student, list(pairs))
        trained = frozenset(name for name, _ in student.named_parameters())
        needs_teacher = knobs.output or pairs
        frozen = {"teacher": _tapped(teacher, list(pairs.values()))} if needs_teacher else {}
        return cls(family, {"student": Player(student, trained, knobs.ema)}, frozen, pairs, knobs)

    def turn(self, step: int) -> str:
        """Always the student's."""
        return "student"

    def terms(self, player: str, nets: Mapping[str, nn.Module], batch: Batch, draw: Draw, step: int) -> Sequence[Term]:
        """``task``, ``output`` and ``feature/<student module>`` of every pair, for one timestep a sample."""
        x_t, t, goal = self._corrupted(batch, draw)
        condition = self._condition(batch, draw)
        # The teacher first: the student's activations do not lie in memory yet.
        taught, inside = self._taught(nets, batch, x_t, t, condition)
        output, features = self._run(nets["student"], x_t, t, condition)
        weight = self._weight(t)
        terms = [Term("task", mse(output, goal), self.knobs.task * weight)] if self.knobs.task else []
        if taught is not None and self.knobs.output:
            terms.append(Term("output", mse(output, taught), self.knobs.output * weight))
        return terms + self._feature_terms(features, inside)

    def _taught(
        self, nets: Mapping[str, nn.Module], batch: Batch, x_t: Tensor, t: Tensor, condition: Condition
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The teacher's output, guided if asked for, and its features; None where no term needs it."""
        if not self.frozen:
            return None, {}
        with torch.inference_mode():
            taught, features = self._run(nets["teacher"], x_t, t, condition)
            if self.knobs.output and self.knobs.guidance_scale is not None:
                unconditional, _ = self._run(nets["teacher"], x_t, t, batch.null)
                taught = guide(taught, unconditional, self.knobs.guidance_scale)
        # A loss keeps its target for the backward pass, which what inference mode makes may not be.
        return taught.clone(), {name: features.pop(name).clone() for name in list(features)}

    def _corrupted(self, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """x_t ``(B, C, h, w)``, t ``(B,)`` and what a perfect student answers ``(B, C, h, w)``."""
        device, shape = batch.mean.device, tuple(batch.mean.shape[1:])
        x_0 = batch.latents(draw.normal("latent", shape).to(device))
        noise = draw.normal("noise", shape).to(device)
        t = uniform(draw.uniform("timestep"), len(self.family.schedule.alpha)).to(device)
        alpha, sigma = self.family.schedule.at(t, x_0.ndim)
        goal = target(self.family.prediction, x_0, noise, alpha, sigma)
        return self.family.corrupt(x_0, noise, t), t, goal

    def _condition(self, batch: Batch, draw: Draw) -> Condition:
        if not self.knobs.caption_dropout:
            return batch.condition
        dropped = draw.uniform("dropout") < self.knobs.caption_dropout
        return {
            name: torch.where(dropped.to(kept.device).view(-1, *(1,) * (kept.ndim - 1)), batch.null[name], kept)
            for name, kept in batch.condition.items()
        }

    def _weight(self, t: Tensor) -> float | Tensor:
        if self.knobs.min_snr_gamma is None:
            return 1.0
        return min_snr(self.family.prediction, self.family.schedule.snr(t), self.knobs.min_snr_gamma)

    def _run(self, net: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, dict[str, Tensor]]:
        answer = self.family.denoise(net, x_t, t, condition)
        return answer if isinstance(answer, tuple) else (answer, {})

    def _feature_terms(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> list[Term]:
        return [
            Term(f"feature/{mine}", feature_mse(student[mine], teacher[theirs]), self.knobs.feature)
            for mine, theirs in self.pairs.items()
        ]


def _tapped(net: nn.Module, names: Sequence[str]) -> nn.Module:
    return net if isinstance(net, Tapped) or not names else tap(net, names)
