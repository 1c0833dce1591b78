"""The command line as a user meets it: the shipped teacher, mistakes on purpose, kills."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from decant.scenes.folder import draw_folder
from processes import Begun, here

FAST = ["--set", "tiny.steps=4", "--set", "tiny.batch_size=4", "--set", "tiny.accumulation=1"]
QUICK_EVALUATION = ["--set", "evaluate.images=2", "--set", "evaluate.steps=2", "--set", "evaluate.latency_repeats=1"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("data") / "pictures", 40, "train")


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cut") / "tiny"
    done = here("prune", "--teacher", "scenes", "--student", "bk-tiny", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    out = tmp_path_factory.mktemp("run") / "tiny"
    places = ["--teacher", "scenes", "--data", pictures, "--out", out]
    done = here("run", "bk-sdm-tiny", *places, *FAST, *QUICK_EVALUATION)
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    return out


@pytest.mark.slow
def test_run_gives_folders_records_and_a_report(finished_run: Path) -> None:
    assert sorted(p.name for p in finished_run.iterdir() if p.name[0].isdigit()) == ["01-cut", "02-tiny", "03-evaluate"]
    report = json.loads((finished_run / "report.json").read_text())
    roles = {model["name"]: model["role"] for model in report["models"]}
    assert roles == {"teacher": "teacher", "cut": "control", "tiny": "student"}
    student = next(model for model in report["models"] if model["name"] == "tiny")
    assert student["scores"]["scene_accuracy"]["n"] == 2
    assert student["latency_ms"]["picture"]["median"] > 0
    assert (finished_run / "recipe.yaml").is_file()
    page = (finished_run / "report.html").read_text()
    assert "<script" not in page and "data:image/png" in page


@pytest.mark.slow
def test_finished_stages_are_reused(finished_run: Path, pictures: Path) -> None:
    places = ["--teacher", "scenes", "--data", pictures, "--out", finished_run]
    done = here("run", "bk-sdm-tiny", *places, *FAST, *QUICK_EVALUATION)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("reused") == 3


@pytest.mark.slow
def test_student_opens_in_plain_diffusers(finished_run: Path) -> None:
    """In a process that never imports decant, and it draws a picture."""
    code = """
import sys, torch
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1])
picture = pipeline("a small red circle on a white background", num_inference_steps=2, output_type="np").images
assert picture.shape == (1, 64, 64, 3), picture.shape
assert pipeline.unet.mid_block is None and len(pipeline.unet.down_blocks) == 3
assert not any(name.startswith("decant") for name in sys.modules)
print("opened")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(finished_run / "02-tiny")], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip().endswith("opened"), done.stderr


@pytest.mark.slow
def test_killed_distillation_goes_on_to_the_same_weights(cut: Path, pictures: Path, tmp_path: Path) -> None:
    """SIGKILL at some moment of the training; the same command then ends in the uninterrupted run's bytes."""
    words = ["distill", cut, "--teacher", "scenes", "--data", pictures]
    for setting in ("steps=12", "batch_size=4", "checkpoint_every=2", "ema=0.9", "sample_every=3", "sample_steps=1"):
        words += ["--set", setting]
    assert here(*words, "--out", tmp_path / "whole").returncode == 0
    killed, work = tmp_path / "killed", tmp_path / ".killed.work"
    child = Begun([*map(str, words), "--out", str(killed)], tmp_path / "said")
    child.wait_for(lambda: list(work.rglob("step-00000004")))
    child.kill()
    assert not killed.exists()
    resumed = here(*words, "--out", killed)
    assert resumed.returncode == 0 and "goes on from the checkpoint" in resumed.stderr
    whole, again = (load_file(p / "unet/diffusion_pytorch_model.safetensors") for p in (tmp_path / "whole", killed))
    assert whole.keys() == again.keys()
    assert all(whole[name].equal(again[name]) for name in whole)


def refused(done: subprocess.CompletedProcess[str], *said: str) -> None:
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    for word in said:
        assert word in done.stderr, done.stderr


def test_wrong_words_are_refused(tmp_path: Path, pictures: Path) -> None:
    places = ["--teacher", "scenes", "--data", pictures, "--out", tmp_path / "out"]
    refused(here("run", "bk-sdm-tyni", *places), "bk-sdm-tiny")
    refused(here("run", "bk-sdm-tiny", *places, "--set", "tiny.stepz=3"), "stepz", "steps")
    refused(here("run", "bk-sdm-tiny", *places, "--set", "tiny.steps=-3"), "steps")
    refused(here("run", "bk-sdm-tiny", *places, "--stepz", "3"), "stepz")
    refused(here("prune", "--teacher", "sd15", "--student", "bk-tny", "--dry-run"), "bk-tiny")
    assert not (tmp_path / "out").exists()


