"""Checkpoints are whole or not there, and a damaged one is never believed."""

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from decant.errors import UserError
from decant.train import checkpoint

TENSORS = {
    "weights": {"a": torch.arange(6.0).view(2, 3)},
    "ema": {"a": torch.arange(6.0).view(2, 3) / 2},
    "optimizer": {"a/step": torch.tensor(3.0)},
}


SEED = random.randrange(2**32)  # printed with what fails
CHANCE = random.Random(SEED)


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
    assert found.tensors("optimizer")["a/step"].shape == () and found.tensors("other") == {}


def test_the_last_two_stay(tmp_path: Path) -> None:
    written(tmp_path, 1, 2, 10, 9_999_999_99, 10_000_000_000)
    assert newest(tmp_path) == 10_000_000_000
    assert len(list(tmp_path.iterdir())) == 2


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    """One bit, anywhere."""
    stored = bytearray(path.read_bytes())
    bit = CHANCE.randrange(8 * len(stored))
    stored[bit // 8] ^= 1 << bit % 8
    path.write_bytes(stored)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: CHANCE.randrange(path.stat().st_size)])


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + CHANCE.randbytes(CHANCE.randint(1, 5000)))


def _scramble(path: Path) -> None:
    path.write_bytes(CHANCE.randbytes(path.stat().st_size))


def _make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _other(path: Path) -> None:
    save_file({"a": torch.ones(2, 3)}, path)


DAMAGES = [_truncate, _flip, _flip, _flip, _cut, _lengthen, _scramble, _make_folder, _other, Path.unlink]


@pytest.mark.parametrize("name", ["weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_file_costs_one_checkpoint_and_is_told(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    print(f"seed {SEED}")
    for number, damage in enumerate(DAMAGES):
        work = tmp_path / str(number)
        written(work, 1, 2)
        damage(work / "step-00000002" / name)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = checkpoint.latest(work)
        assert found is not None and found.step == 1, damage
        assert torch.equal(found.tensors("weights")["a"], TENSORS["weights"]["a"])
        assert "step-00000002" in caplog.text and "skipped" in caplog.text, damage


def test_what_does_not_belong_is_neither_read_nor_in_the_way(tmp_path: Path) -> None:
    written(tmp_path, 10, 11)
    save_file({"a": torch.ones(1)}, tmp_path / "step-00000011" / "other.safetensors")
    for name in ("step-1x2", "step-", "steps", ".tmp-file"):
        (tmp_path / name).write_text("no checkpoint")
    (tmp_path / "step-00000012").write_text("no folder")
    shutil.copytree(tmp_path / "step-00000010", tmp_path / "step-00000099")  # a copy under another step's name
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 11 and found.tensors("other") == {}
    written(tmp_path, 13)
    assert newest(tmp_path) == 13


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_stay_as_are_asked_for(tmp_path: Path, keep: int) -> None:
    for step in range(10, 15):
        checkpoint.write(tmp_path, step, TENSORS, {}, keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in range(15 - keep, 15)]


@pytest.mark.parametrize("group", ["weights", "ema", "optimizer"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_that_is_not_finite_is_ever_written(tmp_path: Path, group: str, bad: float) -> None:
    written(tmp_path, 1)
    spoilt = {**TENSORS, group: {"b": torch.tensor([1.0, bad])}}
    with pytest.raises(UserError, match=rf"step 2: {group} b"):
        checkpoint.write(tmp_path, 2, spoilt, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"] and newest(tmp_path) == 1


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
