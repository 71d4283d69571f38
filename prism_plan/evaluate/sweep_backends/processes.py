"""Calls in this process, or in processes of this machine, by joblib's executor (loky)."""

from __future__ import annotations

import itertools
import os
import signal
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children
from typing import Any

from prism_plan.evaluate.sweep_backends.contract import MAX_LOSSES, Backend, lost_worker

#: Each worker computes in one thread: there are as many workers as cores.
_ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMBA")}


def open_processes(jobs: int) -> Backend:
    """So many processes, one a core for -1; none but this one for a single job."""
    if jobs < 0:
        from joblib import cpu_count

        jobs = cpu_count()
    return ProcessesBackend(jobs) if jobs > 1 else InlineBackend()


@dataclass(frozen=True)
class _Call:
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class _Shared:
    """Stands for a shared value in the arguments of a call."""


class InlineBackend:
    """Calls in this process, one after the other."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._waiting: deque[tuple[int, _Call]] = deque()
        self._results: dict[Hashable, Any] = {}

    def num_workers(self) -> int:
        return 1

    def share(self, value: Any) -> Any:
        return value

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Hashable:
        number = _Handle(next(self._numbers))
        self._waiting.append((number, _Call(function, arguments)))
        return number

    def next_done(self) -> Hashable:
        number, call = self._waiting.popleft()
        self._results[number] = call.function(*map(self._value, call.arguments))
        return number

    def _value(self, argument: Any) -> Any:
        return self._results[argument] if isinstance(argument, _Handle) else argument

    def result(self, handle: Hashable) -> Any:
        return self._results.pop(handle)

    def close(self) -> None:
        self._waiting.clear()


class _Handle(int):
    """The number of a call."""


class ProcessesBackend:
    """Calls in worker processes; where one dies, all are started anew with the calls under way."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._executor: Any = None
        self._others: set[Any] = set()  # child processes that are none of these workers
        self._shared: Any = None
        self._numbers = itertools.count()
        self._calls: dict[_Handle, _Call] = {}
        self._futures: dict[Future[Any], _Handle] = {}
        self._done: dict[Hashable, Future[Any]] = {}
        self._losses = 0

    def num_workers(self) -> int:
        return self._jobs

    def share(self, value: Any) -> Any:
        self._shared = value
        return _Shared()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Hashable:
        handle = _Handle(next(self._numbers))
        values = tuple(
            self._done[argument].result() if isinstance(argument, _Handle) else argument
            for argument in arguments
        )
        self._calls[handle] = _Call(function, values)
        self._start(handle)
        return handle

    def _start(self, handle: _Handle) -> None:
        if self._executor is None:
            from joblib.externals.loky.process_executor import ProcessPoolExecutor

            self._others = set(active_children())
            self._executor = ProcessPoolExecutor(
                self._jobs,
                initializer=_start_worker,
                initargs=(self._shared,),
                env={name: os.environ.get(name, one) for name, one in _ONE_THREAD.items()},
            )
        call = self._calls[handle]
        try:
            future = self._executor.submit(_call, call.function, call.arguments)
        except BrokenProcessPool as error:  # noticed by the executor, and not by us yet
            future = Future()
            future.set_exception(error)
        self._futures[future] = handle

    def next_done(self) -> Hashable:
        while True:
            finished, _ = wait(self._futures, return_when=FIRST_COMPLETED)
            whole = [
                each for each in finished if not isinstance(each.exception(), BrokenProcessPool)
            ]
            if whole:
                self._losses = 0
                handle = self._futures.pop(whole[0])
                self._done[handle] = whole[0]
                del self._calls[handle]
                return handle
            self._start_anew(next(iter(finished)).exception())

    def _start_anew(self, error: BaseException | None) -> None:
        """Replace all workers, and make all calls again that have not returned."""
        self._losses += 1
        if self._losses > MAX_LOSSES:
            raise lost_worker("processes") from error
        self._end_workers()
        handles = sorted(self._futures.values())
        self._futures.clear()
        for handle in handles:
            self._start(handle)

    def result(self, handle: Hashable) -> Any:
        return self._done.pop(handle).result()

    def _end_workers(self) -> None:
        """Kill the workers, also one that is just starting, and on a second Ctrl-C meanwhile."""
        executor, self._executor = self._executor, None
        if executor is None:
            return
        own = [child for child in active_children() if child not in self._others]
        try:
            executor.shutdown(wait=True, kill_workers=True)
        finally:
            own += [child for child in active_children() if child not in self._others]
            for child in own:
                if child.is_alive():
                    child.terminate()

    def close(self) -> None:
        self._futures.clear()
        self._end_workers()


_shared_value: Any = None


def _start_worker(value: Any) -> None:
    """Keep the shared value in a new worker; Ctrl-C is for the process that started it."""
    global _shared_value
    _shared_value = value
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(
        *(_shared_value if isinstance(argument, _Shared) else argument for argument in arguments)
    )
