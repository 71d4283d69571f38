"""Runs the store of a run: service and scheduler, each of which is started again if it dies.

The socket is bound here, once, and handed to each service: clients that come while there is none
wait in its queue, and the port is never lost to somebody else.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

from prism_plan.errors import PrismError
from runtime_adapter import log_output
from runtime_adapter.control.store.client import StoreAddress
from runtime_adapter.control.store.service import run_service
from runtime_adapter.transport.call_threads import exit_with_parent
from runtime_adapter.transport.listener import listen
from runtime_adapter.transport.rendezvous import RuntimeFailure
from runtime_adapter.transport.secrets import NO_SECRET, RunSecret

#: Children that die more often are not started again.
MAX_DEATHS, DEATHS_WITHIN_S = 5, 60.0
PARENT_INTERVAL_S = 0.25
END_TIMEOUT_S = 3.0

#: Runs a scheduler with the store's address, the folder for placements and the file of a trace.
Schedule = Callable[[StoreAddress, str | None, str | None], None]


@dataclass(frozen=True)
class StoreConfig:
    """How a store runs.

    ``host`` and ``port`` (0: any that is free) are what it listens on. With ``keep`` it waits for
    the next run when one is over. It ends with the process ``parent_pid``, where one is given.
    Placements that are reached are written to ``placements_dir``; ``trace`` is a file for reviews
    that change where layers execute.
    """

    host: str
    port: int
    secret: RunSecret = NO_SECRET
    placements_dir: str | None = None
    trace: str | None = None
    keep: bool = False
    parent_pid: int | None = None
    log_level: log_output.Level = "info"
    log_format: log_output.Format = "text"


def run_store(config: StoreConfig, schedule: Schedule) -> None:
    """Run a store until its run is over, or its parent has ended.

    ``schedule`` is the scheduler: a function of a module, called in a process of its own
    with the store's address, ``placements_dir`` and ``trace``.

    Raises
    ------
    RuntimeFailure
        It cannot listen there, or its processes die again and again.
    """
    with listen(config.host, config.port, parameter="listen") as listener:
        host, port = listener.getsockname()[:2]
        log_output.log_info(f"the store listens on {host}:{port}")
        _Supervisor(config, listener, port, schedule).run()


class _Supervisor:
    def __init__(
        self, config: StoreConfig, listener: socket.socket, port: int, schedule: Schedule
    ) -> None:
        self._config = config
        self._schedule = schedule
        self._listener = listener
        any_address = {"0.0.0.0": "127.0.0.1", "::": "::1"}
        host = any_address.get(config.host, config.host)
        self._address = StoreAddress(host, port, config.secret)
        self._context = multiprocessing.get_context("spawn")
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)

    def run(self) -> None:
        starts: dict[str, Callable[[], BaseProcess]] = {
            "the store's service": self._start_service, "the scheduler": self._start_scheduler
        }  # fmt: skip
        children: dict[str, BaseProcess] = {}
        try:
            for name, start in starts.items():
                children[name] = start()
            service = "the store's service"
            while self._parent_lives():
                sentinels = [child.sentinel for child in children.values()]
                multiprocessing.connection.wait(sentinels, PARENT_INTERVAL_S)
                # read once: a child that ends between two looks would be taken for dead
                codes = {name: child.exitcode for name, child in children.items()}
                if codes[service] == 0:
                    return  # the run is over
                for name, code in codes.items():
                    if code is not None:
                        self._note_death(name, code)
                        children[name] = starts[name]()
        finally:
            _end(list(children.values()))

    def _parent_lives(self) -> bool:
        return self._config.parent_pid in (None, os.getppid())

    def _note_death(self, name: str, code: int) -> None:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        now = time.monotonic()
        self._deaths.append(now)
        if len(self._deaths) == MAX_DEATHS and now - self._deaths[0] < DEATHS_WITHIN_S:
            raise RuntimeFailure(
                f"{name} has ended ({how}), as processes of the store did {MAX_DEATHS} times "
                f"within {DEATHS_WITHIN_S:g} s; it is not started again"
            )
        log_output.log_warning(f"{name} has ended ({how}); it is started again")

    def _start_service(self) -> BaseProcess:
        # a server that has started the store follows the log, and says the same
        tells = self._config.parent_pid is None
        return self._start(_serve, self._listener, self._config.secret, self._config.keep, tells)

    def _start_scheduler(self) -> BaseProcess:
        return self._start(
            self._schedule, self._address, self._config.placements_dir, self._config.trace
        )

    def _start(self, target: Callable[..., None], *arguments: object) -> BaseProcess:
        log_options = (self._config.log_level, self._config.log_format)
        process = self._context.Process(
            target=_run_child, args=(target, arguments, *log_options), daemon=True
        )
        process.start()
        return process


def _end(children: list[BaseProcess]) -> None:
    for child in children:
        child.terminate()
    deadline = time.monotonic() + END_TIMEOUT_S
    for child in children:
        child.join(max(deadline - time.monotonic(), 0.0))
        if child.exitcode is None:
            child.kill()
            child.join()


def _run_child(
    target: Callable[..., None],
    arguments: tuple[object, ...],
    log_level: log_output.Level,
    log_format: log_output.Format,
) -> None:
    """A child's process: it writes lines as the supervisor does, and ends by its will alone."""
    log_output.configure(log_level, log_format)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    exit_with_parent()
    try:
        target(*arguments)
    except PrismError as error:
        log_output.log_error(str(error))
        os._exit(error.exit_code)


def _serve(listener: socket.socket, secret: RunSecret, keep: bool, tells: bool) -> None:
    tell = log_output.log_info if tells else log_output.log_debug
    run_service(listener, secret, keep=keep, report=log_output.log_warning, tell=tell)
