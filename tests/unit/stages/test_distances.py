"""FID and KID as an evaluation gives them: of renders, whose distances are known to be small, and of spoiled ones."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from decant.data.picture import Aspect
from decant.scenes.captions import caption
from decant.scenes.folder import draw_folder
from decant.scenes.render import render
from decant.scenes.world import scenes
from decant.stages.asked import Asked, HeldOut, asked
from decant.stages.distances import Distances, distances
from decant.stages.scoring import Drawn

N = 64
SCENES = list(scenes(N, "held-out", first_seed=1_000_000))
ASKED = Asked(tuple(caption(s, k) for k, s in SCENES), tuple(k for k, _ in SCENES), scenes=True)
RIGHT = [render(s, k) for k, s in SCENES]
PALE = [(p // 2 + 60).astype(np.uint8) for p in RIGHT]
KEYS = {"fid_scenes_classifier", "kid_scenes_classifier"}


@pytest.fixture(scope="module")
def apart() -> Distances:
    return distances(ASKED, Drawn.of(RIGHT, ASKED))


def test_real_pictures_are_as_near_as_real_pictures(apart: Distances) -> None:
    found = apart.figures(Drawn.of(RIGHT, ASKED), teacher=True)
    assert found.keys() == KEYS
    for figure in found.values():
        assert figure["low"] < figure["value"] < figure["high"] and figure["n"] == N
        assert figure["low"] < figure["floor"] < figure["high"]
        assert "not Inception" in figure["features"] and "64 renders" in figure["reference"]
        assert (figure["unit"], figure["better"]) == ("number", "lower")
    assert found["kid_scenes_classifier"]["low"] < 0 < found["kid_scenes_classifier"]["high"]


def test_spoiled_pictures_are_far_beyond_doubt(apart: Distances) -> None:
    found = apart.figures(Drawn.of(PALE, ASKED))
    assert found.keys() == KEYS | {"fid_scenes_classifier_to_teacher"}
    for key in KEYS:
        assert found[key]["low"] > found[key]["floor"]
        assert 0 < found[key]["difference_low"] < found[key]["difference"] < found[key]["difference_high"]
    assert found["fid_scenes_classifier_to_teacher"]["low"] > 0


def test_the_teachers_own_pictures_differ_in_nothing(apart: Distances) -> None:
    found = apart.figures(Drawn.of(RIGHT, ASKED))
    assert found["fid_scenes_classifier"]["difference"] == 0 == found["kid_scenes_classifier"]["difference_high"]
    assert found["fid_scenes_classifier_to_teacher"]["value"] == pytest.approx(0, abs=1e-3)


def test_what_is_left_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # where Inception's weights would be
    few = Drawn.of(RIGHT[:20], Asked(ASKED.captions[:20], ASKED.seeds[:20], scenes=True))
    left = distances(ASKED, few)
    assert {c.key for c in left.comparisons} == {"kid_scenes_classifier"}
    reasons = {item["score"]: item for item in left.left_out}
    few_pictures = {"fid_scenes_classifier", "fid_scenes_classifier_to_teacher"}
    assert reasons.keys() == few_pictures | {"fid_inception", "lpips_to_teacher", "clip_score"}
    assert "20 and 20 pictures" in reasons["fid_scenes_classifier"]["reason"]
    assert all(item["hint"] for item in reasons.values())
    none = Drawn.of(RIGHT[:3], Asked(ASKED.captions[:3], ASKED.seeds[:3], scenes=True))
    assert not distances(ASKED, none).comparisons
    large = Drawn.of([np.zeros((256, 256, 3), np.uint8)] * N, ASKED)
    assert not distances(ASKED, large).comparisons


def test_pictures_of_a_folder_are_compared_with_its_own(tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "data", 40, "train", first_seed=77)
    ask = asked("data", 16, HeldOut(folder, 0.5, 0, 0.1))
    assert ask.held is not None
    lines = map(json.loads, (folder / "metadata.jsonl").read_text().splitlines())
    files = {line["text"]: line["file_name"] for line in lines}
    own = [np.array(Image.open(folder / files[text])) for text in ask.captions]
    n = len(own)
    found = distances(ask, Drawn.of(own, ask))
    (kid,) = found.comparisons
    assert kid.words == f"the {n} held-out pictures that the captions belong to" and kid.floor is None
    from decant.scenes.classifier.network import features, shipped

    same = features(shipped(), torch.from_numpy(np.stack(own)).permute(0, 3, 1, 2))
    assert torch.allclose(kid.reference, same, atol=1e-4)


@pytest.mark.parametrize("aspect", ["crop", "letterbox", "stretch"])
def test_real_pictures_become_squares_as_training_had_it(tmp_path: Path, aspect: Aspect) -> None:
    """Pictures twice as wide as high, beside what Pillow makes of them."""
    folder = draw_folder(tmp_path / "data", 40, "train", first_seed=77)
    for file in folder.glob("*.png"):
        wide = Image.new("RGB", (128, 64), "red")
        wide.paste(Image.open(file), (10, 0))
        wide.save(file)
    ask = asked("data", 16, HeldOut(folder, 0.5, 0, 0.1, aspect=aspect))
    assert ask.held is not None
    expected = []
    for file in ask.held.first(16).files:
        image = Image.open(io.BytesIO(file.read_bytes()))
        match aspect:
            case "crop":
                square = image.crop((32, 0, 96, 64))
            case "letterbox":
                square = Image.new("RGB", (64, 64))
                square.paste(image.resize((64, 32), Image.Resampling.LANCZOS), (0, 16))
            case "stretch":
                square = image.resize((64, 64), Image.Resampling.LANCZOS)
        expected.append(np.array(square))
    n = len(expected)
    (kid,) = distances(ask, Drawn.of([np.ascontiguousarray(p) for p in RIGHT[:n]], ask)).comparisons
    from decant.scenes.classifier.network import features, shipped

    same = features(shipped(), torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2))
    assert torch.allclose(kid.reference, same, atol=1e-4)
