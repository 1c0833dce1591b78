"""FID, KID and the like of every model's pictures: by whose features, to which pictures; what is left out and why."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decant.data.picture import View, framed_picture
from decant.errors import UserError, refuse
from decant.metrics.distance import fid, kid
from decant.metrics.inception import NAME as INCEPTION
from decant.metrics.inception import inception, inception_features
from decant.metrics.interval import jackknife
from decant.scenes.classifier.network import NAME as CLASSIFIER
from decant.scenes.classifier.network import features, shipped
from decant.scenes.render import render
from decant.scenes.world import draw_scene
from decant.stages.asked import Asked
from decant.stages.looks import Looks, looks
from decant.stages.scoring import Drawn, Figure, number

Network = Literal["scenes_classifier", "inception"]
LeftOut = dict[str, str]
# Other held-out scenes than those asked for, which begin at 1,000,000: KID is unbiased for independent sets alone.
_REFERENCE_SEED, _FLOOR_SEED = 3_000_000, 3_500_000
_GROUPS = 32
_FEWEST = 8


@dataclass(frozen=True)
class Comparison:
    """One distance: of the features that ``network`` gives to a reference's (n, D), described in words."""

    key: str
    network: Network
    distance: Callable[[Tensor, Tensor], float]
    reference: Tensor
    words: str
    floor: float | None


@dataclass(frozen=True)
class Measured:
    """A distance of n pictures, and what it is without each group of them."""

    value: float
    without: tuple[float, ...]


@dataclass(frozen=True)
class Distances:
    """What every model's pictures are compared by; ``left_out`` says what cannot be, and why."""

    networks: Mapping[Network, Callable[[Tensor], Tensor]]
    comparisons: tuple[Comparison, ...]
    teacher: Mapping[str, Measured]
    looks: Looks
    left_out: tuple[LeftOut, ...]

    def figures(self, drawn: Drawn, *, teacher: bool = False) -> dict[str, Figure]:
        """Every distance of a model's pictures, with its interval and the difference to the teacher's."""
        own = self.teacher if teacher else _measure(self.comparisons, self.networks, drawn)
        n = len(drawn.pictures)
        found = {
            c.key: _figure(c, own[c.key], None if teacher else self.teacher[c.key], n)
            for c in self.comparisons
            if not (teacher and c.key.endswith("_to_teacher"))
        }
        return found | self.looks.figures(drawn, teacher=teacher)


def distances(asked: Asked, teacher: Drawn) -> Distances:
    """Which distances can be measured for pictures of this number and kind."""
    networks, left_out = _networks(teacher)
    found: list[Comparison] = []
    for network, extract in networks.items():
        own = extract(stacked(teacher.pictures))
        other = extract(_renders(len(own), _FLOOR_SEED)) if _without_pictures(asked) and asked.scenes else None
        candidates = [("fid", fid, own, f"the teacher's {len(own)} pictures of the same captions and seeds")]
        try:
            real, words = _real(asked, teacher.pictures)
            candidates = [("fid", fid, extract(real), words), ("kid", kid, extract(real), words), *candidates]
        except UserError as error:
            left_out += [left_out_of(f"{name}_{network}", error) for name in ("fid", "kid")]
        for name, distance, reference, told in candidates:
            key = f"{name}_{network}" + ("_to_teacher" if reference is own else "")
            try:
                fewest = min(_without_each_group(len(own)), key=len)
                distance(own, reference)
                distance(own[fewest], reference[fewest])
                floor = None if other is None or reference is own else distance(other, reference)
            except UserError as error:
                left_out.append(left_out_of(key, error))
            else:
                found.append(Comparison(key, network, distance, reference, told, floor))
    seen = looks(asked.captions, teacher)
    left_out += [left_out_of(key, error) for key, error in seen.left_out]
    return Distances(networks, tuple(found), _measure(found, networks, teacher), seen, tuple(left_out))


