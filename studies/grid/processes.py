"""Calls that share a few processes, and end with the first one: by Ctrl-C or a failure."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context
from typing import Any, TypeVar

Arguments = TypeVar("Arguments", bound=tuple[Any, ...])
Result = TypeVar("Result")


def finished(
    function: Callable[..., Result], calls: Sequence[Arguments], processes: int
) -> Generator[tuple[Arguments, Result], None, None]:
    """The arguments and result of each call as it ends; in this process where one is enough.

    Whatever ends the caller ends the processes too, with the calls that they are in.
    """
    if processes == 1:
        for arguments in calls:
            yield arguments, function(*arguments)
        return
    # new interpreters: compiled loops and their threads do not survive a fork
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _leave_interrupts)
    try:
        futures = {pool.submit(function, *arguments): arguments for arguments in calls}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BaseException:
        for process in active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_interrupts() -> None:
    """Ctrl-C reaches all processes of a terminal; the first one alone ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
