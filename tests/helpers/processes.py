"""The command line in this process, and in real ones that tests stop and kill without waiting for their imports."""

import atexit
import contextlib
import importlib.util
import io
import multiprocessing as mp
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

DECANT = [sys.executable, "-m", "decant.cli.main"]
PATIENCE = 300.0  # seconds until something hangs; a busy machine is slow
# What takes seconds to import; every process is forked from one that holds it already.
PRELOAD = ["decant.cli.main", "decant.cli.work", "decant.stages.all", "decant.report.page", "decant.methods.kd"]


def here(*words: object) -> subprocess.CompletedProcess[str]:
    """``decant WORDS`` in this process, which has imported everything already."""
    from decant.cli.main import main

    said, talk = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(talk), pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    code = stop.value.code
    return subprocess.CompletedProcess(words, code if isinstance(code, int) else 0, said.getvalue(), talk.getvalue())


def forking() -> ForkServerContext:
    """Where to start processes that hold decant and all that it imports."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # as the command line sets it before it imports
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


@contextlib.contextmanager
def telling(target: Callable[..., None], *words: Any) -> Iterator[tuple[BaseProcess, Connection]]:
    """A process at ``target(connection, *words)``, killed in the end, and what it tells by the connection."""
    context = forking()
    mine, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *words))
    process.start()
    theirs.close()
    try:
        yield process, mine
    finally:
        process.kill()
        process.join()


def doing(file: str, name: str, *words: Any) -> BaseProcess:
    """A process at the function ``name`` of a file of tests, which no other process could import by its name."""
    process = forking().Process(target=_call, args=(file, name, words))
    process.start()
    return process


def _call(file: str, name: str, words: tuple[Any, ...]) -> None:
    spec = importlib.util.spec_from_file_location("told_by_file", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    getattr(module, name)(*words)


class Begun:
    """A decant command at work in a process and a group of its own, its talk in a file."""

    def __init__(self, words: list[str], said: Path) -> None:
        self.typed = [*DECANT, *words]
        said.write_bytes(b"")
        self._said = said
        self._process: BaseProcess = forking().Process(target=_decant, args=(words, said, dict(os.environ)))
        self._process.start()
        atexit.register(self._process.kill)  # where a test fails

    @property
    def pid(self) -> int:
        """Of the process and of its group."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def said(self) -> str:
        """All that it has written so far, on stdout and stderr."""
        return self._said.read_text()

    def wait_for(self, happened: Callable[[], object]) -> None:
        """Until it is so; it must not end before."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            assert self._process.exitcode is None, f"ended too early:\n{self.said}"
            assert time.monotonic() < deadline, self.said
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        """To the group, as a terminal does."""
        os.killpg(self.pid, number)

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit status, negative if a signal ended it."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"still at work:\n{self.said}"
        return self._process.exitcode

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self._process.kill()
        assert self.wait() == -signal.SIGKILL, "killed, not ended"


def _decant(words: list[str], said: Path, environment: Mapping[str, str]) -> None:
    """What ``python -m decant.cli.main WORDS`` does once it has imported all, as a shell in a terminal begins it."""
    os.setsid()
    file = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update({name: value for name, value in environment.items() if not name.startswith("PYTEST")})
    import decant.cli.main as command

    sys.argv, sys.orig_argv = [str(command.__file__), *words], [*DECANT, *words]
    command.main()


def lines_in(path: Path) -> int:
    """Of a file that may not be there yet."""
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def stopped_on_its_way(words: list[str], out: Path, signals: Sequence[int], most: int, chance: random.Random) -> None:
    """A verb that trains into ``out``, ended by each signal after 1 to ``most`` more updates; then it runs on."""
    losses = out.parent / f".{out.name}.work" / out.name / "partial" / "losses.jsonl"
    for number in signals:
        child = Begun(words, out.parent / "said")
        more = lines_in(losses) + chance.randint(1, most)
        child.wait_for(lambda more=more: lines_in(losses) >= more)  # type: ignore[misc]
        time.sleep(chance.uniform(0, 0.1))
        child.signal(number)
        assert child.wait() in (-number, 128 + number), child.said
        assert not out.exists()
    went_on = here(*words)
    assert went_on.returncode == 0 and "goes on from the checkpoint" in went_on.stderr, went_on.stderr
