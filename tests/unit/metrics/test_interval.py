"""Wilson's interval against SciPy's, and Newcombe's paired one against its own coverage."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from decant.errors import UserError
from decant.metrics.interval import paired_difference, wilson

pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@given(n=st.integers(1, 5000), share=st.floats(0, 1), confidence=st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_is_scipys(n: int, share: float, confidence: float) -> None:
    successes = round(share * n)
    mine = wilson(successes, n, confidence)
    theirs = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert mine.low <= mine.value <= mine.high
    assert mine.n == n and mine.value == successes / n


@pytest.mark.parametrize(("successes", "n", "confidence"), [(1, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)])
def test_impossible_counts_are_refused(successes: int, n: int, confidence: float) -> None:
    with pytest.raises(UserError):
        wilson(successes, n, confidence)


@given(pairs)
def test_swapping_the_two_mirrors_the_interval(outcomes: list[tuple[bool, bool]]) -> None:
    a, b = zip(*outcomes, strict=True)
    forth, back = paired_difference(a, b), paired_difference(b, a)
    assert (forth.value, forth.low, forth.high) == pytest.approx((-back.value, -back.high, -back.low))


@given(pairs)
def test_difference_keeps_within_its_bounds(outcomes: list[tuple[bool, bool]]) -> None:
    a, b = zip(*outcomes, strict=True)
    interval = paired_difference(a, b)
    assert -1 - 1e-12 <= interval.low <= interval.value <= interval.high <= 1 + 1e-12
    assert interval.value == pytest.approx(np.mean(a) - np.mean(b))


def test_agreement_narrows_a_paired_interval() -> None:
    a = [True] * 60 + [False] * 40
    alike = paired_difference(a, [True] * 50 + [False] * 50)
    crossed = paired_difference(a, [False] * 50 + [True] * 50)
    assert alike.high - alike.low < 0.6 * (crossed.high - crossed.low)


@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_the_true_difference_is_covered_as_often_as_said(correlation: float) -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(1500):
        shared = rng.random(128) < correlation
        common, own_a, own_b = rng.random((3, 128))
        a = np.where(shared, common, own_a) < 0.8
        b = np.where(shared, common, own_b) < 0.7
        interval = paired_difference(a.tolist(), b.tolist())
        covered += interval.low <= 0.1 <= interval.high
    assert 0.93 <= covered / 1500 <= 0.98


@pytest.mark.parametrize(("a", "b"), [([], []), ([True], [True, False])])
def test_unpaired_outcomes_are_refused(a: list[bool], b: list[bool]) -> None:
    with pytest.raises(UserError):
        paired_difference(a, b)