def _networks(teacher: Drawn) -> tuple[dict[Network, Callable[[Tensor], Tensor]], list[LeftOut]]:
    """The feature networks that can be used: the shipped one on pictures of scenes, Inception where its weights are."""
    found: dict[Network, Callable[[Tensor], Tensor]] = {}
    left_out: list[LeftOut] = []
    if teacher.readings:
        found["scenes_classifier"] = partial(features, shipped())
    else:
        reason, hint = "the pictures are no scenes of 64 x 64", "its features mean something there alone"
        left_out.append({"score": "fid_scenes_classifier", "reason": reason, "hint": hint})
    try:
        found["inception"] = partial(inception_features, inception())
    except UserError as error:
        left_out.append(left_out_of("fid_inception", error))
    return found, left_out


def _real(asked: Asked, pictures: Sequence[NDArray[np.uint8]]) -> tuple[Tensor, str]:
    """As many real pictures as a model drew, uint8 (n, 3, H, W), and what they are: held-out pictures or renders."""
    n = len(pictures)
    if _without_pictures(asked):
        if not asked.scenes:
            hint = "give pictures with captions as --data"
            raise refuse("data", "prompts alone, there are no real pictures", allowed="pictures", hint=hint)
        return _renders(n, _REFERENCE_SEED), f"{n} renders of other held-out scenes"
    assert asked.held is not None
    side = pictures[0].shape[0]
    view = View(asked.aspect)
    real = torch.stack([framed_picture(file, side, view=view)[0] for file in asked.held.first(n).files])
    return ((real + 1) * 127.5).round().to(torch.uint8), f"the {n} held-out pictures that the captions belong to"


def _without_pictures(asked: Asked) -> bool:
    return asked.held is None or asked.held.alone


def _renders(n: int, first_seed: int) -> Tensor:
    return stacked([render(draw_scene(seed, "held-out"), seed) for seed in range(first_seed, first_seed + n)])


def stacked(pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
    """(H, W, 3) pictures as (n, 3, H, W)."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def _measure(
    comparisons: Sequence[Comparison], networks: Mapping[Network, Callable[[Tensor], Tensor]], drawn: Drawn
) -> dict[str, Measured]:
    """Every distance of all pictures, and without each of up to 32 groups of them."""
    pictures = stacked(drawn.pictures)
    own = {name: networks[name](pictures) for name in {c.network for c in comparisons}}
    found = {}
    for c in comparisons:
        mine = own[c.network]
        without = tuple(c.distance(mine[some], c.reference[some]) for some in _without_each_group(len(pictures)))
        found[c.key] = Measured(c.distance(mine, c.reference), without)
    return found


def _figure(comparison: Comparison, own: Measured, teacher: Measured | None, n: int) -> Figure:
    figure = number(jackknife(own.value, own.without, n))
    names: dict[Network, str] = {"scenes_classifier": CLASSIFIER, "inception": INCEPTION}
    figure |= {"features": names[comparison.network], "reference": comparison.words}
    if comparison.floor is not None:
        figure["floor"] = comparison.floor
    if teacher is None or comparison.key.endswith("_to_teacher"):
        return figure
    apart = [a - b for a, b in zip(own.without, teacher.without, strict=True)]
    gap = jackknife(own.value - teacher.value, apart, n)
    return figure | {"difference": gap.value, "difference_low": gap.low, "difference_high": gap.high}


def _without_each_group(n: int) -> list[Tensor]:
    """The places of n pictures but those of one group, for each of up to 32 groups."""
    if n < _FEWEST:
        raise refuse("distances", f"{n} pictures", allowed=f"{_FEWEST} or more", hint="ask for more images")
    place = torch.arange(n)
    group = place % min(_GROUPS, n)
    return [place[group != number] for number in group.unique()]


def left_out_of(key: str, error: UserError) -> LeftOut:
    """A refusal as one entry of ``left_out``."""
    first, *_, last = str(error).splitlines()
    return {"score": key, "reason": first, "hint": last.strip().removeprefix("hint: ")}
