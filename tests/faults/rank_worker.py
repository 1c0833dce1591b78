"""One rank of a tiny distillation by several processes: what test_ranks starts, compares and kills."""

import os
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from kill_worker import RUN, N, method

from decant.data.batch import Batch
from decant.data.order import stream
from decant.errors import UserError
from decant.ranks import here, lost
from decant.train.loop import loop
from decant.train.state import TrainState

STEPS, UPDATE, MICRO = 12, 8, 2
SETTINGS = replace(RUN, steps=STEPS)


def become(rank: int, count: int, port: int) -> None:
    """What a launcher sets."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()})
    os.environ["OMP_NUM_THREADS"] = "1"
    here.cache_clear()
    torch.set_num_threads(1)


def batch_of(samples: Sequence[int]) -> Batch:
    """Samples of a source of ten."""
    made = torch.Generator().manual_seed(0)
    mean, std = torch.randn(N, 4, 8, 8, generator=made), torch.rand(N, 4, 8, 8, generator=made)
    tokens, empty = torch.randn(N, 5, 8, generator=made), torch.zeros(N, 5, 8)
    at = [position % N for position in samples]
    told, null = {"encoder_hidden_states": tokens[at]}, {"encoder_hidden_states": empty[at]}
    return Batch(tuple(samples), mean[at], std[at], told, null)


def batches(step: int) -> Sequence[Batch]:
    """This rank's part of eight samples, two in a forward."""
    mine = here().part(stream(SETTINGS.seed, step, UPDATE, N))
    return [batch_of(mine[start : start + MICRO]) for start in range(0, len(mine), MICRO)]


def work(
    rank: int, count: int, port: int, folder: Path, told: Connection, every: int, changes: dict[str, object]
) -> None:
    """Train to the end from the checkpoint in ``folder`` if any.

    ``told`` gets the step it starts from, of the first rank the gradients after the first update, then
    ``(step, losses, total, norm)`` of every step.
    """
    become(rank, count, port)
    trained, run = method(), replace(SETTINGS, **changes)
    state = TrainState.start(trained, run, device="cpu")
    state.resume(folder)
    told.send(state.step)
    try:
        for step in loop(trained, batches, state):
            if step.step == 1 and here().first:  # the others' are not listened to meanwhile, and a pipe is soon full
                told.send({name: p.grad.numpy() for name, p in state.parameters["student"].items()})
            told.send((step.step, step.losses, step.total, step.grad_norm))
            if step.step % every == 0 or step.step == run.steps:
                state.save(folder)
    except Exception as error:
        told.send(("lost", lost(error)))
        raise


def meet(rank: int, count: int, port: int, told: Connection) -> None:
    """What the ranks share besides gradients."""
    become(rank, count, port)
    ranks = here()
    told.send(ranks.on_first(lambda: f"made by {rank}"))
    told.send(ranks.gathered(rank * 10))
    told.send([ranks.any(rank == 1), ranks.any(False)])
    try:
        ranks.on_first(refuse)
    except UserError as error:
        told.send((type(error).__name__, str(error)))


def refuse() -> None:
    raise UserError(f"the disk of rank {here().rank}")
