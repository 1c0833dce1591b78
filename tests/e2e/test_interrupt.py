"""Ctrl-C, SIGTERM, SIGHUP and a full disk at the real command line, on the shipped teacher."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from decant.cli.work import one_stage
from decant.scenes.folder import draw_folder

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
DECANT = [sys.executable, "-m", "decant.cli.main"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The space in its name must come back quoted."""
    return draw_folder(tmp_path_factory.mktemp("data") / "my pictures", 40, "train")


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cut") / "tiny"
    one_stage("prune", {"student": "bk-tiny"}, teacher="scenes", models={"teacher": "scenes"}, out=out, talk=print)
    return out


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """Children inherit what is ignored, as SIGINT is in the background of a shell."""
    before = {number: signal.signal(number, signal.default_int_handler) for number, _ in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def distill(cut: Path, pictures: Path, out: Path, *settings: str) -> list[str]:
    words = [*DECANT, "distill", str(cut), "--teacher", "scenes", "--data", str(pictures), "--out", str(out)]
    return words + [word for setting in settings for word in ("--set", setting)]


def begun(command: list[str] | str, said: Path) -> subprocess.Popen[bytes]:
    """The command as a terminal would start it, its talk in a file; a group of its own: signals hit no other."""
    words = ["sh", "-c", f"exec {command}"] if isinstance(command, str) else command
    with said.open("wb") as file:
        return subprocess.Popen(words, stderr=file, stdout=file, start_new_session=True)


def wait_for(happened: Callable[[], object], child: subprocess.Popen[bytes], said: Path) -> None:
    deadline = time.monotonic() + 300
    while not happened():
        assert child.poll() is None, f"ended too early:\n{said.read_text()}"
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.01)


def lines_in(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def advice(said: str) -> str:
    """The command that goes on, as it was printed: the last line."""
    assert "Traceback" not in said, said
    *_, before, command = said.strip().splitlines()
    assert before.endswith("Go on with:"), said
    return command.strip()


@pytest.mark.slow
def test_signals_save_and_the_printed_command_goes_on_to_the_same_weights(
    cut: Path, pictures: Path, tmp_path: Path
) -> None:
    settings = ("steps=16", "batch_size=2", "ema=0.9")
    out, said = tmp_path / "stopped student", tmp_path / "said"
    losses = tmp_path / ".stopped student.work" / "stopped student" / "partial" / "losses.jsonl"
    typed = distill(cut, pictures, out, *settings)
    command: list[str] | str = typed
    for number, status in SIGNALS:
        before = lines_in(losses)
        child = begun(command, said)
        wait_for(lambda before=before: lines_in(losses) > before, child, said)
        time.sleep(0.2)
        os.killpg(child.pid, number)
        assert child.wait(120) == status, said.read_text()
        told = said.read_text()
        assert f"stopped ({signal.Signals(number).name})" in told and "saved at step" in told
        command = advice(told)
        assert shlex.split(command) == typed
        assert not out.exists() and not list(losses.parents[2].glob("*.tmp")), "nothing half done stays"
    went_on = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert went_on.returncode == 0 and "goes on from the checkpoint" in went_on.stderr, went_on.stderr
    whole = tmp_path / "whole"
    subprocess.run(distill(cut, pictures, whole, *settings), check=True, capture_output=True)
    one, other = (load_file(path / "unet/diffusion_pytorch_model.safetensors") for path in (whole, out))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(cut: Path, pictures: Path, tmp_path: Path) -> None:
    """Updates of a hundred forwards: the first Ctrl-C waits for the end of one, the second does not."""
    out, said = tmp_path / "student", tmp_path / "said"
    losses = tmp_path / ".student.work" / "student" / "partial" / "losses.jsonl"
    child = begun(distill(cut, pictures, out, "steps=9", "batch_size=16", "accumulation=100"), said)
    wait_for(losses.exists, child, said)
    time.sleep(0.5)
    os.killpg(child.pid, signal.SIGINT)
    wait_for(lambda: "once more" in said.read_text(), child, said)
    os.killpg(child.pid, signal.SIGINT)
    assert child.wait(60) == 130
    told = said.read_text()
    assert "saved at" not in told and not list(losses.parent.glob("step-*"))
    assert advice(told) == shlex.join(child.args)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_signal_before_the_loop_keeps_finished_stages(pictures: Path, tmp_path: Path) -> None:
    """During the cut nothing is finished; during what comes before the first step the cut is."""
    out, said = tmp_path / "run", tmp_path / "said"
    typed = [*DECANT, "run", "bk-sdm-tiny", "--teacher", "scenes", "--data", str(pictures), "--out", str(out)]
    typed += ["--set", "tiny.steps=2", "--set", "tiny.batch_size=2"]
    for stage, number, status, finished in (
        ("[1/3] cut: prune", signal.SIGINT, 130, False),
        ("[2/3] tiny: distill", signal.SIGTERM, 143, True),
    ):
        child = begun(typed, said)
        wait_for(lambda stage=stage: stage in said.read_text(), child, said)
        os.killpg(child.pid, number)
        assert child.wait(120) == status, said.read_text()
        assert shlex.split(advice(said.read_text())) == typed
        assert (out / "01-cut" / "decant.json").is_file() is finished
        assert not (out / "02-tiny").exists() and not list((out / ".work").glob("*.tmp"))


@pytest.mark.slow
def test_a_full_disk_is_the_users_to_mend(cut: Path, pictures: Path, tmp_path: Path) -> None:
    """The kernel lets no file grow beyond 10 MB (20 where a block is larger): less than a checkpoint's files."""
    command = distill(cut, pictures, tmp_path / "student", "steps=2", "batch_size=2", "checkpoint_every=1")
    limited = ["sh", "-c", 'ulimit -f 20000; exec "$@"', "sh", *command]
    refused = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert refused.returncode == 2, refused.stderr
    assert "checkpoint of step 1" in refused.stderr and "hint: make room" in refused.stderr
    assert "Traceback" not in refused.stderr and not (tmp_path / "student").exists()
