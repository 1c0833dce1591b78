"""Ctrl-C, SIGTERM, SIGHUP and a full disk at the real command line, on the shipped teacher."""

import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from decant.cli.work import one_stage
from decant.scenes.folder import draw_folder
from processes import DECANT, Begun, here

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The space in its name must come back quoted."""
    return draw_folder(tmp_path_factory.mktemp("data") / "my pictures", 40, "train")


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cut") / "tiny"
    one_stage("prune", {"student": "bk-tiny"}, teacher="scenes", models={"teacher": "scenes"}, out=out, talk=print)
    return out


def distill(cut: Path, pictures: Path, out: Path, *settings: str) -> list[str]:
    words = ["distill", str(cut), "--teacher", "scenes", "--data", str(pictures), "--out", str(out)]
    return words + [word for setting in settings for word in ("--set", setting)]


def lines_in(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def advised(child: Begun) -> list[str]:
    """The words of the command that goes on, as it was printed: the last line."""
    assert "Traceback" not in child.said, child.said
    *_, before, command = child.said.strip().splitlines()
    assert before.endswith("Go on with:"), child.said
    words = shlex.split(command)
    assert words[: len(DECANT)] == DECANT, "as it was started"
    return words[len(DECANT) :]


@pytest.mark.slow
def test_signals_save_and_the_printed_command_goes_on_to_the_same_weights(
    cut: Path, pictures: Path, tmp_path: Path
) -> None:
    settings = ("steps=16", "batch_size=2", "ema=0.9")
    out, said = tmp_path / "stopped student", tmp_path / "said"
    losses = tmp_path / ".stopped student.work" / "stopped student" / "partial" / "losses.jsonl"
    words = typed = distill(cut, pictures, out, *settings)
    for number, status in SIGNALS:
        before = lines_in(losses)
        child = Begun(words, said)
        child.wait_for(lambda before=before: lines_in(losses) > before)
        time.sleep(0.2)
        child.signal(number)
        assert child.wait() == status, child.said
        assert f"stopped ({signal.Signals(number).name})" in child.said and "saved at step" in child.said
        words = advised(child)
        assert words == typed
        assert not out.exists() and not list(losses.parents[2].glob("*.tmp")), "nothing half done stays"
    went_on = here(*words)
    assert went_on.returncode == 0 and "goes on from the checkpoint" in went_on.stderr, went_on.stderr
    whole = tmp_path / "whole"
    assert here(*distill(cut, pictures, whole, *settings)).returncode == 0
    one, other = (load_file(path / "unet/diffusion_pytorch_model.safetensors") for path in (whole, out))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(cut: Path, pictures: Path, tmp_path: Path) -> None:
    """Updates of a hundred forwards: the first Ctrl-C waits for the end of one, the second does not."""
    out = tmp_path / "student"
    losses = tmp_path / ".student.work" / "student" / "partial" / "losses.jsonl"
    typed = distill(cut, pictures, out, "steps=9", "batch_size=16", "accumulation=100")
    child = Begun(typed, tmp_path / "said")
    child.wait_for(losses.exists)
    time.sleep(0.5)
    child.signal(signal.SIGINT)
    child.wait_for(lambda: "once more" in child.said)
    child.signal(signal.SIGINT)
    assert child.wait() == 130
    assert "saved at" not in child.said and not list(losses.parent.glob("step-*"))
    assert advised(child) == typed


@pytest.mark.slow
def test_a_signal_before_the_loop_keeps_finished_stages(pictures: Path, tmp_path: Path) -> None:
    """During the cut nothing is finished; during what comes before the first step the cut is."""
    out, said = tmp_path / "run", tmp_path / "said"
    typed = ["run", "bk-sdm-tiny", "--teacher", "scenes", "--data", str(pictures), "--out", str(out)]
    typed += ["--set", "tiny.steps=2", "--set", "tiny.batch_size=2"]
    for stage, number, status, finished in (
        ("[1/3] cut: prune", signal.SIGINT, 130, False),
        ("[2/3] tiny: distill", signal.SIGTERM, 143, True),
    ):
        child = Begun(typed, said)
        child.wait_for(lambda child=child, stage=stage: stage in child.said)
        child.signal(number)
        assert child.wait() == status, child.said
        assert advised(child) == typed
        assert (out / "01-cut" / "decant.json").is_file() is finished
        assert not (out / "02-tiny").exists() and not list((out / ".work").glob("*.tmp"))


@pytest.mark.slow
def test_a_full_disk_is_the_users_to_mend(cut: Path, pictures: Path, tmp_path: Path) -> None:
    """The kernel lets no file grow beyond 10 MB (20 where a block is larger): less than a checkpoint's files."""
    words = distill(cut, pictures, tmp_path / "student", "steps=2", "batch_size=2", "checkpoint_every=1")
    limited = ["sh", "-c", 'ulimit -f 20000; exec "$@"', "sh", *DECANT, *words]
    refused = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert refused.returncode == 2, refused.stderr
    assert "checkpoint of step 1" in refused.stderr and "hint: make room" in refused.stderr
    assert "Traceback" not in refused.stderr and not (tmp_path / "student").exists()
