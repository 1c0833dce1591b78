"""Read a picture back into what it shows, by classical image processing, and score it against its caption.

Background from the border, things as connected regions of what differs from it, colour from each region's core,
shape and size by fitting every shape's soft mask to the region's. Nothing is learned, so nothing can share a
network's blind spots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.color import rgb2lab

from decant.errors import refuse
from decant.scenes.captions import parse
from decant.scenes.render import BACKGROUND_RGB, COLOUR_RGB, RADIUS_PX, SIDE, Palette, coverage
from decant.scenes.world import BACKGROUNDS, SHAPES, Background, Colour, Relation, Scene, Shape, Size, Thing

Array = NDArray[np.float64]
Attribute = Literal["count", "background", "shape", "colour", "size", "relation"]
ATTRIBUTES: tuple[Attribute, ...] = ("count", "background", "shape", "colour", "size", "relation")

# Thresholds, in Lab distance, pixels and fractions; chosen on training renders, blurred and noised.
_BORDER_PX = 3
_BORDER_SPREAD_LAB = 14.0
_BORDER_AGREES = 0.85
_BACKGROUND_LAB = 22.0
_DIFFERS_LAB = 17.0
_SPECK_PX = 14
_COLOUR_LAB = 45.0
_WORST_FIT = 0.16


@dataclass(frozen=True)
class Seen:
    """A thing found in a picture and where its middle is, in pixels."""

    thing: Thing
    x: float
    y: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows; ``background`` is None where no plain background was found, ``unclear`` counts regions that
    are no thing of this world."""

    background: Background | None
    seen: tuple[Seen, ...]
    unclear: int = 0


@dataclass(frozen=True)
class Score:
    """Attributes that agree with the caption; ``exact`` when all do."""

    attributes: Mapping[Attribute, bool]

    @property
    def exact(self) -> bool:
        return all(self.attributes.values())

    @property
    def wrong(self) -> tuple[Attribute, ...]:
        return tuple(name for name, right in self.attributes.items() if not right)


def _lab(rgb: Array) -> Array:
    return rgb2lab(rgb / 255.0)


@lru_cache(maxsize=8)
def _labs(rgb: tuple[tuple[int, int, int], ...]) -> Array:
    """Colours (n, 3) in Lab."""
    return _lab(np.array([rgb], dtype=np.float64))[0]


def _background(rgb: Array) -> tuple[Background, Array] | None:
    """The plain background and its mean colour (3,), or None where the border is not plain."""
    b = _BORDER_PX
    border = np.concatenate([rgb[:b], rgb[-b:], rgb[:, :b].swapaxes(0, 1), rgb[:, -b:].swapaxes(0, 1)], axis=1)
    pixels = border.reshape(-1, 3)
    middle = np.median(pixels, axis=0)
    lab = _lab(middle[None, None])[0, 0]
    away = np.linalg.norm(_lab(pixels[None])[0] - lab, axis=1)
    if np.mean(away < _BORDER_SPREAD_LAB) < _BORDER_AGREES:
        return None
    distance = np.linalg.norm(_labs(tuple(BACKGROUND_RGB[ground] for ground in BACKGROUNDS)) - lab, axis=1)
    nearest = int(distance.argmin())
    return (BACKGROUNDS[nearest], middle) if distance[nearest] < _BACKGROUND_LAB else None


_WINDOW_PX = 48
_SOFTNESS_PX = (0.4, 0.9, 1.4)


@lru_cache(maxsize=1)
def _unit_areas() -> dict[Shape, float]:
    return {shape: float(coverage(shape, 20.0, (32.0, 32.0)).sum() / 400.0) for shape in SHAPES}


@lru_cache(maxsize=2048)
def _templates(shape: Shape, radius_px: float) -> Array:
    """A shape's mask at every softness, (3, 48, 48), its centroid in the middle of the window."""
    middle = _WINDOW_PX / 2
    y, x = ndimage.center_of_mass(coverage(shape, radius_px, (middle, middle), _WINDOW_PX))
    centre = (2 * middle - x - 0.5, 2 * middle - y - 0.5)
    mask = coverage(shape, radius_px, centre, _WINDOW_PX)
    return np.stack([ndimage.gaussian_filter(mask, sigma) for sigma in _SOFTNESS_PX])


def _centred(alpha: Array) -> Array:
    """A (48, 48) window of the soft mask with its centroid in the middle."""
    half = _WINDOW_PX // 2
    y, x = ndimage.center_of_mass(alpha)
    window = np.pad(alpha, half)[int(y) : int(y) + _WINDOW_PX, int(x) : int(x) + _WINDOW_PX]
    return ndimage.shift(window, (int(y) - y - 0.5, int(x) - x - 0.5), order=1)


