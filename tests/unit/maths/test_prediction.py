"""Prediction types convert into each other for any signal and noise level."""

from typing import get_args

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from decant.maths.prediction import Prediction, converted, target, to_epsilon, to_x_0

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


@given(KINDS, KINDS, LEVELS, LEVELS, st.integers(0, 1000))
def test_a_converted_answer_says_the_same(
    given_kind: Prediction, wanted: Prediction, alpha: float, sigma: float, seed: int
) -> None:
    answer, x_t = pair(seed)
    a, s = torch.tensor(alpha, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64)
    other = converted(given_kind, wanted, answer, x_t, a, s)
    torch.testing.assert_close(to_x_0(wanted, other, x_t, a, s), to_x_0(given_kind, answer, x_t, a, s))
    torch.testing.assert_close(converted(wanted, given_kind, other, x_t, a, s), answer)


def test_a_velocity_is_the_one_of_diffusers() -> None:
    """What epsilon says, as v: diffusers' get_velocity of the x_0 and the noise that it stands for."""
    scheduler = DDPMScheduler()
    x_t, epsilon = (part.float() for part in pair(3))
    t = torch.tensor([20, 500, 900])
    kept = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    found = converted("epsilon", "v_prediction", epsilon, x_t, alpha, sigma)
    x_0 = (x_t - sigma * epsilon) / alpha
    torch.testing.assert_close(found, scheduler.get_velocity(x_0, epsilon, t))
