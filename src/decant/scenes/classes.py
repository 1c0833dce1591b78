"""What a scene says, as class numbers that a network can be asked for."""

from decant.scenes.world import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene

# Of the left or upper thing and of the other: shape, colour, size; then background, and arrangement.
QUESTIONS = ("shape", "colour", "size", "shape", "colour", "size", "background", "arrangement")
CLASSES = (len(SHAPES), len(COLOURS), len(SIZES)) * 2 + (len(BACKGROUNDS), 3)
NOTHING = -100  # no second thing: cross-entropy's own number for what is not asked


def classes(scene: Scene) -> list[int]:
    """Class numbers of a scene, one a question; arrangement is 0 alone, 1 side by side, 2 one above the other."""
    told = scene.mirrored() if scene.relation in ("right of", "below") else scene
    row = []
    for thing in told.things:
        row += [SHAPES.index(thing.shape), COLOURS.index(thing.colour), SIZES.index(thing.size)]
    row += [NOTHING] * (6 - len(row))
    arrangement = {None: 0, "left of": 1, "above": 2}[told.relation]
    return [*row, BACKGROUNDS.index(scene.background), arrangement]
