"""Several processes train as one: the same curve, averaged gradients, the same bits after one of them was killed."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decant.data.order import stream
from decant.ranks import Ranks
from decant.train import checkpoint
from decant.train.draw import Draw
from processes import forking
from same import assert_same

PATIENCE = 300.0


@given(st.integers(1, 9), st.integers(0, 50), st.integers(1, 7))
def test_ranks_share_everything_once(count: int, n: int, size: int) -> None:
    all_ranks = [Ranks(rank, count) for rank in range(count)]
    parts = [ranks.part(range(n)) for ranks in all_ranks]
    assert [place for part in parts for place in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    shares = all_ranks[0].shares(n, size)
    assert sorted(place for share in shares for place in share) == list(range(n))
    batches = {tuple(share[start : start + size]) for share in shares for start in range(0, len(share), size)}
    assert batches == {tuple(range(start, min(start + size, n))) for start in range(0, n, size)}, "as one has them"


@pytest.fixture(autouse=True)
def _workers_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@contextmanager
def started(what: str, count: int, *args: Any) -> Iterator[list[tuple[BaseProcess, Connection]]]:
    """``count`` processes, each with what it tells."""
    context = forking()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    call = getattr(import_module("rank_worker"), what)
    begun: list[tuple[BaseProcess, Connection]] = []
    for rank in range(count):
        here, there = context.Pipe()
        place = (*args[:1], there, *args[1:])
        process = context.Process(target=call, args=(rank, count, port, *place))
        process.start()
        there.close()
        begun.append((process, here))
    try:
        yield begun
    finally:
        for process, _ in begun:
            process.kill()
            process.join()


def heard(told: Connection) -> Any:
    assert told.poll(PATIENCE), "nothing was told"
    return told.recv()


def trained(folder: Path, count: int, every: int = 100, **changes: Any) -> tuple[Any, list[tuple[Any, ...]]]:
    """(the first rank's gradients of the first update or None, its steps)."""
    with started("work", count, folder, every, changes) as ranks:
        told = []
        for rank, (_, pipe) in enumerate(ranks):
            first = heard(pipe)
            gradients = heard(pipe) if first == rank == 0 else None
            steps = [heard(pipe) for _ in range(first, changes.get("steps", import_module("rank_worker").STEPS))]
            told.append((gradients, steps))
        for process, _ in ranks:
            process.join(PATIENCE)
            assert process.exitcode == 0
    assert all(steps == told[0][1] for _, steps in told), "every rank yields the same steps"
    return told[0]


def test_what_the_ranks_share() -> None:
    with started("meet", 2) as ranks:
        told = [[heard(pipe) for _ in range(4)] for _, pipe in ranks]
    for answers in told:
        assert answers[:3] == ["made by 0", [0, 10], [True, False]]
    assert told[0][3] == ("UserError", "the disk of rank 0")
    assert told[1][3] == ("ElsewhereError", "the disk of rank 0"), "raised on all, told by the first"


def test_two_ranks_train_as_one_process_and_average_their_gradients(tmp_path: Path) -> None:
    one_gradients, one = trained(tmp_path / "one", 1, clip=None)
    two_gradients, two = trained(tmp_path / "two", 2, clip=None)
    for mine, theirs in zip(one, two, strict=True):
        assert mine[1] == pytest.approx(theirs[1], rel=1e-3), f"losses of step {mine[0]}"
        assert mine[2:] == pytest.approx(theirs[2:], rel=1e-3)
    whole, half = by_hand(8), by_hand(4)
    for name, gradient in two_gradients.items():
        torch.testing.assert_close(torch.from_numpy(gradient), whole[name], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(torch.from_numpy(one_gradients[name]), whole[name], rtol=1e-3, atol=1e-6)
    apart = [(half[name] - whole[name]).norm() > 0.1 * whole[name].norm() for name in whole]
    assert any(apart), "ranks see different data"
    a, b = (checkpoint.latest(tmp_path / name) for name in ("one", "two"))
    assert a is not None and b is not None
    for group in ("weights", "ema"):
        torch.testing.assert_close(a.tensors(group), b.tensors(group), rtol=1e-2, atol=2e-4)


def by_hand(samples: int) -> dict[str, torch.Tensor]:
    """The gradient of the mean over the first samples of the first update, all in one forward, without the loop."""
    worker = import_module("rank_worker")
    torch.manual_seed(0)
    method = worker.method()
    student = method.players["student"].module.train()
    chosen = stream(worker.SETTINGS.seed, 0, worker.UPDATE, worker.N)[:samples]
    nets = {"student": student, "teacher": method.frozen["teacher"].eval()}
    terms = method.terms("student", nets, worker.batch_of(chosen), Draw(worker.SETTINGS.seed, 0, chosen), 0)
    torch.stack([(term.weight * term.value).mean() for term in terms]).sum().backward()
    return {name: p.grad for name, p in student.named_parameters()}


def test_a_rank_that_is_killed_ends_the_others_and_a_restart_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    trained(whole, 2)
    with started("work", 2, killed, 2, {}) as ((first, told), (second, _)):
        heard(told), heard(told)
        while heard(told)[0] < 5:
            pass
        os.kill(second.pid, signal.SIGKILL)
        first.join(PATIENCE)
        assert first.exitcode == 1, "the rank that is left ends, and does not wait"
        last = None
        with suppress(EOFError):
            while told.poll():
                last = told.recv()
        assert last == ("lost", True), "and knows why"
    found = checkpoint.latest(killed)
    assert found is not None and 4 <= found.step < import_module("rank_worker").STEPS
    trained(killed, 2)
    assert_same(whole, killed, import_module("rank_worker").STEPS)


def test_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, 1)
    with started("work", 2, tmp_path, 1, {}) as ranks:
        for process, _ in ranks:
            process.join(PATIENCE)
            assert process.exitcode == 1
