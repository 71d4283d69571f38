"""Threads for several calls at once, for one with a time limit, and to end with the parent."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def run_in_parallel(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run all jobs at once, so that none waits for another; raises the first error."""
    results: list[Any] = [None] * len(jobs)
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            results[index] = jobs[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def run_with_timeout(job: Callable[[], T], timeout_s: float) -> T:
    """Run a job that may block for ever, in a thread of its own, and return its result.

    Also for calls that cannot be interrupted: only the waiting ends. A job that is not done in time
    is left to its thread.

    Raises
    ------
    TimeoutError
        It is not done in time.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(job())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"not done within {timeout_s:g} s")
    return results[0]


def exit_with_parent(interval_s: float = 0.25) -> None:
    """From now on, exit this process when its parent process dies, even during start-up."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        while parent is not None and os.getppid() == parent.pid:
            time.sleep(interval_s)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
