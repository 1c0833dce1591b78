"""What this process does with memory that it freed."""

import ctypes
import sys
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_MB = 2**20


def keep_freed_memory() -> None:
    """Let this process keep up to half a gigabyte that it freed: a tenth of a small network's step, where glibc is.

    By default glibc gives every larger tensor back to the system, and asks for zeroed pages in the next operation.
    Tensors above 32 MB still are given back, so that a large network's peak does not rise.
    """
    if sys.platform != "linux":
        return
    libc: Any = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_MMAP_THRESHOLD, 32 * _MB)
        libc.mallopt(_TRIM_THRESHOLD, 512 * _MB)
