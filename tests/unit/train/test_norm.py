"""The norm of many tensors, small and large."""

import pytest
import torch

from decant.train.norm import norm_of


@pytest.mark.parametrize("sizes", [(1,), (3, 5000), (4096, 4097, 7, 20_000), (5000,)])
def test_it_is_the_norm_of_all_numbers(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(size) for size in sizes]
    expected = torch.cat(tensors).double().norm()
    assert float(norm_of(tensors)) == pytest.approx(float(expected), rel=1e-5)
    for tensor in tensors:
        for bad in (float("nan"), float("inf")):
            kept = float(tensor[-1])
            tensor[-1] = bad
            assert not norm_of(tensors).isfinite()
            tensor[-1] = kept
