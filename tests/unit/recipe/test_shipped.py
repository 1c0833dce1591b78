"""Every recipe that ships: it resolves as published and scaled down, and says what its source says."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from decant.cli.work import run_and_report
from decant.errors import UserError
from decant.models.load import architecture
from decant.models.shipped import shipped_folder
from decant.recipe.runner import resolve
from decant.recipe.schema import list_recipes, load_recipe, override, scaled
from decant.scenes.folder import draw_folder
from decant.stages.all import STAGES
from decant.stages.prune import Prune, preview

NAMES = [recipe["name"] for recipe in list_recipes()]
SCALED = [name for name in NAMES if load_recipe(name).scales]
PUBLISHED = {
    "bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny", "bk-sdm-v2-base", "bk-sdm-v2-small", "bk-sdm-v2-tiny", "sd-small",
    "sd-tiny", "ssd-1b", "vega", "koala-1b", "koala-700m", "v1", "v2.1", "v2.2", "v3-small", "v3-tiny", "compress",
}  # fmt: skip


def settings(name: str, stage: str = "distill") -> dict[str, Any]:
    jobs = resolve(load_recipe(name), STAGES)
    return next(job.settings.model_dump() for job in jobs if stage in (job.name, job.kind))


def test_all_of_the_documents_are_there() -> None:
    assert set(NAMES) >= PUBLISHED and set(SCALED) == PUBLISHED | set(FEW_STEPS)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_opens_with_what_a_user_needs_to_know(name: str) -> None:
    recipe = load_recipe(name)
    assert (
        recipe.name == name
        and recipe.command.startswith("decant ")
        and name.split("-", maxsplit=1)[0] in recipe.command
    )
    assert all((recipe.summary, recipe.source, recipe.hardware, recipe.expected, recipe.teacher_family))
    resolve(recipe, STAGES)


@pytest.mark.parametrize("name", SCALED)
def test_a_scale_changes_settings_and_no_stage(name: str) -> None:
    recipe = load_recipe(name)
    small = scaled(recipe, "scenes")
    resolve(small, STAGES)
    assert [step.name for step in small.stages] == [step.name for step in recipe.stages]
    assert scaled(small, "scenes") == small


def test_an_unknown_scale_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"--scale: sences(.|\n)*scenes(.|\n)*hint"):
        scaled(load_recipe("v1"), "sences")
    with pytest.raises(UserError, match="leave --scale out"):
        scaled(load_recipe("quickstart"), "scenes")


# What the sources state (recipes as published): batch x accumulation, learning rate, steps, weights of the terms.
@pytest.mark.parametrize(
    ("name", "batch", "accumulation", "lr", "steps", "weights"),
    [
        ("bk-sdm-base", 64, 4, 5e-5, 50_000, (1, 1, 1)),
        ("bk-sdm-small", 64, 4, 5e-5, 50_000, (1, 1, 1)),
        ("bk-sdm-tiny", 64, 4, 5e-5, 50_000, (1, 1, 1)),
        ("bk-sdm-v2-base", 32, 4, 5e-5, 50_000, (1, 1, 1)),
        ("bk-sdm-v2-small", 32, 4, 5e-5, 50_000, (1, 1, 1)),
        ("bk-sdm-v2-tiny", 32, 4, 5e-5, 50_000, (1, 1, 1)),
        ("sd-small", 32, 1, 1e-5, 100_000, (1, 0.5, 0.5)),
        ("sd-tiny", 32, 1, 1e-5, 125_000, (1, 0.5, 0.5)),
        ("ssd-1b", 32, 4, 1e-5, 251_000, (1, 0.5, 0.5)),
        ("vega", 16, 8, 1e-5, 540_000, (1, 0.5, 0.5)),
    ],
)
def test_published_settings(
    name: str, batch: int, accumulation: int, lr: float, steps: int, weights: tuple[float, float, float]
) -> None:
    found = settings(name)
    assert (found["batch_size"], found["accumulation"], found["learning_rate"]) == (batch, accumulation, lr)
    assert (found["steps"], (found["task"], found["output"], found["feature"])) == (steps, weights)


def test_the_document_s_own_settings() -> None:
    assert settings("compress", "distilled") | {"steps": 800, "learning_rate": 1e-5} == settings(
        "compress", "distilled"
    )
    assert settings("compress", "pruned")["ratio"] == 0.3
    jobs = resolve(load_recipe("compress"), STAGES)
    assert [job.folder for job in jobs[:3]] == ["01-distilled", "02-pruned", "03-quant"]
    alpha = load_recipe("v2.2").stages[1].settings["output"]
    assert alpha == {"from": 1.0, "to": 0.5} and settings("v2.1")["output"] == settings("v2.1")["feature"] == 0
    evaluated = settings("v2.2", "evaluate")
    assert (evaluated["size"], evaluated["steps"], evaluated["guidance_scale"]) == (64, 25, 5.0)
    assert evaluated["sampler"] == "ddpm"


@pytest.mark.parametrize("name", sorted(PUBLISHED - {"compress"}))
def test_a_preset_cuts_the_teacher_it_is_for(name: str) -> None:
    recipe = load_recipe(name)
    known = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}[recipe.teacher_family]
    chosen = Prune(**recipe.stages[0].settings)
    assert preview(architecture(known), chosen, 77)["parameters"] < 1.5e9


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "pictures"
    draw_folder(folder, 60, "train", 0)
    return folder


FEW = ["distill.steps=2", "distill.batch_size=2", "distill.warmup=0", "distill.held_out=0.1", "distill.held_out_most=2"]
FEW += ["distill.sample_steps=2", "distill.evaluate_images=2", "evaluate.images=2", "evaluate.steps=2"]
FEW += ["evaluate.latency_repeats=0"]
FEW_STEPS = {
    "flash-lora": "distill",
    "lcm": "consistency",
    "lcm-lora": "consistency",
    "dmd2": "dmd",
    "dmd2-lora": "dmd",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW_STEPS)
def test_presets_of_few_steps_run_on_scenes(name: str, pictures: Path, tmp_path: Path) -> None:
    """Their student opens in plain diffusers, knows how it is drawn, and has its LoRA beside it in both formats."""
    kind = FEW_STEPS[name]
    few = [word.replace("distill.", f"{kind}.") for word in FEW if "sample_steps" not in word]
    file = tmp_path / "r.yaml"
    file.write_text(override(scaled(load_recipe(name), "scenes"), few).to_yaml())
    teacher = "scenes-xl" if name.startswith("dmd2") else "scenes"
    done = run_and_report(str(file), teacher=teacher, data=pictures, out=tmp_path / "out", sets=(), talk=print)
    student = Path(done["student"])
    record = json.loads((student / "decant.json").read_text())
    said = record["sampling"]
    report = json.loads(Path(done["report"]).with_suffix(".json").read_text())
    assert [model["steps"] for model in report["models"]] == [2, said["steps"]]
    pipeline = DiffusionPipeline.from_pretrained(student, safety_checker=None)
    assert type(pipeline.scheduler).__name__ == "LCMScheduler"
    told = {"guidance_scale": said["guidance_scale"], "num_inference_steps": said["steps"]}
    picture = pipeline("a large red circle", output_type="np", **told).images
    assert picture.shape == (1, 64, 64, 3)
    if "lora" not in name:
        return
    for lora in (student / "pytorch_lora_weights.safetensors", student / "kohya_lora.safetensors"):
        plain = DiffusionPipeline.from_pretrained(shipped_folder(teacher), safety_checker=None)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            plain.load_lora_weights(lora)
        assert not [each for each in heard if "unexpected" in str(each.message).lower()]
        layers = [m for m in plain.unet.modules() if isinstance(m, BaseTunerLayer)]
        assert 2 * len(layers) == len([key for key in load_file(lora) if "lora_" in key and "alpha" not in key])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v1", "compress"])
def test_presets_run_on_scenes(name: str, pictures: Path, tmp_path: Path) -> None:
    """Through the same code as ever, a few steps; bk-sdm-tiny and v2.2 run where their table is made."""
    recipe = override(scaled(load_recipe(name), "scenes"), FEW)
    file = tmp_path / "r.yaml"
    file.write_text(recipe.to_yaml())
    done = run_and_report(str(file), teacher="scenes", data=pictures, out=tmp_path / "out", sets=(), talk=print)
    assert Path(done["report"]).is_file()
