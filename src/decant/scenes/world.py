"""The embedded world: what a scene is, which scenes exist, and which are held out of training.

A scene is one or two things on a plain background. A thing has a shape, a colour and a size; two things stand in a
relation. 8 shapes x 8 colours x 2 sizes, 4 backgrounds, 4 relations: small enough to be known completely, large enough
that a network must compose (129,024 different two-thing scenes).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Shape = Literal["circle", "square", "triangle", "diamond", "cross", "ring", "star", "crescent"]
Colour = Literal["red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"]
Size = Literal["small", "large"]
Background = Literal["black", "gray", "white", "brown"]
Relation = Literal["left of", "right of", "above", "below"]
Split = Literal["train", "held-out"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
COLOURS: tuple[Colour, ...] = get_args(Colour)
SIZES: tuple[Size, ...] = get_args(Size)
BACKGROUNDS: tuple[Background, ...] = get_args(Background)
RELATIONS: tuple[Relation, ...] = get_args(Relation)

INVERSE: dict[Relation, Relation] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}


@dataclass(frozen=True)
class Thing:
    """One drawn object."""

    shape: Shape
    colour: Colour
    size: Size


@dataclass(frozen=True)
class Scene:
    """One or two things on a background; with two, ``things[0]`` is ``relation`` ``things[1]``."""

    background: Background
    things: tuple[Thing, ...]
    relation: Relation | None = None

    def mirrored(self) -> "Scene":
        """The same scene told from its second thing: *A left of B* is *B right of A*."""
        if self.relation is None:
            return self
        return Scene(self.background, self.things[::-1], INVERSE[self.relation])


def held_out_combination(shape: Shape, colour: Colour, relation: Relation | None) -> bool:
    """Whether training never shows this shape in this colour in this role (standing alone counts as a role).

    A Latin-square rule: 40 of the 320 combinations, spread evenly, and of every shape-colour pair at most one role of
    five, so that each pair is known from training but not in that place.
    """
    role = 0 if relation is None else 1 + RELATIONS.index(relation)
    return (SHAPES.index(shape) + 3 * COLOURS.index(colour) + role) % 8 == 0


def held_out(scene: Scene) -> bool:
    """Whether any thing of the scene stands in a held-out combination: such a scene never appears in training."""
    if scene.relation is None:
        thing = scene.things[0]
        return held_out_combination(thing.shape, thing.colour, None)
    first, second = scene.things
    return held_out_combination(first.shape, first.colour, scene.relation) or held_out_combination(
        second.shape, second.colour, INVERSE[scene.relation]
    )


def _thing(random: np.random.Generator) -> Thing:
    return Thing(
        SHAPES[random.integers(len(SHAPES))],
        COLOURS[random.integers(len(COLOURS))],
        SIZES[random.integers(len(SIZES))],
    )


def _any_scene(random: np.random.Generator, things: int) -> Scene:
    background = BACKGROUNDS[random.integers(len(BACKGROUNDS))]
    first = _thing(random)
    if things == 1:
        return Scene(background, (first,))
    second = _thing(random)
    while (second.shape, second.colour) == (first.shape, first.colour):
        second = _thing(random)
    return Scene(background, (first, second), RELATIONS[random.integers(len(RELATIONS))])


def draw_scene(seed: int, split: Split) -> Scene:
    """The scene of this seed in this split: a pure function; one scene in three has a single thing."""
    random = np.random.default_rng([seed, 0])
    things = 1 if random.random() < 1 / 3 else 2
    while True:
        scene = _any_scene(random, things)
        if held_out(scene) == (split == "held-out"):
            return scene


def scenes(n: int, split: Split, first_seed: int = 0) -> Iterator[tuple[int, Scene]]:
    """``n`` (seed, scene) pairs of a split."""
    for seed in range(first_seed, first_seed + n):
        yield seed, draw_scene(seed, split)