def test_wrong_places_are_refused(tmp_path: Path, pictures: Path) -> None:
    out = tmp_path / "out"
    refused(here("run", "bk-sdm-tiny", "--teacher", tmp_path / "no", "--data", pictures, "--out", out))
    refused(here("run", "bk-sdm-tiny", "--teacher", "scenes", "--data", tmp_path / "no", "--out", out))
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(here("run", "bk-sdm-tiny", "--teacher", "scenes", "--data", empty, "--out", out))
    refused(here("generate", tmp_path / "no", "--prompt", "a", "--out", out))
    refused(here("report", tmp_path / "no"))
    refused(here("evaluate", tmp_path / "no", "--teacher", "scenes", "--out", out))


@pytest.mark.parametrize("damage", ["truncated", "pickled", "wrong latent channels"])
def test_damaged_models_are_refused(damage: str, cut: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(cut, model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    match damage:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:100_000])
        case "pickled":
            weights.rename(weights.with_suffix(".bin"))
        case "wrong latent channels":
            config = json.loads((model / "vae" / "config.json").read_text())
            (model / "vae" / "config.json").write_text(json.dumps({**config, "latent_channels": 16}))
    refused(here("generate", model, "--prompt", "a", "--steps", "2", "--out", tmp_path / "out"))


@pytest.mark.slow
def test_bad_pictures_are_skipped_and_counted(cut: Path, pictures: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    (data / "000003.png").write_bytes((data / "000003.png").read_bytes()[:60])
    lines = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    lines[5]["text"] = "  "
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    words = ["--set", "steps=1", "--set", "batch_size=2"]
    done = here("distill", cut, "--teacher", "scenes", "--data", data, "--out", out, *words)
    assert done.returncode == 0, done.stderr
    skipped = json.loads((out / "decant.json").read_text())["data"]["skipped"]
    assert [item["name"] for item in skipped] == ["000003.png", "000005.png"]


def test_json_is_the_whole_of_stdout() -> None:
    """In a process from the interpreter's start: nothing that is imported writes there."""
    words = ["prune", "--teacher", "sd15", "--student", "bk-tiny", "--dry-run", "--json"]
    done = subprocess.run([sys.executable, "-m", "decant", *words], capture_output=True, text=True, check=False)
    document = json.loads(done.stdout)
    assert "torchvision" not in done.stderr
    assert document["parameters"] == 323_384_964
    assert abs(document["macs"] / 1e9 - 242.8) < 0.1
    assert document["layer_map"]["down_blocks.0.resnets.0"] == "down_blocks.0.resnets.0"
    names = [row["name"] for row in json.loads(here("recipes", "--json").stdout)]
    assert names[:2] == [
        "bk-sdm-base",
        "bk-sdm-small",
    ]


def test_generate_draws_every_prompt_with_every_number_of_steps(tmp_path: Path) -> None:
    words = ["--prompt", "a small red circle on a white background", "--steps", "1", "2", "--seed", "42"]
    done = here("generate", "scenes", *words, "--out", tmp_path, "--json")
    files = json.loads(done.stdout)
    assert [file["steps"] for file in files] == [1, 2]
    assert all(Path(file["file"]).is_file() for file in files)


def test_bench_says_what_was_measured_and_how() -> None:
    words = ["bench", "scenes", "--steps", "1", "--repeats", "2", "--batch-size", "2"]
    document = json.loads(here(*words, "--json").stdout)
    (model,) = document["models"]
    assert model["macs"] == 137_601_280 and model["measured"]["repeats"] == 2
    assert document["machine"]["torch"] and model["images_per_second"]["batch_size"] == 2
    text = here(*words).stdout
    assert "picture ms" in text and "ddim 1 steps" in text and "2 untimed" not in text
    refused(here("bench", "scenes", "--repeats", "0"), "--repeats")
    refused(here("bench", "scenez"), "scenez")
    refused(here("bench"), "models")


@pytest.mark.slow
def test_a_teacher_is_trained_part_by_part(tmp_path: Path) -> None:
    """Three parts of two steps each; a second call keeps what is finished."""
    part = {"pictures": 24, "steps": 2, "batch_size": 4, "learning_rate": 1e-4}
    vae = {"name": "1-vae", "kind": "vae", "crop": 32, **part}
    parts = [vae, {"name": "2-unet", "kind": "denoiser", **part}, {"name": "3-unet", "kind": "denoiser", **part}]
    (tmp_path / "recipe.yaml").write_text(json.dumps({"seed": 0, "parts": parts}))
    words = ["scenes", "train", "--out", tmp_path / "out", "--recipe", tmp_path / "recipe.yaml"]
    refused(here(*words, "--parts", "2-unett"), "2-unet")
    assert here(*words, "--parts", "1-vae").returncode == 0
    done = here(*words)
    assert done.returncode == 0, done.stderr
    assert "1-vae" not in done.stderr
    shown = json.loads(here("show", tmp_path / "out" / "teacher", "--json").stdout)
    assert shown["parameters"] == 11_273_924
