"""How far a student's output is from its teacher's on given pictures: the proof that needs no checker."""

from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from decant.data.latents import Latents
from decant.losses.output import mse
from decant.maths.prediction import Prediction, converted
from decant.models.families.family import Family
from decant.ranks import ALONE, Ranks
from decant.stages.calibrate import LEVELS, Calibration


@dataclass(frozen=True)
class OutputError:
    """Mean squared difference of two networks' outputs, by picture."""

    by_picture: Tensor

    @property
    def mean(self) -> float:
        return float(self.by_picture.mean())


@torch.no_grad()
def output_error(
    family: Family,
    student: nn.Module,
    teacher: nn.Module,
    data: Latents,
    seed: int,
    batch_size: int = 16,
    prediction: Prediction | None = None,
    ranks: Ranks = ALONE,
) -> OutputError:
    """MSE between outputs at the same x_t, t and caption, at four noise levels a picture, (n,).

    ``prediction``: what the student answers, where it is not what the teacher does; it is compared as the teacher's.

    The noise, and a timestep in each quarter of the schedule, are drawn from (seed, level, picture): the same for every
    student that is compared.
    """
    was = student.training, teacher.training
    student.eval()
    teacher.eval()
    proof, levels = Calibration(family, data, seed, "proof"), torch.zeros(LEVELS, data.n)
    calls = proof.calls(next(student.parameters()).device, batch_size)
    for call in islice(calls, ranks.rank, None, ranks.count):  # the calls of one process, dealt in turns
        places = list(call.batch.samples)
        alpha, sigma = family.schedule.at(call.t, call.x_t.ndim)
        given = prediction or family.prediction
        mine = converted(given, family.prediction, proof.answer(student, call), call.x_t, alpha, sigma)
        levels[call.level, places] = mse(mine, proof.answer(teacher, call)).cpu()
    sums = torch.zeros(data.n)
    for level in torch.stack(ranks.gathered(levels)).sum(0):
        sums += level
    student.train(was[0])
    teacher.train(was[1])
    return OutputError(sums / LEVELS)
