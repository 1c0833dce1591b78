"""Two processes do what one does at the command line, and only the first writes and talks; one may be killed."""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from safetensors.torch import load_file

from decant.scenes.folder import draw_folder
from processes import forking

RECIPE = """
name: ranks
summary: a cut, ten steps, and a look at them
stages:
  - {stage: prune, name: cut, settings: {student: bk-tiny}}
  - stage: distill
    name: student
    settings:
      {steps: 10, batch_size: 4, accumulation: 2, learning_rate: 1.0e-4, ema: 0.9, held_out: 0.25, checkpoint_every: 3}
  - stage: evaluate
    settings: {images: 6, steps: 2, batch_size: 2, shown: 6, latency_repeats: 0, captions: scenes}
"""
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m", "decant"]
WORDS = ["run", "recipe.yaml", "--teacher", "scenes", "--data", "data", "--json", "--device", "cpu"]
PATIENCE = 300.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures and a recipe."""
    folder = tmp_path_factory.mktemp("ranks")
    draw_folder(folder / "data", 32, "train")  # the split is by name: of the first 24, none is held out
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def two(place: Path) -> list[dict[str, Any]]:
    """What two processes have told and done, in ``place / "two"``."""
    return decant(place, 2, "--out", "two")


def decant(where: Path, count: int, *words: str) -> list[dict[str, Any]]:
    """A run by ``count`` processes: what each told, did, and ended with."""
    context = forking()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        call = import_module("rank_main").rank_main
        ranks = [context.Process(target=call, args=(n, count, port, [*WORDS, *words], where)) for n in range(count)]
        for process in ranks:
            process.start()
    ended = []
    for rank, process in enumerate(ranks):
        process.join(PATIENCE)
        told: dict[str, Any] = {name: (where / f"{name}-{rank}").read_text() for name in ("stdout", "stderr")}
        ended.append({**told, "status": process.exitcode, "rows": json.loads((where / f"rows-{rank}").read_text())})
        process.kill()
    return ended


def record(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / stage / "decant.json").read_text())


def pictures(run: Path, model: str) -> np.ndarray:
    return np.stack([np.asarray(Image.open(run / f"03-evaluate/pictures/{model}/{n}.png"), int) for n in range(6)])


@pytest.mark.slow
def test_two_processes_run_a_recipe_as_one_does(place: Path, two: list[dict[str, Any]]) -> None:
    (alone,) = decant(place, 1, "--out", "one")
    first, second = two
    assert alone["status"] == first["status"] == second["status"] == 0, alone["stderr"] + first["stderr"]
    assert json.loads(first["stdout"])["student"] == "two/02-student" and second["stdout"] == ""
    assert first["stderr"].count("student: done in") == 1 and "[2/3]" not in second["stderr"]
    mine, theirs = (record(place / run, "02-student") for run in ("one", "two"))
    assert [step["step"] for step in mine["training"]] == list(range(1, 11))
    for a, b in zip(mine["training"], theirs["training"], strict=True):
        assert a["step"] == b["step"] and a["losses"] == pytest.approx(b["losses"], rel=1e-3)
    assert mine["held_out"] == pytest.approx(theirs["held_out"], rel=1e-3)
    assert mine["held_out"]["n"] > 1 and mine["data"] == theirs["data"]
    for model in ("teacher", "cut"):
        apart = np.abs(pictures(place / "one", model) - pictures(place / "two", model))
        assert apart.max() <= 1, "the same batches, whoever draws them"
    assert not any(place.glob("two/.work/*.tmp")) and (place / "two" / "report.html").is_file()


@pytest.mark.slow
def test_both_encode_and_draw_their_part(two: list[dict[str, Any]]) -> None:
    first, second = (each["rows"] for each in two)
    assert first["Encoder"] > 0 and second["Encoder"] > 0
    assert (first["Decoder"], second["Decoder"]) == (12, 6), "three models' six pictures, in twos, dealt in turns"


@pytest.mark.slow
def test_what_is_finished_is_reused_and_a_refusal_is_told_once(place: Path, two: list[dict[str, Any]]) -> None:
    assert two[0]["status"] == 0
    small = ("--set", "student.batch_size=1", "student.accumulation=1")
    again = decant(place, 2, "--out", "two", *small)
    assert [each["status"] for each in again] == [2, 2]
    told = "".join(each["stderr"] for each in again)
    assert told.count("cut: finished before, reused") == 1
    assert told.count("a picture for every rank") == 1 and "Traceback" not in told
    assert (place / "two" / "02-student").is_dir(), "what was there stays"


@pytest.mark.slow
def test_a_launched_rank_that_is_killed_ends_the_other_and_a_restart_ends_in_the_same_bits(
    place: Path, two: list[dict[str, Any]]
) -> None:
    assert two[0]["status"] == 0
    command, env = [*LAUNCH, *WORDS, "--out", "killed"], os.environ | {"OMP_NUM_THREADS": "1"}
    with (place / "said").open("w") as said:
        launcher = subprocess.Popen(command, cwd=place, env=env, stdout=said, stderr=said)
    partial, deadline = place / "killed/.work/02-student/partial", time.monotonic() + PATIENCE
    while not (partial / "step-00000003").is_dir():
        assert launcher.poll() is None and time.monotonic() < deadline, (place / "said").read_text()
        time.sleep(0.01)
    (rank,) = (each for each in psutil.Process(launcher.pid).children() if each.environ().get("RANK") == "1")
    rank.kill()
    assert launcher.wait(60) != 0, "the other ends soon, and with it the launcher"
    told = (place / "said").read_text()
    assert "error: rank 0 of 2: another rank of this run has ended" in told
    assert shlex.join(["-m", "decant", *WORDS, "--out", "killed"]) in told
    assert not (place / "killed/02-student").exists()
    assert "find_unused_parameters" not in told
    again, other = decant(place, 2, "--out", "killed")
    assert again["status"] == other["status"] == 0, again["stderr"] + other["stderr"]
    assert json.loads(again["stdout"])["stages"][0]["reused"] and other["stdout"] == ""
    assert "goes on from the checkpoint of step" in again["stderr"]
    whole, restarted = (record(place / run, "02-student") for run in ("two", "killed"))
    assert [step["losses"] for step in restarted["training"]] == [step["losses"] for step in whole["training"]]
    file = "02-student/unet/diffusion_pytorch_model.safetensors"
    a, b = (load_file(place / run / file) for run in ("two", "killed"))
    assert a.keys() == b.keys() and [name for name in a if not a[name].equal(b[name])] == []
