"""Times any call, and says how much memory the process took. Knows no model."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch

from decant.errors import refuse

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class Latency:
    """Milliseconds of `n` calls after `warmup` untimed ones: their median; the fastest and the slowest as spread."""

    median: float
    low: float
    high: float
    n: int
    warmup: int

    def to_json(self) -> dict[str, float | int]:
        """The figures as `report.json` holds them, in ms."""
        return asdict(self)


@dataclass(frozen=True)
class PeakMemory:
    """The most memory held so far, in MB of 10**6 bytes, by the process and on the CUDA device if any."""

    process_mb: float
    cuda_mb: float | None


def time_ms(call: Callable[[], object], *, warmup: int = 1, repeats: int = 5) -> Latency:
    """Time a call in milliseconds, on the wall clock, CUDA work included.

    Args:
        call: what to time; what it returns is dropped.
        warmup: calls before the first timed one.
        repeats: timed calls, at least one.

    Raises:
        UserError: for fewer than one repeat or a negative warm-up.
    """
    return time_rounds({"": call}, warmup=warmup, repeats=repeats)[""]


def time_rounds(
    calls: Mapping[_Key, Callable[[], object]],
    *,
    warmup: int = 1,
    repeats: int = 5,
    tick: Callable[[int], None] = lambda done: None,
) -> dict[_Key, Latency]:
    """Time several calls to be compared: one of each a round, every second round backwards.

    What drifts on the machine meanwhile (heat, other work) meets all calls alike, which it does not when one is
    repeated to its end before the next begins.

    Args:
        calls: what to time, by name.
        warmup: rounds before the first timed one.
        repeats: timed rounds, at least one.
        tick: told how many calls are done, warm-up included.

    Raises:
        UserError: as `time_ms`.
    """
    if repeats < 1:
        raise refuse("repeats", repeats, allowed="1 or more", hint="5 give a median and a spread")
    if warmup < 0:
        raise refuse("warmup", warmup, allowed="0 or more", hint="1 is enough on a CPU, 3 on a GPU")
    times_ms: dict[_Key, list[float]] = {key: [] for key in calls}
    for number in range(warmup + repeats):
        for place, key in enumerate(list(calls)[:: -1 if number % 2 else 1], start=1):
            times_ms[key].append(_once_ms(calls[key]))
            tick(number * len(calls) + place)
    timed = {key: each[warmup:] for key, each in times_ms.items()}
    return {k: Latency(statistics.median(t), min(t), max(t), repeats, warmup) for k, t in timed.items()}


def peak_memory_mb() -> PeakMemory:
    """The peak of this process since it began, and of its CUDA allocations if CUDA has been initialised."""
    cuda_mb = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_initialized() else None
    return PeakMemory(_peak_bytes() / 1e6, cuda_mb)


def _peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: on Linux a process starts with the peak of the one that launched it.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _once_ms(call: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    call()
    _synchronize()
    return (time.perf_counter() - start) * 1000


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
