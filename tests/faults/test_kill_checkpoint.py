"""Checkpoints are whole or not there, and a damaged one is never believed."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from decant.errors import UserError
from decant.train import checkpoint

TENSORS = {
    "weights": {"a": torch.arange(6.0).view(2, 3)},
    "ema": {},
    "optimizer": {"a/step": torch.tensor(3.0)},
}


def written(work: Path, *steps: int) -> None:
    for step in steps:
        checkpoint.write(work, step, TENSORS, {"updates": {"student": step}, "lr": 0.1})


def newest(work: Path) -> int | None:
    found = checkpoint.latest(work)
    return None if found is None else found.step


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written(tmp_path, 3)
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.scalars == {"updates": {"student": 3}, "lr": 0.1}
    assert torch.equal(found.tensors("weights")["a"], TENSORS["weights"]["a"])
    assert found.tensors("optimizer")["a/step"].shape == () and found.tensors("ema") == {}


def test_the_last_two_stay(tmp_path: Path) -> None:
    written(tmp_path, 1, 2, 10, 9_999_999_99, 10_000_000_000)
    assert newest(tmp_path) == 10_000_000_000
    assert len(list(tmp_path.iterdir())) == 2


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    held = bytearray(path.read_bytes())
    held[-1] ^= 1
    path.write_bytes(held)


def _other(path: Path) -> None:
    save_file({"a": torch.ones(2, 3)}, path)


@pytest.mark.parametrize("damage", [_truncate, _flip, _other, Path.unlink])
def test_damaged_tensors_are_skipped_with_a_warning(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path, 1, 2)
    damage(tmp_path / "step-00000002" / "weights.safetensors")
    with caplog.at_level(logging.WARNING):
        assert newest(tmp_path) == 1
    assert "step-00000002" in caplog.text


def _rewritten(path: Path) -> None:
    state = json.loads(path.read_text())
    state["body"]["scalars"]["updates"]["student"] = 1
    path.write_text(json.dumps(state))


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        Path.unlink,
        _rewritten,
        lambda path: path.write_text("[]"),
        lambda path: path.write_text("{}"),
    ],
)
def test_damaged_scalars_are_skipped(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    written(tmp_path, 1, 2)
    damage(tmp_path / "step-00000002" / "state.json")
    assert newest(tmp_path) == 1


def test_a_half_written_folder_is_no_checkpoint_and_goes_away(tmp_path: Path) -> None:
    written(tmp_path, 1)
    (tmp_path / ".tmp-00000002").mkdir()
    (tmp_path / ".tmp-00000002" / "weights.safetensors").write_bytes(b"half")
    assert newest(tmp_path) == 1
    written(tmp_path, 2)
    assert newest(tmp_path) == 2 and not list(tmp_path.glob(".tmp*"))


def test_damaged_later_ones_do_not_push_out_what_is_written_after_a_resume(tmp_path: Path) -> None:
    written(tmp_path, 10, 11)
    for step in (10, 11):
        _truncate(tmp_path / f"step-000000{step}" / "state.json")
    assert newest(tmp_path) is None
    written(tmp_path, 5)
    assert newest(tmp_path) == 5
    written(tmp_path, 10)
    assert newest(tmp_path) == 10


def test_a_step_is_written_again_after_damage(tmp_path: Path) -> None:
    written(tmp_path, 1, 2)
    _truncate(tmp_path / "step-00000002" / "weights.safetensors")
    written(tmp_path, 2)
    assert newest(tmp_path) == 2


def test_another_runs_later_checkpoints_are_not_overwritten(tmp_path: Path) -> None:
    written(tmp_path, 100)
    with pytest.raises(UserError, match="step 1 after step 100"):
        written(tmp_path, 1)
    assert newest(tmp_path) == 100
