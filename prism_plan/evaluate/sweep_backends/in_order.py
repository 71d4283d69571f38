"""Spreads two-step work over a back end and gives the results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from prism_plan.evaluate.sweep_backends.contract import Backend

Block = TypeVar("Block")
Part = TypeVar("Part")
Result = TypeVar("Result")

#: Calls under way for each worker: one runs, one is at hand when it ends.
CALLS_PER_WORKER = 2
#: Parts into which the whole work is cut for each worker, at least: the last ones end together.
PARTS_PER_WORKER = 4


def num_parts(backend: Backend, num_blocks: int) -> int:
    """Into how many parts each of so many blocks is cut, so that all workers have work."""
    return max(1, -(-PARTS_PER_WORKER * backend.num_workers() // max(num_blocks, 1)))


def results_in_order(
    backend: Backend,
    shared: Any,
    blocks: Iterable[tuple[Block, Sequence[Part]]],
    first: Callable[[Any, Block], Any],
    then: Callable[[Any, Block, Any, Part], Result],
    both: Callable[[Any, Block, Part], Result],
) -> Iterator[Result]:
    """Results of all parts of all blocks, in order, while later ones are under way.

    Parameters
    ----------
    shared
        The first argument of every call; workers are sent it once.
    blocks
        Each block with its parts, at least one.
    first
        Called once for each block of several parts; what it returns is ...
    then
        ... the third argument of the call of each of the parts.
    both
        The two in one call, for blocks of one part: nothing travels between workers.
    """
    handle_of_shared = backend.share(shared)
    waiting = iter(blocks)
    count = 0
    ready: deque[tuple[int, Block, Hashable, Part]] = deque()
    starting: dict[Hashable, tuple[int, Block, Sequence[Part]]] = {}
    running: dict[Hashable, int] = {}
    done: dict[int, Result] = {}
    given = 0

    def submit_next() -> bool:
        nonlocal count
        if ready:
            number, block, start, part = ready.popleft()
            running[backend.submit(then, handle_of_shared, block, start, part)] = number
            return True
        for block, parts in waiting:
            if len(parts) == 1:
                running[backend.submit(both, handle_of_shared, block, parts[0])] = count
            else:
                handle = backend.submit(first, handle_of_shared, block)
                starting[handle] = (count, block, parts)
            count += len(parts)
            return True
        return False

    while True:
        most = CALLS_PER_WORKER * backend.num_workers()
        while len(starting) + len(running) < most and submit_next():
            pass
        if not starting and not running:
            return
        handle = backend.next_done()
        if handle in starting:
            number, block, parts = starting.pop(handle)
            ready.extend((number + at, block, handle, part) for at, part in enumerate(parts))
            continue
        done[running.pop(handle)] = backend.result(handle)
        while given in done:
            yield done.pop(given)
            given += 1
