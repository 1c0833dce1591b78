"""Timestep distributions against diffusers' own grids and closed forms."""

import pytest
import torch
from diffusers import DDIMScheduler

from decant.maths.schedules import flow, scaled_linear
from decant.maths.timesteps import log_normal, on_grid, trailing

EVEN = torch.linspace(0, 1, 20_001)[:-1]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 25, 50, 333, 1000])
def test_trailing_is_what_diffusers_samples(count: int) -> None:
    theirs = DDIMScheduler(timestep_spacing="trailing")
    theirs.set_timesteps(count)
    assert trailing(1000, count).tolist() == theirs.timesteps.tolist()


def test_a_grid_is_drawn_from_evenly_and_alone() -> None:
    grid = trailing(1000, 4)
    drawn = on_grid(EVEN, grid)
    assert {int(t): int((drawn == t).sum()) for t in grid} == dict.fromkeys((999, 749, 499, 249), 5000)


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.0, 0.5), (0.5, 1.0)])
def test_log_normal_has_the_mean_and_spread_of_the_noise_level(mean: float, std: float) -> None:
    schedule = scaled_linear(0.00085, 0.012, 1000)
    snr = schedule.snr(torch.arange(1000))
    t = log_normal(EVEN[1:], snr, mean, std)
    level = -0.5 * snr[t].double().log()
    middle = level[(EVEN[1:] > 0.3) & (EVEN[1:] < 0.7)]  # the table ends at both sides
    assert middle.mean().item() == pytest.approx(mean, abs=0.02)
    assert level.median().item() == pytest.approx(mean, abs=0.02)
    inside = (level - mean).abs() < std
    assert inside.double().mean().item() == pytest.approx(0.6827, abs=0.02)


def test_log_normal_stays_on_the_table_whatever_is_drawn() -> None:
    for schedule in (scaled_linear(0.00085, 0.012, 1000), flow(1000)):
        t = log_normal(torch.tensor([0.0, 0.5, 1 - 1e-7]), schedule.snr(torch.arange(1000)), 0.0, 50.0)
        assert t[0] == 0 and t[2] == 999 and (t >= 0).all() and (t < 1000).all()
