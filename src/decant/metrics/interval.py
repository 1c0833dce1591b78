"""How sure a figure is: intervals of one share, and of two on the same pictures, subtracted or divided."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt

import numpy as np
from scipy.stats import binomtest, norm
from scipy.stats import t as student_t

from decant.errors import refuse


@dataclass(frozen=True)
class Interval:
    """A figure with its confidence limits and the number of observations behind it."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | int]:
        """The figures as `report.json` holds them."""
        return asdict(self)


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion, without continuity correction.

    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    It keeps within [0, 1] and near its stated coverage at 0 and n successes, where the usual interval has no width.

    Raises:
        UserError: when n < 1, the successes are not among 0..n, or the confidence is not between 0 and 1.
    """
    if not 0 <= successes <= n or n < 1:
        raise refuse("successes of n", f"{successes} of {n}", allowed="0 <= successes <= n, n >= 1", hint="count again")
    z = _quantile(confidence)
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # Rounding must not push an exact 0 or 1 outside its own interval.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(share, low, high, n)


def paired_difference(a: Sequence[bool], b: Sequence[bool], confidence: float = 0.95) -> Interval:
    """Interval of share(a) - share(b), where a[i] and b[i] judge the same picture's prompt and seed.

    Newcombe, "Improved confidence intervals for the difference between binomial proportions based on paired
    data", Statistics in Medicine 17 (1998), method 10: each share's Wilson limits, joined by the correlation.

    Raises:
        UserError: when the two are empty or not of one length.
    """
    _check_pairs(a, b)
    n = len(a)
    first, second = wilson(sum(map(bool, a)), n, confidence), wilson(sum(map(bool, b)), n, confidence)
    phi = _correlation(a, b)
    difference = first.value - second.value
    down = _joined(first.value - first.low, second.high - second.value, phi)
    up = _joined(first.high - first.value, second.value - second.low, phi)
    return Interval(difference, difference - down, difference + up, n)


def paired_ratio(a: Sequence[bool], b: Sequence[bool], confidence: float = 0.95) -> Interval:
    """Interval of share(a) / share(b), where a[i] and b[i] judge the same picture's prompt and seed.

    Bonett and Price, "Confidence intervals for a ratio of binomial proportions based on paired data", Statistics in
    Medicine 25 (2006): each share's Wilson limits at a narrower level, one divided by the other. Unlike a bootstrap's,
    it has width where one model is never right, or always.

    Raises:
        UserError: when the two are empty or not of one length, or b is never right.
    """
    _check_pairs(a, b)
    both, only_a, only_b, _ = _table(a, b)
    if both + only_b == 0:
        raise refuse("paired ratio", "divided by 0", allowed="a divisor that is right at least once", hint="subtract")
    n, first, second = both + only_a + only_b, both + only_a, both + only_b
    joint = sqrt((only_a + only_b + 2) / ((first + 1) * (second + 1)))
    each = [sqrt((1 - (count + 1) / (n + 2)) / (count + 1)) for count in (first, second)]
    z = _quantile(confidence) * joint / sum(each)
    (low_a, high_a), (low_b, high_b) = (_score_limits(count, n, z) for count in (first, second))
    return Interval(first / second, low_a / high_b, high_a / low_b, len(a))


def _score_limits(successes: int, n: int, z: float) -> tuple[float, float]:
    """Wilson's limits of a proportion at ``z`` standard deviations."""
    middle, scale = 2 * successes + z**2, 2 * (n + z**2)
    half = z * sqrt(z**2 + 4 * successes * (1 - successes / n))
    return max(0.0, (middle - half) / scale), (middle + half) / scale


def mcnemar_p(a: Sequence[bool], b: Sequence[bool]) -> float:
    """The chance of pairs that differ this unevenly or more if both are right equally often: exact, two-sided.

    McNemar, "Note on the sampling error of the difference between correlated proportions", Psychometrika 12 (1947),
    with the binomial distribution itself.

    Raises:
        UserError: when the two are empty or not of one length.
    """
    _check_pairs(a, b)
    _, only_a, only_b, _ = _table(a, b)
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def _check_pairs(a: Sequence[float], b: Sequence[float]) -> None:
    if len(a) != len(b) or not a:
        raise refuse(
            "paired outcomes",
            f"{len(a)} and {len(b)}",
            allowed="two lists of one length, not empty",
            hint="judge both models on the same prompts and seeds",
        )


