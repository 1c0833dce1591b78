"""Equal to the last bit."""

from pathlib import Path

import torch

from decant.train import checkpoint


def assert_same(whole: Path, other: Path, step: int) -> None:
    """The newest checkpoints of two folders are of that step, with equal weights, averages, moments and scalars."""
    one, two = checkpoint.latest(whole), checkpoint.latest(other)
    assert one is not None and two is not None
    assert one.step == two.step == step and one.scalars == two.scalars
    for group in ("weights", "ema", "optimizer"):
        a, b = one.tensors(group), two.tensors(group)
        assert a.keys() == b.keys() and a
        assert [name for name in a if not torch.equal(a[name], b[name])] == []
