"""Scenes, captions and the held-out split."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decant.errors import UserError
from decant.models.scenes_teacher import END, new_tokenizer
from decant.scenes.captions import caption, parse
from decant.scenes.folder import draw_folder
from decant.scenes.render import render
from decant.scenes.world import (
    COLOURS,
    RELATIONS,
    SHAPES,
    Scene,
    draw_scene,
    held_out,
    held_out_combination,
    scenes,
)

ROLES = (None, *RELATIONS)


def test_split_is_disjoint_by_combination() -> None:
    """No training scene holds a held-out combination, told either way round; every held-out scene holds one."""

    def combinations(scene: Scene) -> set[tuple[str, str, str | None]]:
        told = (scene, scene.mirrored())
        return {(s.things[0].shape, s.things[0].colour, s.relation) for s in told}

    trained = set().union(*(combinations(s) for _, s in scenes(4000, "train")))
    held = [combinations(s) for _, s in scenes(1000, "held-out")]
    assert all(not held_out_combination(*c) for c in trained)
    assert all(any(held_out_combination(*c) for c in pair) for pair in held)
    assert all(pair - trained for pair in held)


def test_held_out_is_spread_evenly() -> None:
    """Every shape, colour and role is held out somewhere, and each shape-colour pair in at most one of five roles."""
    out = [(s, c, r) for s in SHAPES for c in COLOURS for r in ROLES if held_out_combination(s, c, r)]
    assert len(out) == 40
    assert {s for s, _, _ in out} == set(SHAPES)
    assert {c for _, c, _ in out} == set(COLOURS)
    assert {r for _, _, r in out} == set(ROLES)
    assert len({(s, c) for s, c, _ in out}) == len(out)


@given(st.integers(0, 2**31), st.integers(0, 2**31))
def test_caption_is_read_back(seed: int, phrasing: int) -> None:
    scene = draw_scene(seed, "held-out")
    assert parse(caption(scene, phrasing)) in (scene, scene.mirrored())


@given(st.text(max_size=60))
def test_other_text_is_refused_or_parsed(text: str) -> None:
    try:
        scene = parse(text)
    except UserError as error:
        assert "hint:" in str(error)
    else:
        assert 1 <= len(scene.things) <= 2


def test_captions_have_several_phrasings() -> None:
    scene = draw_scene(5, "train")
    assert len({caption(scene, seed) for seed in range(200)}) >= 4


def test_render_depends_on_scene_and_seed_alone() -> None:
    scene = draw_scene(11, "train")
    assert np.array_equal(render(scene, 3), render(scene, 3))
    assert not np.array_equal(render(scene, 3), render(scene, 4))
    assert render(scene, 3).shape == (64, 64, 3)


def test_mirrored_scene_says_the_same() -> None:
    for _, scene in scenes(300, "train"):
        assert held_out(scene) == held_out(scene.mirrored())
        assert scene.mirrored().mirrored() == scene


@given(st.text(max_size=40))
def test_any_text_tokenises(text: str) -> None:
    """Byte level: no text meets an unknown token, and what is decoded is what the tokenizer's own cleaning leaves."""
    tokenizer = _tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_tokens_to_ids(END) not in ids[1:-1] or END in text.lower()


def test_captions_are_short_in_tokens() -> None:
    tokenizer = _tokenizer()
    longest = max(len(tokenizer(caption(s, k))["input_ids"]) for k, s in scenes(500, "held-out"))
    assert longest <= 24


_KEPT: list = []


def _tokenizer():  # noqa: ANN202
    if not _KEPT:
        _KEPT.append(new_tokenizer(caption(s, k) for k, s in scenes(2000, "train")))
    return _KEPT[0]


def test_a_folder_is_drawn_whole_or_not_at_all(tmp_path: Path) -> None:
    """A drawing that died leaves no folder behind, and the next one does not stumble over what it left."""

    def die(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_folder(tmp_path / "scenes", 120, "train", progress=die)
    assert not (tmp_path / "scenes").exists()
    draw_folder(tmp_path / "scenes", 20, "train")
    lines = [json.loads(line) for line in (tmp_path / "scenes" / "metadata.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == [f"{index:06d}.png" for index in range(20)]
    with pytest.raises(UserError, match="not empty"):
        draw_folder(tmp_path / "scenes", 20, "train")
