"""Zeroing the smallest weights, against sorting."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from decant.models.sparsity import without_smallest, zeros


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 0.99), st.integers(0, 99))
def test_just_the_smallest_become_zero(rows: int, columns: int, ratio: float, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    (after,) = without_smallest({"w": weight}, ratio).values()
    count = int(ratio * weight.numel())
    order = weight.abs().flatten().argsort()
    assert not after.flatten()[order[:count]].any()
    assert torch.equal(after.flatten()[order[count:]], weight.flatten()[order[count:]])
    assert zeros({"w": after}) == (count, weight.numel())


def test_biases_and_norms_stay_and_nothing_is_changed_in_place() -> None:
    weights = {"weight": torch.tensor([[1.0, -0.1], [0.2, -3.0]]), "bias": torch.tensor([1e-9, 1.0])}
    after = without_smallest(weights, 0.5)
    assert after["weight"].tolist() == [[1.0, 0.0], [0.0, -3.0]] and torch.equal(after["bias"], weights["bias"])
    assert weights["weight"][0, 1] == torch.tensor(-0.1)


def test_a_tensor_as_large_as_the_published_networks_have() -> None:
    """`torch.quantile` refuses more than 2**24 numbers in versions that people use."""
    weight = torch.arange(1, 2**24 + 3, dtype=torch.float64).view(2, -1)
    (after,) = without_smallest({"w": weight}, 0.5).values()
    assert int((after == 0).sum()) == weight.numel() // 2


def test_half_precision_keeps_its_dtype() -> None:
    (after,) = without_smallest({"w": torch.randn(8, 8).half()}, 0.3).values()
    assert after.dtype == torch.float16 and int((after == 0).sum()) == 19
