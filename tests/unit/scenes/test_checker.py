"""The checker must read true pictures right, and must be able to fail: for each attribute by itself."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from decant.errors import UserError
from decant.scenes.captions import caption
from decant.scenes.checker import ATTRIBUTES, Reading, check, read, score
from decant.scenes.render import render
from decant.scenes.world import BACKGROUNDS, COLOURS, INVERSE, RELATIONS, SHAPES, SIZES, Scene, Thing, scenes

N = 2000
HELD_OUT = tuple(scenes(N, "held-out", first_seed=500_000))


def _soft_and_noisy(picture: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    soft = ndimage.gaussian_filter(picture / 255.0, (1.0, 1.0, 0))
    noisy = soft + np.random.default_rng(seed).normal(0, 0.05, soft.shape)
    return np.clip(np.round(noisy * 255), 0, 255).astype(np.uint8)


@cache
def _readings() -> tuple[Reading, ...]:
    return tuple(read(render(scene, seed)) for seed, scene in HELD_OUT)


def _other(value: str, values: tuple[str, ...], random: np.random.Generator) -> str:
    rest = [v for v in values if v != value]
    return rest[random.integers(len(rest))]


def _changed_thing(thing: Thing, attribute: str, random: np.random.Generator) -> Thing:
    values = {"shape": SHAPES, "colour": COLOURS, "size": SIZES}[attribute]
    return replace(thing, **{attribute: _other(getattr(thing, attribute), values, random)})


def _with_one_wrong(scene: Scene, attribute: str, seed: int) -> Scene | None:  # noqa: PLR0911
    """The scene with exactly this attribute changed, or None where it has no such attribute."""
    random = np.random.default_rng(seed)
    things = list(scene.things)
    match attribute:
        case "background":
            return replace(scene, background=_other(scene.background, BACKGROUNDS, random))
        case "relation":
            if scene.relation is None:
                return None
            return replace(scene, relation=_other(scene.relation, RELATIONS, random))
        case "missing":
            return replace(scene, things=(things[0],), relation=None) if scene.relation else None
        case "extra":
            if scene.relation is not None:
                return None
            return replace(scene, things=(things[0], Thing("ring", "cyan", "small")), relation="above")
        case _:
            which = int(random.integers(len(things)))
            things[which] = _changed_thing(things[which], attribute, random)
            return replace(scene, things=tuple(things))


@pytest.mark.slow
def test_true_renders_are_read_right() -> None:
    right = [score(reading, scene).exact for reading, (_, scene) in zip(_readings(), HELD_OUT, strict=True)]
    assert np.mean(right) >= 0.995


@pytest.mark.slow
@pytest.mark.parametrize("attribute", ["shape", "colour", "size", "background", "relation", "missing", "extra"])
def test_a_caption_wrong_in_one_attribute_fails(attribute: str) -> None:
    passed, asked = 0, 0
    for reading, (seed, scene) in zip(_readings(), HELD_OUT, strict=True):
        wrong = _with_one_wrong(scene, attribute, seed)
        if wrong is not None:
            asked += 1
            passed += score(reading, wrong).exact
    assert asked > 500
    assert passed / asked <= 0.01


@pytest.mark.slow
def test_soft_and_noisy_renders_are_still_read() -> None:
    right = [score(read(_soft_and_noisy(render(s, k), k)), s).exact for k, s in HELD_OUT]
    assert np.mean(right) >= 0.97


def test_noise_and_emptiness_score_nothing() -> None:
    random = np.random.default_rng(0)
    empty = [np.full((64, 64, 3), shade, np.uint8) for shade in (15, 128, 240)]
    noise = [random.integers(0, 256, (64, 64, 3)).astype(np.uint8) for _ in range(100)]
    grey_noise = [np.clip(random.normal(128, 40, (64, 64, 1)).repeat(3, 2), 0, 255).astype(np.uint8) for _ in range(50)]
    low = [ndimage.zoom(random.integers(0, 256, (8, 8, 3)), (8, 8, 1), order=1).astype(np.uint8) for _ in range(50)]
    pictures = empty + noise + grey_noise + low
    assert not any(score(read(p), s).exact for p in pictures for _, s in HELD_OUT[:50])


def test_mirrored_caption_is_the_same_scene() -> None:
    for reading, (_, scene) in zip(_some(), HELD_OUT[:100], strict=True):
        assert score(reading, scene).exact == score(reading, scene.mirrored()).exact


def test_told_the_wrong_way_round_fails() -> None:
    for reading, (_, scene) in zip(_some(), HELD_OUT[:100], strict=True):
        if scene.relation is not None:
            swapped = replace(scene, relation=INVERSE[scene.relation])
            assert not score(reading, swapped).exact


@cache
def _some() -> tuple[Reading, ...]:
    return tuple(read(render(scene, seed)) for seed, scene in HELD_OUT[:100])


def test_an_extra_thing_fails() -> None:
    for seed, scene in HELD_OUT[:60]:
        if scene.relation is None:
            picture = render(scene, seed).copy()
            corner = np.abs(picture[:12, :12].astype(int) - picture[0, 0]).max() < 30
            if corner:
                picture[3:11, 3:11] = (255, 0, 255) if scene.background != "brown" else (0, 255, 255)
                result = score(read(picture), scene)
                assert not result.exact
                assert "count" in result.wrong


def test_check_reads_the_caption_and_names_every_attribute() -> None:
    seed, scene = HELD_OUT[0]
    result = check(render(scene, seed), caption(scene, seed))
    assert result.exact
    assert tuple(result.attributes) and set(result.attributes) == set(ATTRIBUTES)


def test_a_picture_of_another_size_is_refused() -> None:
    with pytest.raises(UserError, match="hint:"):
        read(np.zeros((32, 32, 3), np.uint8))
