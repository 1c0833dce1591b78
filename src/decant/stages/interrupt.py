"""Ctrl-C, SIGTERM and SIGHUP: an exception everywhere, and a question that long work asks itself between two steps."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

_ASKING = b"stopping after this step; once more stops at once\n"
_Handler = Callable[[int, FrameType | None], object]


class Interrupted(KeyboardInterrupt):
    """A signal asked for an end; the process should exit with ``status``."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


@dataclass
class Stop:
    """Whether someone has asked for an end, and by which signal."""

    number: int | None = None

    def check(self) -> None:
        """Raises Interrupted if so."""
        if self.number is not None:
            raise Interrupted(self.number)


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP raise, as Ctrl-C does: what is half done is tidied away, as the ``finally``s say."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    with _handled(interrupt):
        yield


@contextmanager
def asked_to_stop() -> Iterator[Stop]:
    """Note the first signal instead of raising; the second, of whichever kind, acts as before."""
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        stop.number = number
        for each, handler in before.items():
            signal.signal(each, handler)
        with suppress(OSError):  # after a SIGHUP there may be no terminal any more
            os.write(2, _ASKING)  # not print: the handler may have come in the middle of one

    with _handled(note) as before:
        yield stop


@contextmanager
def _handled(handler: _Handler) -> Iterator[dict[int, Any]]:
    """Yields the handlers before. Signals that are ignored (nohup, a shell's background) stay so."""
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {each: signal.getsignal(each) for each in numbers if signal.getsignal(each) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield before
    finally:
        for number, former in before.items():
            signal.signal(number, former)
