"""Law 1 under SIGKILL on shards, here and on a server without ranges: killed anywhere, the same bits in the end."""

import io
import random
import tarfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from processes import telling
from same import assert_same

PICTURES = 36
STEPS = 24  # of source_worker
PATIENCE = 300.0
Served = Callable[..., AbstractContextManager[tuple[str, list[str]]]]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three, of pictures of noise."""
    pixels = np.random.default_rng(0)
    (tmp_path / "shards").mkdir()
    for shard in range(3):
        with tarfile.open(tmp_path / f"shards/{shard:05d}.tar", "w") as tar:
            for number in range(shard, PICTURES, 3):
                buffer = io.BytesIO()
                Image.fromarray(pixels.integers(0, 256, (64, 80, 3), dtype=np.uint8)).save(buffer, "PNG")
                words = f'["picture {number}", "number {number}"]'.encode()
                for kind, content in (("png", buffer.getvalue()), ("json", words)):
                    info = tarfile.TarInfo(f"{number:05d}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return tmp_path / "shards"


def running(data: str, folder: Path) -> AbstractContextManager[tuple[BaseProcess, Connection]]:
    """A process at work on a source, and what it tells."""
    return telling(import_module("source_worker").work, data, folder)


def to_the_end(data: str, folder: Path) -> list[Any]:
    """All that it told."""
    said = []
    with running(data, folder) as (process, told):
        while told.poll(PATIENCE):
            try:
                said.append(told.recv())
            except EOFError:
                break
        process.join(PATIENCE)
        assert process.exitcode == 0
    return said


def killed_at(data: str, folder: Path, moment: str | int, pause: float) -> None:
    """Killed so many seconds after it told of a moment: a word, or a number of updates in its life.

    A run that has encoded all tells no "encoding": it is killed before its first update.
    """
    first: int | None = None
    with running(data, folder) as (process, told):
        while told.poll(PATIENCE):
            said = told.recv()
            first = said if first is None and isinstance(said, int) else first
            if said == moment if first is None else isinstance(moment, str) or said == first + moment:
                break
        time.sleep(pause)
        process.kill()
        process.join()
        assert process.exitcode == -9, "killed, not ended"


@pytest.mark.slow
@pytest.mark.parametrize("place", ["folder", "server"])
def test_a_run_on_shards_killed_anywhere_ends_in_the_same_bits(
    shards: Path, tmp_path: Path, served: Served, place: Literal["folder", "server"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it looks, while it encodes, before its first update, and after some; the server forgets nothing of it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with served(shards, ranges=False) if place == "server" else nullcontext((str(shards), [])) as (where, _):
        data = f"{where}/{{00000..00002}}.tar"
        assert to_the_end(data, whole)[-1] == STEPS
        for moment in ("looking", "encoding", "encoding", 0, 2, 3, 5):
            killed_at(data, killed, moment, chance.uniform(0, 0.05))
        said = to_the_end(data, killed)
    first = next(each for each in said if isinstance(each, int))
    assert 2 + 3 + 5 <= first < STEPS and said[-1] == STEPS, said
    assert_same(whole / "steps", killed / "steps", STEPS)
