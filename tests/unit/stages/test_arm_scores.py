"""What a comparison's scores see: collapse, damage, what the teacher's pictures get with other prompts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.models import alexnet
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from decant.metrics import clip_score as clip_module
from decant.metrics.clip_score import clip, clip_scores
from decant.metrics.lpips import lpips, lpips_distances
from decant.models.shipped import shipped_folder
from decant.scenes.captions import caption
from decant.scenes.render import render
from decant.scenes.world import Scene, Thing
from decant.stages.arm_scores import Judge, Judged
from decant.stages.compare import asked

IMAGES = 4
SCENES = [Scene("white", (Thing("circle", colour, "large"),), None) for colour in ("red", "blue", "green")]
ASK = asked([caption(scene, 0) for scene in SCENES], IMAGES, 42)
Picture = NDArray[np.uint8]


def shifted(picture: Picture, x: int) -> Picture:
    """The scene with its thing elsewhere: still right."""
    return np.roll(picture, x, axis=1)


RIGHT = [render(scene, 0) for scene in SCENES]
VARIED = [shifted(picture, 3 * k - 4) for picture in RIGHT for k in range(IMAGES)]
COLLAPSED = [picture for picture in RIGHT for _ in range(IMAGES)]


def judged(*arms: list[Picture], images: int = IMAGES) -> list[Judged]:
    judge = Judge.of(ASK, images)
    return [judge.judge(pictures) for pictures in arms]


def test_a_collapsed_student_is_seen_by_diversity_and_by_nothing_else() -> None:
    teacher, student = (arm.figures for arm in judged(VARIED, COLLAPSED))
    assert student["scene_accuracy"]["value"] == teacher["scene_accuracy"]["value"] == 1
    assert student["scene_accuracy"]["relative_to_teacher"] == 1
    for name in ("diversity", "diversity_of_right"):
        assert teacher[name]["value"] > 0 == student[name]["value"]
        assert student[name]["relative_high"] == 0 and student[name]["n"] == 3
    apart = [3, 6, 9, 3, 6, 3]  # pixels between shifts of -4, -1, 2 and 5
    assert teacher["diversity_of_right"]["value"] == pytest.approx(np.mean(apart), abs=0.05)


def test_damage_is_no_variety_among_right_pictures() -> None:
    """Two of each four are noise: coarse diversity rises, that of the right ones does not."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    damaged = [noise[k // IMAGES] if k % IMAGES > 1 else picture for k, picture in enumerate(COLLAPSED)]
    teacher, student = (arm.figures for arm in judged(VARIED, damaged))
    assert student["diversity"]["value"] > teacher["diversity"]["value"]
    assert student["diversity_of_right"]["value"] == 0
    assert student["scene_accuracy"]["value"] == 0.5 == student["scene_accuracy"]["relative_to_teacher"]


def test_where_no_two_are_right_there_is_no_diversity_of_right() -> None:
    black = [np.zeros((64, 64, 3), np.uint8)] * len(VARIED)
    _, student = judged(VARIED, black)
    assert "diversity_of_right" not in student.figures and student.figures["scene_accuracy"]["value"] == 0
    assert student.figures["scene_accuracy"]["high"] > 0.3, "three prompts prove little"
    assert {"relative_to_teacher", "difference"}.isdisjoint(student.figures["distance_to_teacher"])


def test_one_picture_a_prompt_has_no_diversity_and_says_so() -> None:
    one = asked(ASK.captions[::IMAGES], 1, 42)
    judge = Judge.of(one, 1)
    found = judge.judge(RIGHT)
    assert not any(name.startswith("diversity") for name in found.figures)
    assert "one picture" in next(item["reason"] for item in judge.left_out if item["score"] == "diversity")


def test_a_picture_is_the_same_whatever_else_is_asked_for() -> None:
    few, many = asked(ASK.captions[:1], 2, 42), ASK
    assert few.seeds == many.seeds[:2] and len(set(many.seeds)) == len(many.seeds)
    assert asked(ASK.captions[:1], 2, 43).seeds != few.seeds


@pytest.fixture
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AlexNet and a small CLIP, of random weights, where the published ones would be."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(alexnet().state_dict(), tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth")
    tokenizer = CLIPTokenizer.from_pretrained(shipped_folder("scenes") / "tokenizer")
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 32}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"image_size": 32, "patch_size": 8}
    CLIPModel(
        CLIPConfig(text_config={**sizes, **text}, vision_config={**sizes, **vision}, projection_dim=16)
    ).save_pretrained(tmp_path / "clip")
    seen = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(seen, tokenizer).save_pretrained(tmp_path / "clip")
    monkeypatch.setattr(clip_module, "MODEL", str(tmp_path / "clip"))


@pytest.mark.usefixtures("networks")
def test_clip_score_and_lpips_where_their_weights_are() -> None:
    teacher, student = (arm.figures for arm in judged(VARIED, COLLAPSED))
    network = clip()
    own = clip_scores(network, VARIED, ASK.captions)
    assert teacher["clip_score"]["value"] == pytest.approx(np.mean(own), abs=1e-4)
    other = [*ASK.captions[IMAGES:], *ASK.captions[:IMAGES]]
    shuffled = np.mean([clip_scores(network, [p], [c])[0] for p, c in zip(VARIED, other, strict=True)])
    assert teacher["clip_score"]["shuffled"] == pytest.approx(shuffled, abs=1e-3)
    ratio = student["clip_score"]["value"] / teacher["clip_score"]["value"]
    assert student["clip_score"]["relative_to_teacher"] == pytest.approx(ratio)
    tensors = torch.from_numpy(np.stack(VARIED)).movedim(3, 1)
    pairs = [(a + g, b + g) for g in range(0, 12, IMAGES) for a in range(IMAGES) for b in range(a + 1, IMAGES)]
    network_of_pairs = lpips()
    apart = [float(lpips_distances(network_of_pairs, tensors[a : a + 1], tensors[b : b + 1])) for a, b in pairs]
    assert teacher["diversity_lpips"]["value"] == pytest.approx(np.mean(apart), rel=1e-4)
    assert student["diversity_lpips"]["value"] == 0 < student["lpips_to_teacher"]["value"]
