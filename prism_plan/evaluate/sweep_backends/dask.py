"""Calls on the workers of Dask's scheduler, by ``distributed.Client``."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable
from typing import Any

from distributed import Client, LocalCluster, as_completed
from distributed.scheduler import KilledWorker

from prism_plan.evaluate.sweep_backends.contract import (
    CONNECT_S,
    MAX_LOSSES,
    lost_worker,
    require_reachable,
    unlike_worker,
    unreachable,
)


class DaskBackend:
    """Calls as futures of a Dask client.

    Dask itself runs the calls of a lost worker again, and what they depend on. Results are
    small; the shared value is the result of a call, so that it too can be made again.
    """

    def __init__(self, jobs: int, scheduler: str | None) -> None:
        self._scheduler = scheduler
        self._cluster: Any = None
        logging.getLogger("distributed").setLevel(logging.CRITICAL)  # losses are no news to us
        address: Any = scheduler
        if scheduler is None:
            self._cluster = address = LocalCluster(
                n_workers=None if jobs < 0 else jobs,
                threads_per_worker=1,
                memory_limit=0,
                dashboard_address=None,
                silence_logs=logging.CRITICAL,
            )
        else:
            require_reachable(scheduler, ("tcp", "tls", "ws", "wss", "ucx"))
        try:
            self._client = Client(address, timeout=CONNECT_S, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            self._close_cluster()
            raise unreachable(scheduler, error) from error
        self._completed = as_completed([], loop=self._client.loop)

    def num_workers(self) -> int:
        threads: int = sum(self._client.nthreads().values())
        return max(1, threads)

    def share(self, value: Any) -> Any:
        return self._client.submit(_same, value, pure=False, retries=MAX_LOSSES)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Hashable:
        future = self._client.submit(function, *arguments, pure=False, retries=MAX_LOSSES)
        self._completed.add(future)
        handle: Hashable = future
        return handle

    def next_done(self) -> Hashable:
        handle: Hashable = next(self._completed)
        return handle

    def result(self, handle: Any) -> Any:
        try:
            return handle.result()
        except KilledWorker as error:
            raise lost_worker("dask") from error
        except ModuleNotFoundError as error:
            raise unlike_worker(error) from error
        except (asyncio.CancelledError, TimeoutError, OSError) as error:
            if handle.status == "error":  # the call itself has raised it
                raise
            raise unreachable(self._scheduler, error) from error

    def close(self) -> None:
        self._completed.clear()
        self._client.close()
        self._close_cluster()

    def _close_cluster(self) -> None:
        if self._cluster is not None:
            self._cluster.close()


def _same(value: Any) -> Any:
    return value
