"""Two processes that `accelerate launch` starts do what one does, and only the first writes and talks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from decant.scenes.folder import draw_folder

RECIPE = """
name: ranks
summary: a cut, six steps, and a look at them
stages:
  - {stage: prune, name: cut, settings: {student: bk-tiny}}
  - stage: distill
    name: student
    settings: {steps: 6, batch_size: 4, accumulation: 2, learning_rate: 1.0e-4, ema: 0.9, held_out: 0.2}
  - stage: evaluate
    settings: {images: 6, steps: 2, batch_size: 2, shown: 6, latency_repeats: 0, captions: scenes}
"""
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m", "decant"]
ALONE = [sys.executable, "-m", "decant"]


def decant(launcher: list[str], words: list[str], where: Path) -> subprocess.CompletedProcess[str]:
    port = {"MASTER_PORT": "0"} if launcher is ALONE else {}
    env = os.environ | {"OMP_NUM_THREADS": "1", **port}
    return subprocess.run([*launcher, *words], cwd=where, env=env, capture_output=True, text=True, check=False)


def record(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / stage / "decant.json").read_text())


@pytest.mark.slow
def test_two_processes_run_a_recipe_as_one_does(tmp_path: Path) -> None:
    draw_folder(tmp_path / "data", 24, "train")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    words = ["run", "recipe.yaml", "--teacher", "scenes", "--data", "data", "--json", "--device", "cpu"]
    one = decant(ALONE, [*words, "--out", "one"], tmp_path)
    two = decant(LAUNCH, [*words, "--out", "two"], tmp_path)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert json.loads(two.stdout)["stages"][1]["name"] == "student", "one JSON document, of one process"
    assert two.stderr.count("student: done in") == 1
    mine, theirs = (record(tmp_path / run, "02-student") for run in ("one", "two"))
    for a, b in zip(mine["training"], theirs["training"], strict=True):
        assert a["step"] == b["step"] and a["losses"] == pytest.approx(b["losses"], rel=1e-3)
    assert mine["held_out"] == pytest.approx(theirs["held_out"], rel=1e-3)
    teacher = [tmp_path / run / "03-evaluate" / "pictures" / "teacher" for run in ("one", "two")]
    for number in range(6):
        pictures = [np.asarray(Image.open(folder / f"{number}.png"), int) for folder in teacher]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1, "the same batches, whoever draws them"
    assert not any(tmp_path.glob("two/.work/*.tmp")) and (tmp_path / "two" / "report.html").is_file()
    again = decant(LAUNCH, [*words, "--out", "two"], tmp_path)
    assert again.returncode == 0 and all(stage["reused"] for stage in json.loads(again.stdout)["stages"])
    refused = decant(
        LAUNCH, [*words, "--out", "three", "--set", "student.batch_size=1", "student.accumulation=1"], tmp_path
    )
    assert refused.returncode != 0 and refused.stderr.count("a picture for every rank") == 1, refused.stderr
    assert not (tmp_path / "three" / "02-student").exists()
