"""FID against SciPy's matrix root, KID against its definition, and both against what equal distributions give."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from decant.errors import UserError
from decant.metrics.distance import fid, kid


def features(n: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    return torch.randn(n, 6, generator=generator) @ mix + shift


def test_fid_is_its_equation() -> None:
    a, b = features(80, 1).numpy().astype(float), features(60, 2, 0.5).numpy().astype(float)
    covariances = np.cov(a.T), np.cov(b.T)
    root = sqrtm(covariances[0] @ covariances[1]).real
    apart = np.square(a.mean(0) - b.mean(0)).sum()
    assert fid(torch.tensor(a), torch.tensor(b)) == pytest.approx(apart + np.trace(sum(covariances) - 2 * root))


def test_kid_is_its_definition() -> None:
    a, b = features(15, 1).double(), features(15, 2, 0.5).double()

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x @ y / 6 + 1) ** 3)

    inside = [kernel(x[i], x[j]) for x in (a, b) for i in range(15) for j in range(15) if i != j]
    across = [kernel(x, y) for x in a for y in b]
    assert kid(a, b) == pytest.approx(sum(inside) / (15 * 14) - 2 * np.mean(across))


def test_equal_distributions_are_at_zero_for_kid_and_above_for_fid() -> None:
    found = [
        (fid(features(40, k), features(40, 500 + k)), kid(features(40, k), features(40, 500 + k))) for k in range(60)
    ]
    fids, kids = np.array(found).T
    assert fids.min() > 0
    assert abs(kids.mean()) < 3 * kids.std() / np.sqrt(60)
    assert 0.2 < np.mean(kids < 0) < 0.8
    assert fid(features(40, 1), features(40, 1)) == pytest.approx(0, abs=1e-4)


def test_the_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    kid(features(10, 1), features(10, 2))
    assert torch.equal(before, torch.get_rng_state())


def test_too_few_are_refused() -> None:
    with pytest.raises(UserError, match="7 or more"):
        fid(features(6, 1), features(60, 2))
    with pytest.raises(UserError, match="equally many"):
        kid(features(6, 1), features(7, 2))
