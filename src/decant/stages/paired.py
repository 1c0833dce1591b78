"""Figures of several pictures a prompt, beside the teacher's of the same prompts and seeds.

Pictures of one prompt resemble each other in how well they come out, so the prompt is what is drawn by chance: every
interval resamples prompts, both models in the same resamples. Of a single prompt its pictures are resampled.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

from decant.errors import UserError
from decant.metrics.interval import bootstrap_mean, bootstrap_ratio, wilson
from decant.stages.scoring import Figure, share

Better = Literal["higher", "lower"]


def by_prompt(values: Sequence[float], images: int) -> list[float]:
    """The mean of each prompt's ``images`` values, in order; of a single prompt the values themselves."""
    if len(values) == images:
        return list(values)
    return [sum(values[at : at + images]) / images for at in range(0, len(values), images)]


def number_of(values: Sequence[float], teacher: Sequence[float] | None, images: int, better: Better) -> Figure:
    """A mean with its interval, and beside the teacher's: part and difference. ``teacher`` is None for itself."""
    own = by_prompt(values, images)
    figure: Figure = {**bootstrap_mean(own).to_json(), "pictures": len(values), "unit": "number", "better": better}
    return figure | beside(own, None if teacher is None else by_prompt(teacher, images))


def beside(own: Sequence[float], teacher: Sequence[float] | None) -> Figure:
    """Part and difference of two means, paired. The part is left out where the teacher's is not surely above 0."""
    if teacher is None:
        return {"relative_to_teacher": 1.0}
    gap = bootstrap_mean([a - b for a, b in zip(own, teacher, strict=True)])
    figure: Figure = {"difference": gap.value, "difference_low": gap.low, "difference_high": gap.high}
    with suppress(UserError):
        ratio = bootstrap_ratio(own, teacher)
        figure |= {"relative_to_teacher": ratio.value, "relative_low": ratio.low, "relative_high": ratio.high}
    return figure


def share_of(own: Sequence[bool], teacher: Sequence[bool] | None, images: int) -> Figure:
    """A share of pictures. With one picture a prompt, or one prompt, the exact intervals of `share`.

    A bootstrap has no width where every resample is alike, as when all pictures are right or none is. What is said then
    is what the exact intervals say of as many prompts that are each right or wrong.
    """
    if images == 1 or len(own) == images:
        return {**share(own, teacher), "pictures": len(own)}
    figure = number_of(own, teacher, images, "higher")
    figure = {key: value for key, value in figure.items() if key not in ("unit", "better")}
    mine = by_prompt(own, images)
    theirs = None if teacher is None else by_prompt(teacher, images)
    exact = share([x >= 0.5 for x in mine], None if theirs is None else [x >= 0.5 for x in theirs])
    if figure["low"] == figure["high"]:
        limits = wilson(round(sum(mine)), len(mine))
        figure |= {"low": limits.low, "high": limits.high}
    for key in ("relative", "difference"):
        low, high = f"{key}_low", f"{key}_high"
        if low in figure and low in exact and figure[low] == figure[high]:
            figure |= {low: exact[low], high: exact[high]}
    return figure
