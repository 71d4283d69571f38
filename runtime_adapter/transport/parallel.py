"""Several things at once, or one thing with a limit of time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def in_parallel(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run all at once, so that no two wait for each other; raises the first error."""
    found: list[Any] = [None] * len(jobs)
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            found[index] = jobs[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


def in_time(job: Callable[[], T], within_s: float) -> T:
    """The result of a job that may block for ever, run in a thread of its own.

    Also for what cannot be interrupted: the waiting can. A job that is not done in time is left to
    its thread.

    Raises
    ------
    TimeoutError
        It is not done in time.
    """
    found: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            found.append(job())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(within_s)
    if errors:
        raise errors[0]
    if not found:
        raise TimeoutError(f"not done within {within_s:g} s")
    return found[0]
