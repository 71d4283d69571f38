"""Runs requests in lanes: a lane is a thread that serves one request at a time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from runtime_adapter.moe.emulated_gpu import wait_until
from runtime_adapter.moe.remote_dispatcher import RemoteDispatcher

T = TypeVar("T")


def run_in_lanes(
    lanes: Sequence[RemoteDispatcher],
    arrivals: Iterable[tuple[float, T]],
    serve: Callable[[RemoteDispatcher, T], None],
) -> None:
    """Serve each request from its arrival on, in the next lane that is free; waits for all.

    ``arrivals`` are times of ``time.monotonic`` and what ``serve`` is called with; they may come
    one by one. What ``serve`` raises, as where an answer cannot be written, ends all lanes after
    the requests that they are at, and is raised here.
    """
    waiting: queue.SimpleQueue[tuple[T] | None] = queue.SimpleQueue()
    failures: list[BaseException] = []

    def run(lane: RemoteDispatcher) -> None:
        try:
            while (item := waiting.get()) is not None and not failures:
                serve(lane, *item)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(lane,), daemon=True) for lane in lanes]
    for thread in threads:
        thread.start()
    for at_s, request in arrivals:
        wait_until(at_s)
        if failures:
            break
        waiting.put((request,))
    for _ in threads:
        waiting.put(None)
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
