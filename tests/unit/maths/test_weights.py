"""SNR weights, guidance and timesteps against their definitions."""

from math import sqrt
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decant.maths.guidance import guide
from decant.maths.prediction import Prediction, to_x_0
from decant.maths.timesteps import uniform
from decant.maths.weights import min_snr


def levels(kind: Prediction, snr: float) -> tuple[float, float]:
    """alpha, sigma of this SNR on the path the prediction type is used with."""
    if kind == "flow":
        sigma = 1 / (1 + sqrt(snr))
        return 1 - sigma, sigma
    return sqrt(snr / (1 + snr)), sqrt(1 / (1 + snr))


@given(st.sampled_from(get_args(Prediction)), st.floats(1e-3, 1e3), st.floats(0.5, 20))
def test_min_snr_is_the_weighted_error_of_x_0(kind: Prediction, snr: float, gamma: float) -> None:
    """Definition: weight * |error of the output|^2 = min(SNR, gamma) * |error of x_0|^2."""
    alpha, sigma = (torch.tensor(level, dtype=torch.float64) for level in levels(kind, snr))
    x_t, output, wrong = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = to_x_0(kind, output + wrong, x_t, alpha, sigma) - to_x_0(kind, output, x_t, alpha, sigma)
    weight = min_snr(kind, torch.tensor([snr], dtype=torch.float64), gamma)
    expected = min(snr, gamma) * moved.square().sum() / wrong.square().sum()
    torch.testing.assert_close(weight, expected[None])


@pytest.mark.parametrize("kind", get_args(Prediction))
def test_min_snr_is_finite_at_pure_noise_and_at_none(kind: Prediction) -> None:
    assert min_snr(kind, torch.tensor([0.0, 1e-12, 1e12]), 5.0).isfinite().all()


def test_min_snr_by_the_published_formulas() -> None:
    snr = torch.tensor([0.5, 5.0, 50.0])
    torch.testing.assert_close(min_snr("epsilon", snr, 5.0), torch.tensor([1.0, 1.0, 0.1]))
    torch.testing.assert_close(min_snr("v_prediction", snr, 5.0), torch.tensor([0.5 / 1.5, 5 / 6, 5 / 51]))
    torch.testing.assert_close(min_snr("sample", snr, 5.0), torch.tensor([0.5, 5.0, 5.0]))


@given(st.floats(-5, 15))
def test_guidance_extrapolates_from_the_unconditional(scale: float) -> None:
    conditional, unconditional = torch.tensor([3.0]), torch.tensor([1.0])
    torch.testing.assert_close(guide(conditional, unconditional, scale), torch.tensor([1.0 + 2.0 * scale]))


def test_uniform_timesteps_reach_both_ends_and_no_further() -> None:
    edge = torch.tensor([0.0, 1 - 2**-24])
    for steps in (1, 4, 1000, 10**8):
        low, high = uniform(edge, steps).tolist()
        assert low == 0 and steps - 1 - steps * 2**-23 <= high <= steps - 1


def test_uniform_timesteps_are_equally_likely() -> None:
    counts = uniform(torch.arange(4000) / 4000, 8).bincount()
    assert counts.tolist() == [500] * 8
