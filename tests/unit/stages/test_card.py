"""Cards of students: valid for the hub, nothing made up, and what became of the safety checker."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from huggingface_hub import ModelCard
from transformers import CLIPConfig, CLIPImageProcessor

from decant.models.load import place_of
from decant.recipe.runner import run_stage
from decant.scenes.folder import draw_folder
from decant.stages.all import STAGES

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def cut(teacher: str | Path, out: Path, student: str = "bk-base") -> Path:
    settings = {"student": student}
    source = str(teacher)
    models: dict[str, str | Path] = {"teacher": source}
    run_stage("prune", STAGES["prune"], settings, teacher=source, models=models, data=None, seed=0, out=out, talk=print)
    return out


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "decant.json").read_text())


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped teacher under another name, small enough to be cut in every test."""
    return shutil.copytree(place_of("scenes"), tmp_path_factory.mktemp("teachers") / "my-teacher")


@pytest.fixture
def teacher(scenes: Path, tmp_path: Path) -> Path:
    return shutil.copytree(scenes, tmp_path / "my-teacher")


@pytest.fixture(scope="module")
def checked(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a safety checker, as plain diffusers saves it."""
    torch.manual_seed(0)
    vision = {**SMALL, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=SMALL, vision_config=vision, projection_dim=16)
    pipeline = StableDiffusionPipeline.from_pretrained(scenes, safety_checker=None)
    whole = StableDiffusionPipeline(
        **{
            **pipeline.components,
            "safety_checker": StableDiffusionSafetyChecker(config),
            "feature_extractor": CLIPImageProcessor(size=32, crop_size=32),
        }
    )
    where = tmp_path_factory.mktemp("checked") / "guarded"
    whole.save_pretrained(where)
    return where


@pytest.mark.parametrize(
    ("front", "data"),
    [
        ("license: creativeml-openrail-m", {"license": "creativeml-openrail-m"}),
        (
            "license: other\nlicense_name: mine\nlicense_link: https://example.org/l",
            {"license": "other", "license_name": "mine", "license_link": "https://example.org/l"},
        ),
        ("tags: [a]", {}),
        ("license: [a, b]", {}),
        ("license: {", {}),
        ("license: !!python/object/apply:os.system ['true']", {}),
    ],
)
def test_the_licence_is_inherited_or_unknown(teacher: Path, tmp_path: Path, front: str, data: dict[str, str]) -> None:
    (teacher / "README.md").write_text(f"---\n{front}\n---\n# Mine\n")
    student = cut(teacher, tmp_path / "student")
    again = cut(student, tmp_path / "again", "bk-small")
    for folder in (student, again):
        card = ModelCard.load(folder / "README.md")
        assert {key: card.data.get(key) for key in data} == data
        assert record(folder)["licence"] == data
        assert card.data.base_model == "my-teacher"
        if not data:
            assert card.data.get("license") is None and "Unknown: neither" in card.text


def test_a_card_says_how_it_was_made_and_names_no_place(teacher: Path, tmp_path: Path) -> None:
    student = cut(teacher, tmp_path / "student")
    card = ModelCard.load(student / "README.md")
    assert {"pruned", "stable-diffusion", "diffusers"} <= set(card.data.tags)
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    figures = record(student)["figures"]
    assert f"{figures['parameters']:,} parameters" in card.text and "student bk-base" in card.text
    assert str(tmp_path) not in card.content
    assert "There is none: the teacher has none" in card.text


def test_base_model_is_the_hub_id_where_the_folder_knows_it(teacher: Path, tmp_path: Path) -> None:
    index = teacher / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_name_or_path": "someone/their-model"}))
    assert record(cut(teacher, tmp_path / "student"))["base_model"] == "someone/their-model"


def test_the_safety_checker_is_kept_and_runs_in_plain_diffusers(checked: Path, tmp_path: Path) -> None:
    student = cut(cut(checked, tmp_path / "one"), tmp_path / "two", "bk-small")
    assert record(student)["safety_checker"] == {"state": "kept", "why": "copied from the teacher"}
    opened = StableDiffusionPipeline.from_pretrained(student)
    theirs = StableDiffusionPipeline.from_pretrained(checked).safety_checker.state_dict()
    mine = opened.safety_checker.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    output = opened("a small red circle on a white background", num_inference_steps=1, output_type="np")
    assert len(output.nsfw_content_detected) == 1
    assert "Kept:" in (student / "README.md").read_text()


def to_pickle(folder: Path) -> None:
    weights = next((folder / "safety_checker").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))


def other_class(folder: Path) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "safety_checker": ["evil", "Evil"]}))


def truncate(folder: Path) -> None:
    weights = next((folder / "safety_checker").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])


def link_out(folder: Path) -> None:
    moved = (folder / "safety_checker" / "config.json").rename(folder.parent / "config.json")
    (folder / "safety_checker" / "config.json").symlink_to(moved)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (to_pickle, "not there as safetensors"),
        (other_class, "a class that decant does not open"),
        (truncate, "weights file"),
        (link_out, "leaves the model's folder"),
        (lambda folder: shutil.rmtree(folder / "feature_extractor"), "feature extractor is missing"),
        (lambda folder: shutil.rmtree(folder / "safety_checker"), "not there as safetensors"),
    ],
)
def test_a_checker_that_cannot_come_along_is_dropped_aloud(
    checked: Path, tmp_path: Path, change: Callable[[Path], object], why: str
) -> None:
    broken = shutil.copytree(checked, tmp_path / "broken")
    change(broken)
    student = cut(cut(broken, tmp_path / "one"), tmp_path / "two", "bk-small")
    safety = record(student)["safety_checker"]
    assert safety["state"] == "dropped" and why in safety["why"]
    assert "Dropped: " in (student / "README.md").read_text()
    assert not (student / "safety_checker").exists()
    assert StableDiffusionPipeline.from_pretrained(student).safety_checker is None


@pytest.mark.slow
def test_a_distilled_student_tells_its_figures(tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data", 60, "train")
    student = cut("scenes", tmp_path / "cut")
    out = tmp_path / "student"
    settings = {"steps": 1, "batch_size": 2, "held_out": 0.2}
    models: dict[str, str | Path] = {"cut": student}
    stage = STAGES["distill"]
    run_stage("distill", stage, settings, teacher="scenes", models=models, data=data, seed=0, out=out, talk=print)
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "apache-2.0" and card.data.base_model == "scenes"
    assert "held-out pictures" in card.text and {"pruned", "distilled"} <= set(card.data.tags)
