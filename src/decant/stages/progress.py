"""Progress on stderr: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from decant.ranks import here


class Tick(Protocol):
    """Say how much is done; the note stands beside it."""

    def __call__(self, done: int, note: str = "") -> None: ...


_QUIET_SECONDS = 10.0


@contextmanager
def progress(what: str, total: int, talk: Callable[[str], None]) -> Iterator[Tick]:
    """Yield ``tick(done, note)``: it moves a bar with the time left on a terminal, and talks now and then elsewhere."""
    if not here().first:
        yield lambda done, note="": None
    elif sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total, note="")

            def tick(done: int, note: str = "") -> None:
                bar.update(task, completed=done, note=note)

            yield tick
    else:
        yield _lines(what, total, talk)


def _lines(what: str, total: int, talk: Callable[[str], None]) -> Tick:
    """The pace is counted from the first tick on: work may begin in the middle, and a tick may stand for much of it."""
    told = time.monotonic()
    first: list[tuple[int, float]] = []

    def tick(done: int, note: str = "") -> None:
        nonlocal told
        now = time.monotonic()
        first[:] = first or [(done, now)]
        if now - told < _QUIET_SECONDS and done < total:
            return
        told = now
        before, since = first[0]
        left = f"  {(now - since) / (done - before) * (total - done):.0f} s left" if done > before else ""
        talk(f"{what} {done}/{total}  {note}{left}")

    return tick
