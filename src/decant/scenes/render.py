"""Draw a scene: 64 x 64 pixels, anti-aliased by signed distance, a function of (scene, seed) alone."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from decant.scenes.world import Background, Colour, Scene, Shape, Size

SIDE = 64
Palette = Mapping[str, tuple[int, int, int]]
Array = NDArray[np.float64]

COLOUR_RGB: dict[Colour, tuple[int, int, int]] = {
    "red": (215, 30, 35),
    "orange": (250, 135, 10),
    "yellow": (245, 225, 50),
    "green": (35, 155, 60),
    "cyan": (60, 210, 225),
    "blue": (35, 70, 215),
    "purple": (130, 40, 180),
    "pink": (250, 140, 200),
}
BACKGROUND_RGB: dict[Background, tuple[int, int, int]] = {
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "white": (240, 240, 240),
    "brown": (95, 62, 35),
}
# Radius in pixels, low and high: drawn uniformly between the two.
RADIUS_PX: dict[Size, tuple[float, float]] = {"small": (7.2, 8.0), "large": (11.2, 12.0)}

# Things stand on a grid as wide as the autoencoder's cells, so that a small network spends its steps on what a thing is
# and not on where between two cells it lies. The two of a pair stand 16 px from the middle along the pair's axis.
_GRID_PX, _APART_PX = 8.0, 16.0


def _star() -> list[tuple[float, float]]:
    turns = np.arange(10) * np.pi / 5 - np.pi / 2
    reach = np.where(np.arange(10) % 2 == 0, 1.15, 0.48)
    return [(float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(reach, turns, strict=True)]


def _cross(arm: float) -> list[tuple[float, float]]:
    quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
    turned = [[(-y, x) for x, y in quarter], [(-x, -y) for x, y in quarter], [(y, -x) for x, y in quarter]]
    return [*quarter, *turned[0], *turned[1], *turned[2]]


POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -1.05), (1.05, 0.8), (-1.05, 0.8)],
    "diamond": [(0.0, -1.1), (0.85, 0.0), (0.0, 1.1), (-0.85, 0.0)],
    "cross": _cross(0.34),
    "star": _star(),
}


def _polygon_distance(x: Array, y: Array, corners: list[tuple[float, float]]) -> Array:
    """Signed distance to a polygon, negative inside: nearest edge, and even-odd crossings for the sign."""
    nearest = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (x - ax - along * ex) ** 2 + (y - ay - along * ey) ** 2)
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * ex / ey)
    distance = np.sqrt(nearest)
    return np.where(inside, -distance, distance)


def distance(shape: Shape, x: Array, y: Array) -> Array:
    """Signed distance of points to the shape of radius 1 at the origin (y points down)."""
    match shape:
        case "circle":
            return np.hypot(x, y) - 0.95
        case "ring":
            return np.abs(np.hypot(x, y) - 0.76) - 0.25
        case "crescent":
            return np.maximum(np.hypot(x, y) - 1.05, 0.85 - np.hypot(x - 0.55, y))
        case _:
            return _polygon_distance(x, y, POLYGONS[shape])


def coverage(shape: Shape, radius_px: float, centre_px: tuple[float, float], side: int = SIDE) -> Array:
    """How much of every pixel the shape covers, in [0, 1], shape (side, side); ``centre_px`` is (x, y)."""
    y, x = np.mgrid[:side, :side] + 0.5
    x, y = (x - centre_px[0]) / radius_px, (y - centre_px[1]) / radius_px
    return np.clip(0.5 - distance(shape, x, y) * radius_px, 0, 1)


def _place(scene: Scene, random: np.random.Generator) -> list[tuple[float, float]]:
    middle = SIDE / 2
    if scene.relation is None:
        dx, dy = _GRID_PX * random.integers(-1, 2, 2)
        return [(middle + dx, middle + dy)]
    places = []
    sign = -1 if scene.relation in ("left of", "above") else 1
    for side in (sign, -sign):
        along, across = side * _APART_PX, _GRID_PX * random.integers(-1, 2)
        dx, dy = (along, across) if scene.relation in ("left of", "right of") else (across, along)
        places.append((middle + dx, middle + dy))
    return places


def places(scene: Scene, seed: int) -> list[tuple[float, float]]:
    """Where `render` puts the things of a scene, (x, y) in pixels."""
    return _place(scene, np.random.default_rng([seed, 2]))


def render(scene: Scene, seed: int, colours: Palette = COLOUR_RGB) -> NDArray[np.uint8]:  # type: ignore[assignment]
    """Draw the scene as (64, 64, 3) uint8; the seed decides places and exact radii.

    ``colours``: of things, by name; a measurement may know more of them than the world does.
    """
    random = np.random.default_rng([seed, 2])
    ground = np.asarray(BACKGROUND_RGB[scene.background], dtype=np.float64)
    picture = np.broadcast_to(ground, (SIDE, SIDE, 3)).copy()
    for thing, centre in zip(scene.things, _place(scene, random), strict=True):
        radius = random.uniform(*RADIUS_PX[thing.size])
        mask = coverage(thing.shape, radius, centre)[..., None]
        picture = picture * (1 - mask) + np.asarray(colours[thing.colour], dtype=np.float64) * mask
    return np.clip(np.round(picture), 0, 255).astype(np.uint8)
