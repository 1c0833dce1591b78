"""Intervals for counted scores: one proportion, and the difference of two on the same pictures."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt

import numpy as np
from scipy.stats import norm

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
    if len(a) != len(b) or not a:
        raise refuse(
            "paired outcomes",
            f"{len(a)} and {len(b)}",
            allowed="two lists of one length, not empty",
            hint="judge both models on the same prompts and seeds",
        )
    n = len(a)
    first, second = wilson(sum(map(bool, a)), n, confidence), wilson(sum(map(bool, b)), n, confidence)
    phi = _correlation(a, b)
    difference = first.value - second.value
    down = _joined(first.value - first.low, second.high - second.value, phi)
    up = _joined(first.high - first.value, second.value - second.low, phi)
    return Interval(difference, difference - down, difference + up, n)


def _joined(x: float, y: float, phi: float) -> float:
    return sqrt(max(x**2 - 2 * phi * x * y + y**2, 0.0))


def _correlation(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Newcombe's phi: the pairs' correlation, pulled towards 0 when positive; 0 when a margin is empty."""
    n = len(a)
    both = sum(bool(x) and bool(y) for x, y in zip(a, b, strict=True))
    only_a = sum(bool(x) and not y for x, y in zip(a, b, strict=True))
    only_b = sum(bool(y) and not x for x, y in zip(a, b, strict=True))
    neither = n - both - only_a - only_b
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
