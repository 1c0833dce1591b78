"""Law 1 under SIGKILL: a run killed at random moments and resumed ends in the very same bits."""

import random
import time
from contextlib import AbstractContextManager
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from decant.train import checkpoint
from processes import telling
from same import assert_same

KILLS = 20
PATIENCE = 900.0  # seconds until something hangs; a busy machine is slow
STEPS = 80  # of kill_worker
WRITING = ".tmp-[0-9]*[0-9]"


def training(folder: Path, every: int) -> AbstractContextManager[tuple[BaseProcess, Connection]]:
    """A process that trains into ``folder``, and what it tells."""
    return telling(import_module("kill_worker").work, folder, every)


def to_the_end(folder: Path, every: int) -> tuple[int, float]:
    """Gives the step it went on from, and the seconds of an update."""
    with training(folder, every) as (process, told):
        first, begin = told.recv(), time.monotonic()
        process.join(PATIENCE)
        assert process.exitcode == 0
    return first, (time.monotonic() - begin) / STEPS


def kill(process: BaseProcess) -> None:
    process.kill()
    process.join()
    assert process.exitcode == -9, "killed, not ended"


def kill_anywhere(folder: Path, chance: random.Random, step_seconds: float) -> str:
    """Killed within an update or a write after a few of them, or while it takes up the checkpoint before."""
    updates, pause = chance.randrange(3), chance.uniform(0, 2 * step_seconds)
    with training(folder, 1) as (process, told):
        if chance.random() < 0.2:
            time.sleep(3 * pause)
            kill(process)
            return "before the first update"
        assert told.poll(PATIENCE), "the worker never began"
        first = told.recv()
        while updates and not (folder / f"step-{first + updates:08d}").exists():
            time.sleep(step_seconds / 20)
        time.sleep(pause)
        kill(process)
    return f"after {updates} updates and {pause:.4f} s"


def kill_in_a_write(folder: Path, chance: random.Random, step_seconds: float) -> str:
    """Killed while the temporary folder of a checkpoint is there, and holds some of its four files."""
    files = chance.randrange(4)
    for attempt in range(1, 21):
        with training(folder, 1) as (process, _):
            while len(being_written(folder)) < files or not any(folder.glob(WRITING)):
                assert process.is_alive(), "no write was seen"
            kill(process)
        if any(folder.glob(WRITING)):
            return f"with {len(being_written(folder))} files written, attempt {attempt}"
    pytest.fail("twenty writes ended before the kill")


def being_written(folder: Path) -> list[str]:
    """The files of a write that is going on; none where it ended while this looked."""
    try:
        return [path.name for path in folder.glob(f"{WRITING}/*.*")]
    except FileNotFoundError:
        return []


@pytest.mark.slow
def test_a_killed_and_resumed_run_ends_in_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    first, step_seconds = to_the_end(whole, every=10_000)
    assert first == 0
    moments = [kill_in_a_write] * 8 + [kill_anywhere] * (KILLS - 8)
    chance.shuffle(moments)
    for number, moment in enumerate(moments, start=1):
        outcome = moment(killed, chance, step_seconds)
        found = checkpoint.latest(killed)
        print(f"kill {number}, {moment.__name__} {outcome}: step {found.step if found else None}")
    first, _ = to_the_end(killed, every=2)
    assert first > 0, "there was something to resume"
    assert_same(whole, killed, STEPS)
