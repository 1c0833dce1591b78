"""How much the pictures of one prompt differ from each other: what a student of few steps loses unseen.

A score of each picture with its prompt, such as CLIPScore, is the same for ten good pictures and for one good picture
ten times. The mean distance between pairs tells them apart; LPIPS is its usual distance (Zhu et al., "Toward multimodal
image-to-image translation", arXiv 1711.11586, section 5.2), others stand in where that is not at hand.
"""

import torch
from torch import Tensor

COARSE = "16 x 16 means of the pixels"
_SIDE = 16


def mean_pairwise_distance(features: Tensor) -> float:
    """Mean Euclidean distance between the (n, D) features of n >= 2 pictures, over all n (n - 1) / 2 pairs."""
    return float(torch.pdist(features.double()).mean())


def coarse(pictures: Tensor) -> Tensor:
    """What is where, without what detail: uint8 pictures (n, 3, H, W) -> (n, 768).

    Means over a grid of 16 x 16, so scaled that the distance of two is the root mean square of the grids' difference,
    of 1: a black picture and a white one are 1 apart.
    """
    grid = torch.nn.functional.adaptive_avg_pool2d(pictures.float() / 255, _SIDE).flatten(1)
    return grid / grid.shape[1] ** 0.5


def pairs_of(n: int) -> list[tuple[int, int]]:
    """The places of all n (n - 1) / 2 pairs."""
    return [(a, b) for a in range(n) for b in range(a + 1, n)]
