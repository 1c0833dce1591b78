"""Wilson's interval against SciPy's; the paired ones against their own coverage, and the chance against coin flips."""

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from scipy.stats import bootstrap as scipy_bootstrap
from scipy.stats import t as student

from decant.errors import UserError
from decant.metrics.interval import bootstrap_ratio, jackknife, mcnemar_p, paired_difference, paired_ratio, wilson

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


# (both right, only the student, only the teacher), as shares; the rest neither.
TABLES = [(0.85, 0.03, 0.12), (0.6, 0.02, 0.37), (0.0, 0.01, 0.96), (0.95, 0.02, 0.02), (0.3, 0.1, 0.3)]


@pytest.mark.parametrize("shares", TABLES)
def test_the_true_ratio_is_covered_as_often_as_said(shares: tuple[float, float, float]) -> None:
    """Also where the student is hardly ever right, or the teacher almost always: a bootstrap has no width there."""
    true = (shares[0] + shares[1]) / (shares[0] + shares[2])
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(1000):
        kind = rng.choice(4, 128, p=[*shares, 1 - sum(shares)])
        interval = paired_ratio(np.isin(kind, [0, 1]).tolist(), np.isin(kind, [0, 2]).tolist())
        covered += interval.low <= true <= interval.high
    assert 0.93 <= covered / 1000 <= 0.99


def test_the_ratio_agrees_with_a_paired_bootstrap_where_that_works() -> None:
    rng = np.random.default_rng(3)
    kind = rng.choice(4, 600, p=[0.6, 0.05, 0.25, 0.1])
    a, b = np.isin(kind, [0, 1]), np.isin(kind, [0, 2])
    chosen = rng.integers(0, 600, (4000, 600))
    low, high = np.quantile(a[chosen].mean(axis=1) / b[chosen].mean(axis=1), [0.025, 0.975])
    interval = paired_ratio(a.tolist(), b.tolist())
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.01)
    assert interval.value == pytest.approx(a.mean() / b.mean())


@given(pairs)
def test_a_ratio_holds_its_value_and_its_inverse(outcomes: list[tuple[bool, bool]]) -> None:
    a, b = zip(*outcomes, strict=True)
    if not any(b):
        with pytest.raises(UserError):
            paired_ratio(a, b)
        return
    forth = paired_ratio(a, b)
    assert 0 <= forth.low <= forth.value <= forth.high
    if any(a):
        back = paired_ratio(b, a)
        assert (forth.low, forth.high) == pytest.approx((1 / back.high, 1 / back.low))
    else:
        assert forth.high > 0  # never right in n tries is not surely never right


@given(pairs)
def test_mcnemar_counts_coin_flips(outcomes: list[tuple[bool, bool]]) -> None:
    """Against the definition: each pair that differs is a fair coin."""
    a, b = zip(*outcomes, strict=True)
    heads, flips = sum(x and not y for x, y in outcomes), sum(x != y for x, y in outcomes)
    far = abs(heads - flips / 2)
    chance = sum(comb(flips, k) for k in range(flips + 1) if abs(k - flips / 2) >= far) / 2**flips
    assert mcnemar_p(a, b) == pytest.approx(chance)


def test_the_jackknife_of_a_mean_is_students_interval() -> None:
    values = np.random.default_rng(1).normal(3, 2, 40)
    without = [float(np.delete(values, place).mean()) for place in range(40)]
    interval = jackknife(float(values.mean()), without, 40)
    low, high = student.interval(0.95, 39, values.mean(), values.std(ddof=1) / np.sqrt(40))
    assert (interval.low, interval.high) == pytest.approx((low, high))


def test_the_jackknife_covers_a_figure_that_is_no_mean() -> None:
    """The standard deviation of skewed values, in groups: about as often as said."""
    rng, covered = np.random.default_rng(2), 0
    for _ in range(400):
        values = rng.gamma(4, 1, 128)
        without = [float(np.delete(values, slice(g, None, 32)).std(ddof=1)) for g in range(32)]
        interval = jackknife(float(values.std(ddof=1)), without, 128)
        covered += interval.low <= 2.0 <= interval.high
    assert 0.9 <= covered / 400 <= 0.98
    with pytest.raises(UserError):
        jackknife(1.0, [1.0, 1.0], 2)


def test_the_ratio_of_paired_means_is_resampled_in_pairs() -> None:
    """Against scipy's own paired bootstrap; and a teacher's own noise falls out of the ratio to itself."""
    rng = np.random.default_rng(3)
    hard = rng.normal(10, 3, 60)  # some prompts are harder than others, for both
    a, b = hard + rng.normal(0, 0.5, 60), 2 * hard + rng.normal(0, 0.5, 60)
    found = bootstrap_ratio(a.tolist(), b.tolist())

    def ratio(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        return x.mean(axis=axis) / y.mean(axis=axis)

    other = scipy_bootstrap(
        (a, b), ratio, paired=True, n_resamples=4000, method="percentile", rng=4
    ).confidence_interval
    assert found.value == pytest.approx(a.mean() / b.mean()) and found.n == 60
    assert (found.low, found.high) == pytest.approx((other.low, other.high), abs=0.002)
    assert found.high - found.low < 0.02, "much narrower than unpaired, since hard prompts are hard for both"
    assert bootstrap_ratio(a.tolist(), a.tolist()).high == 1


@pytest.mark.parametrize(("a", "b"), [([1.0], [0.0]), ([1.0, 1.0], [0.0, 1.0]), ([1.0], [1.0, 2.0]), ([], [])])
def test_a_ratio_to_nothing_is_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(UserError):
        bootstrap_ratio(a, b)
