"""Run a function in a process of its own, so that what one call leaves behind is not taken for the next one's."""

import multiprocessing as mp
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from typing import Any, TypeVar

_Result = TypeVar("_Result")


def prepare(call: Callable[..., Any]) -> None:
    """Begin to import what ``call`` needs, in a process from which `alone` forks; returns at once."""
    if _method() == "forkserver":
        mp.get_context("forkserver").set_forkserver_preload([call.__module__])
        forkserver.ensure_running()


def alone(call: Callable[..., _Result], jobs: Sequence[tuple[Any, ...]]) -> list[_Result]:
    """``[call(*job) for job in jobs]``, one after the other, each in a fresh process that ends with it.

    Where the system can fork, the libraries are imported once, in a process that does nothing else. ``call`` is a
    function of a module; it, its arguments and its result can be pickled. An exception in it is raised here.
    """
    prepare(call)
    with ProcessPoolExecutor(1, mp_context=mp.get_context(_method()), max_tasks_per_child=1) as pool:
        return list(pool.map(call, *zip(*jobs, strict=True))) if jobs else []


def _method() -> str:
    return "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
