"""Calls on the workers of a Ray cluster, by Ray's own tasks."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import uuid
import warnings
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray import exceptions

from prism_plan.evaluate.sweep_backends.contract import (
    MAX_LOSSES,
    lost_worker,
    require_reachable,
    unlike_worker,
    unreachable,
)


class RayBackend:
    """Calls as tasks of Ray, one core each; Ray itself runs those of a lost worker again."""

    def __init__(self, jobs: int, scheduler: str | None) -> None:
        self._scheduler = scheduler
        self._waiting: list[Any] = []
        if scheduler not in (None, "auto"):
            require_reachable(str(scheduler), ("ray",))
        # a program that has connected to Ray already keeps its connection; another is refused
        self._own = scheduler is not None or not ray.is_initialized()
        if self._own:
            with _quiet_start():
                try:
                    ray.init(
                        address=scheduler or "local",
                        num_cpus=jobs if scheduler is None and jobs > 0 else None,
                        include_dashboard=None if scheduler else False,
                        logging_level=logging.CRITICAL,
                        log_to_driver=False,
                    )
                except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
                    raise unreachable(scheduler, error) from error
        self._remote = ray.remote(num_cpus=1, max_retries=MAX_LOSSES)(_call)

    def num_workers(self) -> int:
        return max(1, int(ray.cluster_resources().get("CPU", 1)))

    def share(self, value: Any) -> Any:
        return _Shared(uuid.uuid4().hex, ray.put(value))

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Hashable:
        handle: Hashable = self._remote.remote(function, *arguments)
        self._waiting.append(handle)
        return handle

    def next_done(self) -> Hashable:
        (handle,), self._waiting = ray.wait(self._waiting, num_returns=1, fetch_local=False)
        found: Hashable = handle
        return found

    def result(self, handle: Any) -> Any:
        try:
            return ray.get(handle)
        except exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, ModuleNotFoundError):
                raise unlike_worker(cause) from error
            raise cause from error
        except (
            exceptions.WorkerCrashedError,
            exceptions.NodeDiedError,
            exceptions.OutOfMemoryError,
            exceptions.ObjectLostError,
        ) as error:
            raise lost_worker("ray") from error
        except exceptions.RayError as error:
            raise unreachable(self._scheduler, error) from error

    def close(self) -> None:
        for handle in self._waiting:
            with contextlib.suppress(exceptions.RayError):
                ray.cancel(handle, force=True)
        self._waiting = []
        if self._own:
            ray.shutdown()


@contextlib.contextmanager
def _quiet_start() -> Iterator[None]:
    """Start Ray without its hints, and without its handler of SIGTERM in place of ours."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            if main and handler is not None:
                signal.signal(signal.SIGTERM, handler)


@dataclass(frozen=True)
class _Shared:
    """Stands for a shared value in the arguments of a call; Ray would unpack it for each call."""

    token: str
    reference: Any

    def value(self) -> Any:
        """The value, unpacked once in each worker process."""
        global _latest
        if _latest[0] != self.token:
            _latest = (self.token, ray.get(self.reference))
        return _latest[1]


_latest: tuple[str, Any] = ("", None)


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*(each.value() if isinstance(each, _Shared) else each for each in arguments))
