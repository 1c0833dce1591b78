"""Stochastic rounding to bfloat16: the mean is kept, what bfloat16 holds stays, and signs are alike."""

import pytest
import torch

from decant.maths.rounding import rounding_noise, stochastic_bfloat16
from decant.maths.seeds import generator

N = 200_000


@pytest.mark.parametrize("value", [1.0 + 2**-9, -3.14159, 1e-3, -1.1 * 2.0**-100, 123456.789])
def test_the_mean_of_many_roundings_is_the_number(value: float) -> None:
    x = torch.full((N,), value)
    rounded = stochastic_bfloat16(x, rounding_noise((N,), generator("test", str(value)))).double()
    below, above = rounded.min().item(), rounded.max().item()
    assert below <= value <= above and len(rounded.unique()) == 2, "the two neighbours, and no other"
    gap, p = above - below, (x[0].item() - below) / (above - below)
    error = 5 * gap * (p * (1 - p) / N) ** 0.5
    assert rounded.mean().item() == pytest.approx(x[0].item(), abs=error + gap * 2**-16)


def test_what_bfloat16_holds_and_what_is_not_finite_stay() -> None:
    held = torch.randn(1000, generator=generator("held")).bfloat16()
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")]).bfloat16()
    x = torch.cat([held, special]).float()
    rounded = stochastic_bfloat16(x, torch.full(x.shape, 2**16 - 1, dtype=torch.int32))
    assert rounded[:-1].view(torch.int16).equal(x[:-1].bfloat16().view(torch.int16)) and rounded[-1].isnan()


def test_every_noise_gives_one_of_the_two_neighbours() -> None:
    """Over all 65,536 values of the noise, as many round up as the lower half says: exact, not by chance."""
    x = torch.tensor(1.0) + 2**-7 * torch.tensor(0.25)  # a quarter of the way to the next bfloat16
    noise = torch.arange(2**16, dtype=torch.int32)
    rounded = stochastic_bfloat16(x.expand(2**16).contiguous(), noise)
    assert (rounded == 1 + 2**-7).sum() == 2**14 and (rounded == 1).sum() == 2**16 - 2**14


def test_small_updates_survive_where_rounding_to_nearest_loses_them() -> None:
    steps, update = 2000, 2.0**-13  # a 32nd of the gap between bfloat16 numbers above 1
    nearest, stochastic, noise = torch.ones(64).bfloat16(), torch.ones(64).bfloat16(), generator("walk")
    for _ in range(steps):
        nearest = (nearest.float() + update).bfloat16()
        stochastic = stochastic_bfloat16(stochastic.float() + update, rounding_noise((64,), noise))
    assert (nearest == 1).all()
    assert stochastic.double().mean().item() == pytest.approx(1 + steps * update, rel=0.01)
