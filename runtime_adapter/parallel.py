"""Several things at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any


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