def _table(a: Sequence[bool], b: Sequence[bool]) -> tuple[int, int, int, int]:
    """How many pairs are right in both, only in the first, only in the second, in neither."""
    both = sum(bool(x) and bool(y) for x, y in zip(a, b, strict=True))
    only_a, only_b = sum(map(bool, a)) - both, sum(map(bool, b)) - both
    return both, only_a, only_b, len(a) - both - only_a - only_b


def _joined(x: float, y: float, phi: float) -> float:
    return sqrt(max(x**2 - 2 * phi * x * y + y**2, 0.0))


def _correlation(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Newcombe's phi: the pairs' correlation, pulled towards 0 when positive; 0 when a margin is empty."""
    n = len(a)
    both, only_a, only_b, neither = _table(a, b)
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    if margins == 0:
        return 0.0
    cross = both * neither - only_a * only_b
    return (max(cross - n / 2, 0) if cross > 0 else cross) / sqrt(margins)


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise refuse("confidence", confidence, allowed="between 0 and 1", hint="0.95 is the custom")
    return float(norm.ppf((1 + confidence) / 2))


def bootstrap_mean(values: Sequence[float], confidence: float = 0.95, resamples: int = 2000) -> Interval:
    """Percentile bootstrap interval of a mean; the resampling is seeded, so equal values give equal limits.

    Raises:
        UserError: without values.
    """
    if not values:
        raise refuse("values", "none", allowed="at least one", hint="measure something first")
    data = np.asarray(values, dtype=np.float64)
    chosen = np.random.default_rng(0).integers(0, len(data), (resamples, len(data)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(data[chosen].mean(axis=1), [tail, 1 - tail])
    return Interval(float(data.mean()), float(low), float(high), len(data))


def bootstrap_ratio(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95, resamples: int = 2000
) -> Interval:
    """Percentile bootstrap interval of mean(a) / mean(b), where a[i] and b[i] belong together: both means of a resample
    are of the same places. The resampling is that of `bootstrap_mean`.

    Raises:
        UserError: the two are empty or not of one length, or b's mean, or that of a resample, is not above 0.
    """
    _check_pairs(a, b)
    over, under = (np.asarray(each, dtype=np.float64) for each in (a, b))
    chosen = np.random.default_rng(0).integers(0, len(over), (resamples, len(over)))
    divisors = under[chosen].mean(axis=1)
    if min(under.mean(), divisors.min()) <= 0:
        raise refuse("paired ratio", "divided by 0", allowed="a divisor above 0 in every resample", hint="subtract")
    tail = (1 - confidence) / 2
    low, high = np.quantile(over[chosen].mean(axis=1) / divisors, [tail, 1 - tail])
    return Interval(float(over.mean() / under.mean()), float(low), float(high), len(over))


def jackknife(value: float, without: Sequence[float], n: int, confidence: float = 0.95) -> Interval:
    """Interval of any smooth figure of n observations, from what it is ``without`` each of g equal groups of them.

    Efron and Stein, "The jackknife estimate of variance", Annals of Statistics 9 (1981). For figures such as FID,
    where a bootstrap's repeated pictures would shrink the very spread that is measured.

    Raises:
        UserError: for fewer than 3 groups.
    """
    groups = len(without)
    if groups < 3:
        raise refuse("jackknife", f"{groups} groups", allowed="3 or more", hint="measure more pictures")
    spread = np.asarray(without) - np.mean(without)
    error = sqrt((groups - 1) / groups * float(np.square(spread).sum()))
    half = float(student_t.ppf((1 + confidence) / 2, groups - 1)) * error
    return Interval(value, value - half, value + half, n)
