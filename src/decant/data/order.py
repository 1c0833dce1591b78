"""The order of the data: a pure function, so neither workers nor ranks nor history change it."""

from functools import lru_cache

import torch
from torch import Tensor

from decant.maths.seeds import generator


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """The order of 0..n-1 in one epoch, ``(n,)`` int64; fresh for every (seed, epoch). Read only."""
    return torch.randperm(n, generator=generator(seed, "order", epoch))


def stream(seed: int, step: int, batch_size: int, n: int) -> tuple[int, ...]:
    """The samples of update ``step``: positions ``epoch * n + index`` in the endless stream.

    ``position % n`` is the index in a source of ``n`` samples. Every epoch is a fresh permutation; a batch
    may reach over the end of one.
    """
    assert n > 0 and batch_size > 0 and step >= 0, f"no stream of batch {batch_size} from {n} samples at step {step}"
    places = range(step * batch_size, (step + 1) * batch_size)
    return tuple(p // n * n + int(permutation(seed, p // n, n)[p % n]) for p in places)
