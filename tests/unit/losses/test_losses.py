"""Losses give one number a sample, equal to torch's own on that sample."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import mse_loss

from decant.losses.cosine import cosine_distance
from decant.losses.output import huber, mse
from decant.losses.term import Term

SHAPES = st.sampled_from([(1, 4, 8, 8), (3, 4, 5, 7), (2, 77, 16), (4, 9)])


def two(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, *shape, generator=made)
    return a.to(dtype), b.to(dtype)


@given(SHAPES)
def test_mse_is_torchs_on_every_sample(shape: tuple[int, ...]) -> None:
    a, b = two(shape)
    expected = torch.stack([mse_loss(x, y) for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(mse(a, b), expected)


def test_half_precision_is_computed_in_float32() -> None:
    a, b = two((2, 4, 8, 8), torch.float16)
    a = a + 300  # its square overflows float16
    assert mse(a, b).dtype == torch.float32
    assert mse(a, b).isfinite().all() and cosine_distance(a, b).isfinite().all() and huber(a, b).isfinite().all()


def test_huber_is_quadratic_near_zero_and_linear_far_away() -> None:
    zero, c = torch.zeros(1, 1), 0.1
    near, far = torch.full((1, 1), 1e-3), torch.full((1, 1), 1e3)
    torch.testing.assert_close(huber(near, zero, c), near[0] ** 2 / (2 * c), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(huber(far, zero, c), far[0] - c)
    assert huber(zero, zero, c).item() == 0


@given(st.sampled_from([(3, 4, 5, 7), (2, 77, 16)]), st.floats(0.1, 10))
def test_cosine_sees_directions_and_not_lengths(shape: tuple[int, ...], length: float) -> None:
    a, b = two(shape)
    zero, two_ = torch.zeros(shape[0]), torch.full((shape[0],), 2.0)
    torch.testing.assert_close(cosine_distance(a, length * a), zero, rtol=0, atol=1e-5)
    torch.testing.assert_close(cosine_distance(a, -length * a), two_, rtol=0, atol=1e-5)
    channels = [x.flatten(2).mT.flatten(0, 1) if x.ndim == 4 else x.flatten(0, 1) for x in (a, b)]
    by_hand = 1 - (channels[0] * channels[1]).sum(1) / (channels[0].norm(dim=1) * channels[1].norm(dim=1))
    torch.testing.assert_close(cosine_distance(a, b), by_hand.view(shape[0], -1).mean(1))


@pytest.mark.parametrize("loss", [mse, huber, cosine_distance])
def test_shapes_that_would_broadcast_are_stopped(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError):
        loss(torch.zeros(2, 4, 8, 8), torch.zeros(2, 1, 8, 8))


def test_a_term_holds_one_value_and_one_weight_a_sample() -> None:
    term = Term("task", torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.5]))
    assert term.weighted.tolist() == [3.0, 1.0]
    with pytest.raises(AssertionError, match="task"):
        Term("task", torch.tensor(1.0))
    with pytest.raises(AssertionError, match="task"):
        Term("task", torch.zeros(2), torch.zeros(2, 1))
