"""The smaller verbs and options, in this process: show, doctor, recipes, run --dry-run, --device, did-you-mean."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from decant.cli.main import main
from decant.scenes.folder import draw_folder

Say = Callable[..., str]


@pytest.fixture
def decant(capsys: pytest.CaptureFixture[str]) -> Say:
    """``decant(words...)`` gives what a successful call says on stdout."""

    def call(*words: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main(list(map(str, words)))
            raise SystemExit(0)
        said = capsys.readouterr()
        assert left.value.code in (0, None), said.err
        return said.out

    return call


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Say:
    """``refused(words...)`` gives what a call that is the user's mistake says on stderr."""

    def call(*words: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main(list(map(str, words)))
        said = capsys.readouterr()
        assert left.value.code == 2, said.err
        assert said.out == "" and "Traceback" not in said.err and "hint: " in said.err
        return said.err

    return call


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("data") / "pictures", 12, "train")


@pytest.mark.parametrize(
    ("name", "family", "count"),
    [("sd15", "sd1", 859_520_964), ("sd21", "sd2", 865_910_724), ("musetalk", "musetalk", 849_947_844)],
)
def test_show_knows_architectures(decant: Say, name: str, family: str, count: int) -> None:
    shown = json.loads(decant("show", name, "--json"))
    assert (shown["family"], shown["parameters"], shown["record"]) == (family, count, {})


def test_show_tells_lineage_surgery_licence_and_safety(decant: Say, tmp_path: Path) -> None:
    decant("prune", "--teacher", "scenes", "--student", "bk-tiny", "--out", tmp_path / "cut")
    shown = json.loads(decant("show", tmp_path / "cut", "--json"))
    assert {"family", "parameters", "macs", "record"} <= shown.keys()
    moved = shown["surgery"]["layers_moved"]
    assert moved["up_blocks.0.resnets.0"] == "up_blocks.1.resnets.0"
    assert shown["surgery"]["parameters_cut_by_channel"] == 0 and shown["surgery"]["feature_pairs"] == 6
    assert sum(shown["parts"].values()) > shown["parameters"] == shown["parts"]["unet"]
    text = decant("show", tmp_path / "cut")
    for said in ("base model: scenes, licence apache-2.0", "safety checker: absent", "made by: prune", "stored: float"):
        assert said in text


def test_export_and_show_one_file(decant: Say, refused: Say, tmp_path: Path) -> None:
    file = tmp_path / "scenes.safetensors"
    decant("export", "scenes", "--out", file)
    shown, teacher = (json.loads(decant("show", model, "--json")) for model in (file, "scenes"))
    assert shown["parts"] == teacher["parts"] and shown["macs"] == teacher["macs"]
    assert "exists" in refused("export", "scenes", "--out", file)
    assert ".safetensors" in refused("export", "scenes", "--out", tmp_path / "x.ckpt")


def test_one_file_is_a_teacher_for_a_whole_run(decant: Say, tmp_path: Path) -> None:
    file, data, recipe = tmp_path / "scenes.safetensors", tmp_path / "data", tmp_path / "mine.yaml"
    decant("export", "scenes", "--out", file)
    draw_folder(data, 40, "train")
    distill = "{stage: distill, settings: {steps: 1, batch_size: 2, held_out: 0.2}}"
    recipe.write_text(f"name: mine\nstages: [{{stage: prune, settings: {{student: bk-tiny}}}}, {distill}]\n")
    done = json.loads(decant("run", recipe, "--teacher", file, "--data", data, "--out", tmp_path / "run", "--json"))
    shown = json.loads(decant("show", done["student"], "--json"))
    assert shown["record"]["parents"]["prune"]["path"].endswith("01-prune")
    assert shown["record"]["base_model"] == "scenes"
    pictures = tmp_path / "pictures"
    decant("generate", file, "--prompt", "a small red circle on a white background", "--steps", 1, "--out", pictures)
    assert len(list(pictures.glob("*.png"))) == 1


def test_doctor_is_right_about_this_machine(decant: Say) -> None:
    found = json.loads(decant("doctor", "--json"))
    assert found["machine"]["torch"] == torch.__version__
    assert {device["name"] for device in found["devices"]} >= {"cpu"}
    assert (len(found["devices"]) > 1) == torch.accelerator.is_available()
    assert torch.__version__.startswith(found["packages"]["torch"]["version"])
    assert all(package["version"] for package in found["packages"].values())
    assert found["memory_gb"]["total"] >= found["memory_gb"]["available"] > 0
    assert any("accelerator" in item["what"] for item in found["missing"]) != torch.accelerator.is_available()
    assert all(item["hint"] for item in found["missing"])
    text = decant("doctor")
    assert "processor" in text and "torch" in text


