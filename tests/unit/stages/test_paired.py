"""Figures of several pictures a prompt: the prompt is what is resampled, and the teacher in the same resamples."""

import numpy as np
import pytest

from decant.metrics.interval import bootstrap_mean, paired_ratio, wilson
from decant.stages.paired import by_prompt, number_of, share_of


def test_the_prompt_is_the_unit() -> None:
    """Ten times the pictures of each prompt, all alike, are no more knowledge of other prompts."""
    few = np.random.default_rng(0).normal(5, 1, 30)
    many = np.repeat(few, 10).tolist()
    own = number_of(many, None, 10, "higher")
    assert (own["low"], own["high"]) == pytest.approx(
        (bootstrap_mean(few.tolist()).low, bootstrap_mean(few.tolist()).high)
    )
    assert (own["n"], own["pictures"]) == (30, 300)
    assert by_prompt([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0] and by_prompt([1.0, 3.0], 2) == [1.0, 3.0]


def test_intervals_over_prompts_cover_the_truth() -> None:
    """Prompts differ in how hard they are: 95 % intervals hold the world's share about as often as said."""
    rng, covered = np.random.default_rng(1), 0
    for _ in range(300):
        chance = rng.beta(2, 1, 40)
        right = (rng.random((40, 5)) < chance[:, None]).flatten().tolist()
        figure = share_of(right, None, 5)
        covered += figure["low"] <= 2 / 3 <= figure["high"]
    assert 0.9 <= covered / 300 <= 0.98


def test_one_picture_a_prompt_has_the_exact_intervals() -> None:
    own, teacher = [True, False, True, True], [True, True, True, False]
    figure, ratio = share_of(own, teacher, 1), paired_ratio(own, teacher)
    assert (figure["low"], figure["high"]) == (wilson(3, 4).low, wilson(3, 4).high)
    assert (figure["relative_low"], figure["relative_high"]) == (ratio.low, ratio.high)


@pytest.mark.parametrize("right", [True, False])
def test_all_or_nothing_still_has_an_interval(right: bool) -> None:
    """Twelve prompts all right, or all wrong, do not prove the thirteenth."""
    figure = share_of([right] * 36, [True] * 36, 3)
    exact = wilson(12 if right else 0, 12)
    assert (figure["low"], figure["high"]) == (exact.low, exact.high) and figure["n"] == 12
    assert figure["relative_low"] < figure["relative_high"] and figure["difference_low"] < figure["difference_high"]


def test_a_teacher_that_is_hardly_ever_right_has_no_part() -> None:
    figure = share_of([True] * 8, [False] * 8, 2)
    assert "relative_to_teacher" not in figure and figure["difference"] == 1
