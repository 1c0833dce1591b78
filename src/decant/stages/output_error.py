"""How far a student's output is from its teacher's on given pictures: the proof that needs no checker."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from decant.data.latents import Latents
from decant.losses.output import mse
from decant.models.families.family import Family
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
    family: Family, student: nn.Module, teacher: nn.Module, data: Latents, seed: int, batch_size: int = 16
) -> OutputError:
    """MSE between raw outputs at the same x_t, t and caption, at four noise levels a picture, (n,).

    The noise, and a timestep in each quarter of the schedule, are drawn from (seed, level, picture): the same for every
    student that is compared.
    """
    was = student.training, teacher.training
    student.eval()
    teacher.eval()
    proof, sums = Calibration(family, data, seed, "proof"), torch.zeros(data.n)
    for call in proof.calls(next(student.parameters()).device, batch_size):
        sums[list(call.batch.samples)] += mse(proof.answer(student, call), proof.answer(teacher, call)).cpu()
    student.train(was[0])
    teacher.train(was[1])
    return OutputError(sums / LEVELS)