def test_doctor_sees_what_is_missing(decant: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    said = decant("doctor")
    assert "a C++ compiler" in said
    assert "token present" in said and "hf_secret" not in said


def test_recipes_keep_their_contract(decant: Say, refused: Say) -> None:
    listed = json.loads(decant("recipes", "--json"))
    assert all(row.keys() == {"name", "summary", "source", "teacher_family"} for row in listed)
    assert all(isinstance(value, str) and value for row in listed for value in row.values())
    for row in listed:
        printed = yaml.safe_load(decant("recipes", row["name"]))
        assert printed["name"] == row["name"]
        assert {"command", "hardware", "expected"} <= printed.keys()
    assert "did you mean 'bk-sdm-tiny'" in refused("recipes", "bk-sdm-tinny")


def dry_run(decant: Say, pictures: Path, out: Path, *more: object, teacher: str = "scenes") -> dict[str, Any]:
    words = ["run", "bk-sdm-tiny", "--teacher", teacher, "--data", pictures, "--out", out, "--dry-run", "--json"]
    return json.loads(decant(*words, *more))


def test_a_dry_run_says_disk_and_time_and_runs_nothing(decant: Say, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = dry_run(decant, pictures, out, "--set", "tiny.steps=10", "--set", "tiny.batch_size=4")
    assert not out.exists()
    assert [stage["name"] for stage in small["stages"]] == ["cut", "tiny", "evaluate"]
    assert small["time"]["how"] == "measured" and small["time"]["assumes"]
    assert small["time"]["total_s"] == pytest.approx(sum(small["time"]["stages_s"].values()), abs=0.5)
    large = dry_run(decant, pictures, out, "--set", "tiny.steps=100000", "--set", "tiny.batch_size=4")
    assert large["time"]["stages_s"]["tiny"] > 1000 * max(small["time"]["stages_s"]["tiny"], 1e-3)
    assert small["disk"]["total_mb"] == pytest.approx(sum(small["disk"]["stages_mb"].values()), abs=0.5)
    assert "tiny, checkpoints" in small["disk"]["stages_mb"]


def test_a_dry_run_is_right_about_the_size_of_a_cut(decant: Say, pictures: Path, tmp_path: Path) -> None:
    wanted = dry_run(decant, pictures, tmp_path / "run")["disk"]["stages_mb"]["cut"]
    decant("prune", "--teacher", "scenes", "--student", "bk-tiny", "--out", tmp_path / "cut")
    real = sum(path.stat().st_size for path in (tmp_path / "cut").rglob("*") if path.is_file()) / 1e6
    assert wanted == pytest.approx(real, rel=0.02)


def test_a_dry_run_at_full_size_is_an_estimate_that_says_so(decant: Say, pictures: Path, tmp_path: Path) -> None:
    wanted = dry_run(decant, pictures, tmp_path / "run", "--device", "cpu", teacher="sd15")
    assert wanted["time"]["how"] == "estimated" and "convolution" in wanted["time"]["assumes"][0]
    assert wanted["disk"]["stages_mb"]["cut"] == pytest.approx(323_384_964 * 4 / 1e6, rel=0.01)
    assert all(stage["settings"].get("device", "cpu") == "cpu" for stage in wanted["stages"])


def test_a_dry_run_text_is_yaml_with_comments(decant: Say, pictures: Path, tmp_path: Path) -> None:
    words = ["run", "bk-sdm-tiny", "--teacher", "scenes", "--data", pictures, "--out", tmp_path / "run", "--dry-run"]
    said = decant(*words)
    assert "# disk wanted:" in said and "# time wanted: about" in said
    assert [stage["name"] for stage in yaml.safe_load(said)["stages"]] == ["cut", "tiny", "evaluate"]


absent = "mps" if sys.platform != "darwin" else "cuda"


def test_an_absent_device_is_refused_before_anything_runs(refused: Say, pictures: Path, tmp_path: Path) -> None:
    places = ["--teacher", "scenes", "--data", pictures, "--out", tmp_path / "out", "--device", absent]
    calls: list[list[object]] = [
        ["run", "bk-sdm-tiny", *places],
        ["run", "bk-sdm-tiny", *places, "--dry-run"],
        ["distill", tmp_path, *places],
        ["evaluate", tmp_path, *places],
        ["quickstart", "--out", tmp_path / "out", "--device", absent],
        ["generate", "scenes", "--prompt", "a", "--out", tmp_path / "out", "--device", absent],
    ]
    for words in calls:
        assert "allowed: auto, cpu" in refused(*words), words
    assert not (tmp_path / "out").exists()


def test_every_wrong_word_gets_its_nearest(refused: Say, pictures: Path, tmp_path: Path) -> None:
    places = ["--teacher", "scenes", "--data", pictures, "--out", tmp_path / "out"]
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nstages: [{stage: prune, setings: {student: bk-tiny}}]\n")
    stage = tmp_path / "stage.yaml"
    stage.write_text("name: mine\nstages: [{stage: prun}]\n")
    cases: list[tuple[list[object], str]] = [
        (["shwo", "scenes"], "show"),
        (["scenes", "drwa", "--n", "1"], "draw"),
        (["run", "bk-sdm-tinny", *places], "bk-sdm-tiny"),
        (["run", recipe, *places], "settings"),
        (["run", stage, *places], "prune"),
        (["run", "bk-sdm-tiny", *places, "--set", "tiny.stesp=3"], "steps"),
        (["run", "bk-sdm-tiny", *places, "--set", "tinny.steps=3"], "tiny"),
        (["run", "bk-sdm-tiny", *places, "--dry-rnu"], "--dry-run"),
        (["run", "bk-sdm-tiny", *places, "--devise", "cpu"], "--device"),
        (["distill", tmp_path, *places, "--set", "stesp=3"], "steps"),
        (["evaluate", "scenes", *places, "--set", "imagse=3"], "images"),
        (["prune", "--teacher", "scenes", "--student", "bk-tinny", "--out", tmp_path / "out"], "bk-tiny"),
        (["prune", "--teacher", "sd1.5", "--student", "bk-tiny", "--dry-run"], "sd15"),
        (["generate", "scenes", "--prompt", "a", "--out", tmp_path / "o", "--sampler", "dim"], "ddim"),
        (["generate", "scenes", "--promt", "a", "--out", tmp_path / "o"], "--prompt"),
        (["show", "scene"], "scenes"),
    ]
    for words, nearest in cases:
        said = refused(*words)
        plain = said.replace('"', "").replace("'", "").lower()
        assert f"did you mean {nearest}" in plain, (words, said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["steps=[", "steps", "=3", "steps=2001-01-01", "steps=&a [*a]"])
def test_a_setting_that_is_no_value_is_refused(refused: Say, tmp_path: Path, pictures: Path, value: str) -> None:
    refused("distill", tmp_path, "--teacher", "scenes", "--data", pictures, "--out", tmp_path / "o", "--set", value)


def test_a_hub_id_that_is_not_here_says_what_to_do(refused: Say) -> None:
    said = refused("show", "nobody/nothing")
    assert "hf download nobody/nothing" in said and "HF_HUB_OFFLINE" in said


SILENT = """
import os, socket, subprocess, sys
server = socket.create_server(("127.0.0.1", 0))
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.getsockname()[1]}"
os.environ.pop("HF_HUB_OFFLINE", None)
from decant.cli.main import main
main(["show", "nobody/nothing"])
"""


@pytest.mark.slow
def test_a_silent_hub_is_not_waited_for_long(tmp_path: Path) -> None:
    """The hub takes the connection and never answers: refused with a way out, not hung."""
    begin = time.monotonic()
    home = {"HF_HOME": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", SILENT], capture_output=True, text=True, check=False, env=home)
    assert done.returncode == 2 and "hf download nobody/nothing" in done.stderr
    assert time.monotonic() - begin < 90


def test_a_dry_run_counts_a_small_decoder(decant: Say, pictures: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nstages: [{stage: decoder, settings: {steps: 10}}]\n")
    words = ["run", recipe, "--data", pictures, "--out", tmp_path / "run", "--dry-run", "--json"]
    small, large = (json.loads(decant(*words, "--teacher", teacher)) for teacher in ("scenes", "sd15"))
    assert large["time"]["stages_s"]["decoder"] > 100 * small["time"]["stages_s"]["decoder"] > 0
    mb = large["disk"]["stages_mb"]["decoder, checkpoints"]
    assert mb == pytest.approx(3 * 3 * 4 * (1_222_531 + 1_222_532) / 1e6, rel=0.01)
    assert small["disk"]["stages_mb"]["decoder, cache"] > 0
