"""Calls in threads: several at once, or one with a time limit."""

from __future__ import annotations

import threading
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
