"""FID and KID of two sets of features, by torchmetrics. Whose features they are is not known here."""

import warnings

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from decant.errors import refuse


class _Given(nn.Module):
    """Stands where torchmetrics wants a network: the features are there already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid(features: Tensor, reference: Tensor) -> float:
    """Frechet distance of two normal distributions fitted to features (n, D) and (m, D), lower is nearer.

    Heusel et al., "GANs trained by a two time-scale update rule", arXiv 1706.08500, eq. 6. It is too high at small n,
    for equal distributions too: compare at one n, and with what real pictures score.

    Raises:
        UserError: n or m is not above D, where a fitted covariance has no inverse.
    """
    least = features.shape[1] + 1
    if min(len(features), len(reference)) < least:
        found = f"{len(features)} and {len(reference)} pictures"
        raise refuse("fid", found, allowed=f"{least} or more", hint=f"{2 * least} pictures give FID and its interval")
    metric = FrechetInceptionDistance(feature=_Given(features.shape[1])).set_dtype(torch.float64)
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    return float(metric.compute())


def kid(features: Tensor, reference: Tensor) -> float:
    """Squared maximum mean discrepancy of features (n, D) and (n, D) with the kernel (x.y / D + 1)^3, lower is nearer.

    Binkowski et al., "Demystifying MMD GANs", arXiv 1801.01401, eq. 4. Unbiased where the two sets are independent:
    around 0, and below it as often as above, for equal distributions. All n are one subset: nothing is random.

    Raises:
        UserError: the two are not of one length, or n < 2.
    """
    n = len(features)
    if n != len(reference) or n < 2:
        found = f"{n} and {len(reference)} pictures"
        raise refuse("kid", found, allowed="equally many, 2 or more", hint="draw as many")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that all features are kept in memory
        metric = KernelInceptionDistance(feature=_Given(features.shape[1]), subsets=1, subset_size=n)
    metric.set_dtype(torch.float64)
    with torch.random.fork_rng(devices=[]):  # the order, which it draws, does not matter
        metric.update(reference.double(), real=True)
        metric.update(features.double(), real=False)
        return float(metric.compute()[0])
