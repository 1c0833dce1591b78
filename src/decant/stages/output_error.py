"""How far a student's output is from its teacher's on given pictures: the proof that needs no checker."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from decant.data.latents import Latents
from decant.losses.output import mse
from decant.models.families.family import Family
from decant.train.draw import Draw

_LEVELS = 4


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
    errors = [
        _of_batch(family, student, teacher, data, seed, tuple(range(start, min(start + batch_size, data.n))))
        for start in range(0, data.n, batch_size)
    ]
    student.train(was[0])
    teacher.train(was[1])
    return OutputError(torch.cat(errors))


def _of_batch(
    family: Family, student: nn.Module, teacher: nn.Module, data: Latents, seed: int, places: tuple[int, ...]
) -> Tensor:
    device = next(student.parameters()).device
    batch = data.batch(places).to(device)
    total = len(family.schedule.alpha)
    sums = torch.zeros(len(places))
    for level in range(_LEVELS):
        draw = Draw(seed, level, places)
        shape = tuple(batch.mean.shape[1:])
        t = ((level + draw.uniform("proof timestep")) * total / _LEVELS).long().to(device)
        noise = draw.normal("proof noise", shape).to(device)
        x_t = family.corrupt(batch.latents(draw.normal("proof latent", shape).to(device)), noise, t)
        ours = family.denoise(student, x_t, t, batch.condition)
        theirs = family.denoise(teacher, x_t, t, batch.condition)
        sums += mse(ours, theirs).cpu()
    return sums / _LEVELS
