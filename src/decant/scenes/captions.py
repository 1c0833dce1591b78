"""The caption grammar: a scene in words, every attribute stated, and back again."""

import re

import numpy as np

from decant.errors import refuse
from decant.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Relation,
    Scene,
    Thing,
)

# {a} and {b} are things, {r} the relation, {g} the background.
ALONE = (
    "a {a} on a {g} background",
    "a {a}, {g} background",
    "on a {g} background, a {a}",
    "one {a} in front of {g}",
)
TOGETHER = (
    "a {a} {r} a {b} on a {g} background",
    "a {a} {r} a {b}, {g} background",
    "on a {g} background, a {a} {r} a {b}",
    "one {a} that is {r} one {b} in front of {g}",
)
SPOKEN: dict[Relation, tuple[str, ...]] = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
}


def _words(thing: Thing) -> str:
    return f"{thing.size} {thing.colour} {thing.shape}"


def caption(scene: Scene, seed: int) -> str:
    """Say the scene in one of the phrasings; *A left of B* may also be told as *B right of A*."""
    random = np.random.default_rng([seed, 1])
    if scene.relation is None:
        form = ALONE[random.integers(len(ALONE))]
        return form.format(a=_words(scene.things[0]), g=scene.background)
    told = scene.mirrored() if random.random() < 0.5 else scene
    assert told.relation is not None
    spoken = SPOKEN[told.relation]
    form = TOGETHER[random.integers(len(TOGETHER))]
    return form.format(
        a=_words(told.things[0]),
        b=_words(told.things[1]),
        r=spoken[random.integers(len(spoken))],
        g=told.background,
    )


_THING = re.compile(rf"\b({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
_RELATION = re.compile(rf"\b({'|'.join(RELATIONS)})\b")
_BACKGROUND = re.compile(
    rf"\bon a ({'|'.join(BACKGROUNDS)}) background\b|, ({'|'.join(BACKGROUNDS)}) background\b"
    rf"|\bin front of ({'|'.join(BACKGROUNDS)})\b"
)


def parse(text: str) -> Scene:
    """Read a caption of this grammar back into its scene.

    Raises:
        UserError: the text does not state one or two things, their relation and the background.
    """
    spoken = text.strip().lower()
    things = tuple(Thing(shape, colour, size) for size, colour, shape in _THING.findall(spoken))
    relations = _RELATION.findall(spoken)
    grounds = [next(filter(None, groups)) for groups in _BACKGROUND.findall(spoken)]
    if len(things) not in (1, 2) or len(relations) != len(things) - 1 or len(grounds) != 1:
        raise refuse(
            "scene caption",
            repr(text),
            allowed="one or two things with size, colour and shape, their relation, and the background",
            hint="for example 'a small red circle left of a large blue star on a white background'",
        )
    return Scene(grounds[0], things, relations[0] if relations else None)
