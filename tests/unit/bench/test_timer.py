"""The timer against a clock, and the memory against what was taken."""

import subprocess
import sys
import time

import pytest

from decant.bench.timer import peak_memory_mb, time_ms, time_rounds
from decant.errors import UserError


def test_a_nap_takes_as_long_as_it_takes() -> None:
    latency = time_ms(lambda: time.sleep(0.02), warmup=0, repeats=3)
    assert 20 <= latency.low <= latency.median <= latency.high
    assert latency.median < 200
    assert latency.n == 3


def test_warm_up_calls_are_made_and_not_timed() -> None:
    naps = iter([0.3, 0.0, 0.0, 0.0])
    latency = time_ms(lambda: time.sleep(next(naps)), warmup=1, repeats=3)
    assert latency.high < 300
    assert next(naps, None) is None


def test_median_and_spread_are_of_the_calls() -> None:
    naps = iter([0.0, 0.0, 0.2])
    latency = time_ms(lambda: time.sleep(next(naps)), warmup=0, repeats=3)
    assert latency.median < 100 and latency.high >= 200
    assert latency.to_json().keys() == {"median", "low", "high", "n", "warmup"}


def test_a_machine_that_slows_down_meets_all_alike() -> None:
    """Two equal calls on a machine on which every call takes 2 ms more than the last: the medians are equal."""
    calls = iter(range(100))

    def slower() -> None:
        time.sleep(0.002 * next(calls))

    ticks: list[int] = []
    both = time_rounds({"a": slower, "b": slower}, warmup=1, repeats=6, tick=ticks.append)
    assert abs(both["a"].median - both["b"].median) < 1.5
    assert ticks == list(range(1, 15)) and next(calls) == 14


@pytest.mark.parametrize("options", [{"repeats": 0}, {"warmup": -1}])
def test_no_calls_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError):
        time_ms(lambda: None, **options)


def test_peak_memory_sees_what_was_given_back() -> None:
    code = """
from decant.bench.timer import peak_memory_mb
before = peak_memory_mb()
block = b"x" * 300_000_000
del block
print(peak_memory_mb().process_mb - before.process_mb, before.cuda_mb)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, cuda = done.stdout.split()
    assert 290 < float(grown) < 320
    assert cuda == "None"
    assert peak_memory_mb().process_mb > 50
