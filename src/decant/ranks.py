"""The processes of one run, as `accelerate launch` or torchrun start them: who this one is, and what they share."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar, cast

from decant.errors import UserError

_T = TypeVar("_T")
# One rank works alone for as long as a cut, a scan or a timing takes, while the others wait. A rank that dies is
# noticed at once: its connections close.
_PATIENCE = timedelta(hours=12)
_LOST = ("closed by peer", "reset by peer", "broken pipe", "connection refused", "remote process exited")


class ElsewhereError(UserError):
    """What the first rank has refused, raised on the others, which need not tell it again."""


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is. One process alone is the first of one, and never waits.

    Every method but ``part``, ``shares`` and ``first`` is to be called by all ranks alike.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes folders and talks."""
        return self.rank == 0

    def part(self, items: Sequence[_T]) -> Sequence[_T]:
        """This rank's part of a sequence that is cut into one piece a rank, as equal as can be."""
        n = len(items)
        return items[self.rank * n // self.count : (self.rank + 1) * n // self.count]

    def shares(self, n: int, size: int) -> list[list[int]]:
        """Places 0 to n - 1 by rank: batches of ``size``, dealt in turns, so that they are those of one process."""
        dealt: list[list[int]] = [[] for _ in range(self.count)]
        for number, start in enumerate(range(0, n, size)):
            dealt[number % self.count] += range(start, min(start + size, n))
        return dealt

    def on_first(self, call: Callable[[], _T]) -> _T:
        """What ``call`` gives on the first rank, the only one that calls it. A UserError there is raised on all."""
        if self.count == 1:
            return call()
        answer: Any = None
        refused: UserError | None = None
        if self.first:
            try:
                answer = call()
            except UserError as error:
                refused = error
        shared = [(answer, str(refused) if refused else None)]
        self._group().broadcast_object_list(shared, src=0)
        answer, words = shared[0]
        if refused is not None:
            raise refused
        if words is not None:
            raise ElsewhereError(words)
        return cast(_T, answer)

    def gathered(self, mine: _T) -> list[_T]:
        """Every rank's, by rank, on every rank."""
        if self.count == 1:
            return [mine]
        found: list[Any] = [None] * self.count
        self._group().all_gather_object(found, mine)
        return found

    def meet(self) -> None:
        """Wait until every rank is here."""
        self.gathered(None)

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        return flag if self.count == 1 else any(self.gathered(flag))

    def _group(self) -> Any:
        """``torch.distributed``, which this process has joined: with gloo where the machine has no accelerator."""
        import torch
        from accelerate import PartialState

        if not torch.distributed.is_initialized():
            device = torch.accelerator.current_accelerator(check_available=True)
            alone_on_cpu = device is None or device.type == "mps"
            forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
            PartialState(cpu=alone_on_cpu or forced, timeout=_PATIENCE)
        return torch.distributed

    def join(self) -> None:
        """Meet the other ranks; needed before anything is placed on a device."""
        if self.count > 1:
            self._group()


ALONE = Ranks()


@lru_cache
def here() -> Ranks:
    """This process among those that a launcher started with it; alone where none did."""
    if "LOCAL_RANK" not in os.environ:
        return ALONE
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def alone() -> None:
    """From here on this process is by itself, whatever started it."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    here.cache_clear()


def lost(error: BaseException) -> bool:
    """Whether an error says that another rank is no more."""
    import torch

    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _LOST)
