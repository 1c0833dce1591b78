"""Prediction types convert into each other for any signal and noise level."""

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from decant.maths.prediction import Prediction, target, to_epsilon, to_x_0

LEVELS = st.floats(0.05, 1.0)
KINDS = st.sampled_from(get_args(Prediction))


def pair(seed: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    x_0, noise = torch.randn(2, 3, 4, 5, 5, generator=made, dtype=torch.float64)
    return x_0, noise


@given(KINDS, LEVELS, LEVELS, st.integers(0, 1000))
def test_a_perfect_answer_gives_back_x_0_and_the_noise(kind: Prediction, alpha: float, sigma: float, seed: int) -> None:
    x_0, noise = pair(seed)
    a, s = torch.tensor(alpha, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64)
    x_t = a * x_0 + s * noise
    answer = target(kind, x_0, noise, a, s)
    torch.testing.assert_close(to_x_0(kind, answer, x_t, a, s), x_0)
    torch.testing.assert_close(to_epsilon(kind, answer, x_t, a, s), noise)


@given(KINDS, LEVELS, LEVELS, st.integers(0, 1000))
def test_any_answer_is_one_point_on_the_line_through_x_t(
    kind: Prediction, alpha: float, sigma: float, seed: int
) -> None:
    """x_0 and noise read from one answer, right or wrong, mix to x_t again."""
    answer, x_t = pair(seed)
    a, s = torch.tensor(alpha, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64)
    mixed = a * to_x_0(kind, answer, x_t, a, s) + s * to_epsilon(kind, answer, x_t, a, s)
    torch.testing.assert_close(mixed, x_t)


@pytest.mark.parametrize("kind", get_args(Prediction))
def test_levels_broadcast_per_sample(kind: Prediction) -> None:
    x_0, noise = pair(0)
    alpha, sigma = (
        torch.tensor([0.9, 0.5, 0.2]).view(3, 1, 1, 1),
        torch.tensor([0.1, 0.5, 0.8]).view(3, 1, 1, 1),
    )
    whole = target(kind, x_0, noise, alpha, sigma)
    for i in range(3):
        torch.testing.assert_close(whole[i], target(kind, x_0[i], noise[i], alpha[i], sigma[i]))
