"""Processes of their own: what one call takes is not seen by the next."""

import os

import pytest

from decant.bench.alone import alone
from decant.bench.timer import peak_memory_mb
from decant.errors import UserError, refuse


def taken_mb(megabytes: int) -> tuple[int, float]:
    block = b"x" * (megabytes * 1_000_000)
    del block
    return os.getpid(), peak_memory_mb().process_mb


def refuses(value: int) -> None:
    raise refuse("value", value, allowed="none", hint="do not ask")


def test_a_large_call_leaves_nothing_for_the_small_one_behind_it() -> None:
    (first, small), (second, large), (third, small_again) = alone(taken_mb, [(1,), (400,), (1,)])
    assert len({first, second, third, os.getpid()}) == 4
    assert 380 < large - small < 420
    assert abs(small_again - small) < 20


def test_a_refusal_comes_back_as_one() -> None:
    with pytest.raises(UserError, match="do not ask"):
        alone(refuses, [(1,)])
