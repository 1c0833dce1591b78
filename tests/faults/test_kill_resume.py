"""Law 1 under SIGKILL: a run killed at random moments and resumed ends in the very same bits."""

import multiprocessing as mp
import random
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

from decant.train import checkpoint

KILLS = 8
# What takes seconds to import; every process is forked from one that holds it already.
PRELOAD = ["decant.methods.kd", "decant.models.families.sd1", "decant.train.loop"]


def _run(folder: Path, seconds: float | None) -> tuple[int, float, int | None]:
    """One process, killed ``seconds`` after it was ready or left to end: first step, seconds, exit status."""
    worker = import_module("kill_worker")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    here, there = context.Pipe()
    process = context.Process(target=worker.work, args=(folder, there))
    process.start()
    there.close()
    assert here.poll(300), "the worker never began"
    first, started = here.recv(), time.perf_counter()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return first, time.perf_counter() - started, process.exitcode


@pytest.mark.slow
def test_a_killed_and_resumed_run_ends_in_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _, seconds, status = _run(whole, None)
    assert status == 0
    chance = random.Random()
    pauses = [chance.uniform(0, seconds / KILLS) for _ in range(KILLS)] + [seconds / 2]
    statuses = [_run(killed, pause)[2] for pause in pauses]
    assert set(statuses) <= {0, -9} and statuses.count(-9) >= KILLS
    first, _, status = _run(killed, None)
    assert status == 0 and first > 0, "there was something to resume"
    _assert_same(whole, killed)


def _assert_same(whole: Path, killed: Path) -> None:
    one, other = checkpoint.latest(whole), checkpoint.latest(killed)
    assert one is not None and other is not None
    assert one.step == other.step == 24 and one.scalars == other.scalars
    for group in ("weights", "ema", "optimizer"):
        a, b = one.tensors(group), other.tensors(group)
        assert a.keys() == b.keys() and a
        assert [name for name in a if not torch.equal(a[name], b[name])] == []