def _misfit(alpha: Array, shape: Shape) -> tuple[float, float]:
    """How badly a shape fits a centred soft mask (squared difference over area), and its radius in px.

    The misfit is that of the best softness; the radius follows from the area, which softness leaves alone.
    """
    area = float(alpha.sum())
    radius = float(np.clip(np.sqrt(area / _unit_areas()[shape]), 3.0, 16.0))
    difference = _templates(shape, round(radius * 4) / 4) - alpha
    return float(np.square(difference).sum(axis=(1, 2)).min()) / area, radius


def _soft_mask(rgb: Array, region: NDArray[np.bool_], ground: Array, paint: Array) -> Array:
    """How much of each pixel near the region is paint rather than ground, in [0, 1]."""
    direction = paint - ground
    alpha = np.clip((rgb - ground) @ direction / (direction @ direction), 0, 1)
    near = ndimage.binary_dilation(region, iterations=2)
    return np.where(near, np.where(alpha > 0.08, alpha, 0), 0)


def _thing(rgb: Array, region: NDArray[np.bool_], ground: Array, colours: Palette) -> Seen | None:
    depth = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    core = region & (depth >= min(2.0, float(depth.max())))
    paint = np.median(rgb[core], axis=0)
    distance = np.linalg.norm(_labs(tuple(colours.values())) - _lab(paint[None, None])[0, 0], axis=1)
    alpha = _soft_mask(rgb, region, ground, paint)
    centred = _centred(alpha)
    fits = [_misfit(centred, shape) for shape in SHAPES]
    best = int(np.argmin([misfit for misfit, _ in fits]))
    if distance.min() > _COLOUR_LAB or fits[best][0] > _WORST_FIT:
        return None
    border = (RADIUS_PX["small"][1] + RADIUS_PX["large"][0]) / 2
    size: Size = "small" if fits[best][1] < border else "large"
    y, x = ndimage.center_of_mass(alpha)
    colour = cast(Colour, list(colours)[int(distance.argmin())])
    return Seen(Thing(SHAPES[best], colour, size), float(x), float(y))


def read(picture: NDArray[np.uint8], colours: Palette = COLOUR_RGB) -> Reading:  # type: ignore[assignment]
    """What a (64, 64, 3) uint8 picture shows; of ``colours`` the nearest is named, by the same thresholds for any.

    Raises:
        UserError: the picture has another shape.
    """
    if picture.shape != (SIDE, SIDE, 3):
        raise refuse("picture", picture.shape, allowed=f"({SIDE}, {SIDE}, 3)", hint="scenes are 64 x 64 RGB")
    rgb = ndimage.gaussian_filter(picture.astype(np.float64), (0.5, 0.5, 0))
    found = _background(rgb)
    if found is None:
        return Reading(None, ())
    name, ground = found
    smooth = ndimage.gaussian_filter(rgb, (0.5, 0.5, 0))
    differs = np.linalg.norm(_lab(smooth) - _lab(ground[None, None]), axis=-1) > _DIFFERS_LAB
    regions, n = ndimage.label(differs)
    masks = [regions == index for index in range(1, n + 1)]
    things = [_thing(rgb, mask, ground, colours) for mask in masks if mask.sum() >= _SPECK_PX]
    seen = tuple(thing for thing in things if thing is not None)
    return Reading(name, seen, unclear=len(things) - len(seen))


def _relation(first: Seen, second: Seen) -> Relation:
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def _agreement(scene: Scene, seen: Sequence[Seen]) -> dict[Attribute, bool]:
    """Attributes that agree when the scene's things are taken to be the seen ones in this order."""
    pairs = list(zip(scene.things, seen, strict=False))
    whole = len(seen) >= len(scene.things)
    related = scene.relation is None or (whole and _relation(seen[0], seen[1]) == scene.relation)
    return {
        "shape": whole and all(told.shape == found.thing.shape for told, found in pairs),
        "colour": whole and all(told.colour == found.thing.colour for told, found in pairs),
        "size": whole and all(told.size == found.thing.size for told, found in pairs),
        "relation": related,
    }


def score(reading: Reading, scene: Scene) -> Score:
    """Compare what was read with what was asked for. Missing, extra and unclear things fail ``count``."""
    orders = [reading.seen, reading.seen[::-1]]
    best = max((_agreement(scene, order) for order in orders), key=lambda agreement: sum(agreement.values()))
    count = len(reading.seen) == len(scene.things) and not reading.unclear
    ground = reading.background == scene.background
    return Score({"count": count, "background": ground, **best})


def check(picture: NDArray[np.uint8], text: str) -> Score:
    """Score a (64, 64, 3) uint8 picture against a caption of the scenes grammar."""
    return score(read(picture), parse(text))
