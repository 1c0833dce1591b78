"""Diversity between the pictures of one prompt, beside its definition."""

from itertools import combinations

import numpy as np
import pytest
import torch

from decant.metrics.diversity import coarse, mean_pairwise_distance, pairs_of


def test_it_is_the_mean_over_all_pairs() -> None:
    features = np.random.default_rng(0).normal(size=(5, 7))
    apart = [np.linalg.norm(a - b) for a, b in combinations(features, 2)]
    assert mean_pairwise_distance(torch.from_numpy(features)) == pytest.approx(np.mean(apart))
    assert pairs_of(4) == list(combinations(range(4), 2))


def test_a_collapsed_model_has_none() -> None:
    picture = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert mean_pairwise_distance(coarse(picture.expand(4, -1, -1, -1))) == 0


@pytest.mark.parametrize("side", [16, 64, 100])
def test_coarse_distance_is_of_one_and_sees_places_not_grain(side: int) -> None:
    black = torch.zeros(3, side, side, dtype=torch.uint8)
    left = black.clone()
    left[:, :, : side // 2] = 255
    white = black + 255
    apart = torch.cdist(coarse(torch.stack([black, left])), coarse(torch.stack([white, left.flip(-1)])))
    assert apart[0, 0] == pytest.approx(1, abs=1e-4) and apart[1, 1] == pytest.approx(1, abs=0.02)
    noise = torch.randint(0, 2, (2, 3, 256, 256), generator=torch.Generator().manual_seed(1)).mul(255).to(torch.uint8)
    rms = (noise[0].float() - noise[1].float()).div(255).square().mean().sqrt()
    assert mean_pairwise_distance(coarse(noise)) < rms / 10
