"""What this process does with memory that it freed."""

import ctypes
import sys
from collections.abc import Mapping
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_MB = 2**20
_SMALL = 2**17  # glibc's own threshold as a process begins


def keep_freed_memory() -> None:
    """Let this process keep up to half a gigabyte that it freed: a tenth of a small network's step, where glibc is.

    By default glibc gives every larger tensor back to the system, and asks for zeroed pages in the next operation.
    Tensors above 32 MB still are given back, so that a large network's peak does not rise.
    """
    _mallopt({_MMAP_THRESHOLD: 32 * _MB, _TRIM_THRESHOLD: 512 * _MB})


def give_back_freed_memory() -> None:
    """Let this process keep nothing that it freed: for a limit that was asked for, at some cost in time.

    Kept pieces are seldom where the next tensor fits: a training's peak was a fifth to twice as large with them.
    """
    _mallopt({_MMAP_THRESHOLD: _SMALL, _TRIM_THRESHOLD: _SMALL})


def _mallopt(settings: Mapping[int, int]) -> None:
    if sys.platform != "linux":
        return
    libc: Any = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        for parameter, value in settings.items():
            libc.mallopt(parameter, value)
