"""The global scheduler: reviews the placement of a run and migrates it from one to the next.

A process beside the store's, so that neither answers nor requests wait for a solver; both are
started again if they die. It knows what servers hold by the log alone; it plans, announces, and
waits until every step is done. A server that comes or goes ends the migration in progress, and a
repair brings back what was lost with it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from prism_plan.errors import InputError
from prism_plan.io.trace_reader import read_trace
from runtime_adapter.control import log_entries
from runtime_adapter.control.event_log import (
    EventLog,
    NewLog,
    StoreRestartedError,
    StoreUnavailable,
)
from runtime_adapter.control.migrations import Migrations
from runtime_adapter.control.placement_reviews import Reviews
from runtime_adapter.control.repairs import Repairs
from runtime_adapter.control.run_state import RunState
from runtime_adapter.control.scheduler_config import SchedulerConfig
from runtime_adapter.control.server_monitor import ServerMonitor
from runtime_adapter.control.store.client import StoreAddress, StoreClient
from runtime_adapter.log_output import log_error
from runtime_adapter.transport.rendezvous import RuntimeFailure

#: How long the scheduler waits for the next entry before it runs its periodic tasks.
POLL_INTERVAL_S = 0.05
HEARTBEAT_INTERVAL_S = 0.5
#: How often the store is asked for a run that has a scheduler.
RUN_INTERVAL_S = 0.25
#: A migration is abandoned if no step is done for so long: the longest that one load may take.
MAX_STALL_S = 900.0
#: Requests for moves that wait; further ones are refused.
MAX_REQUESTED_MOVES = 100


def run_scheduler(
    address: StoreAddress, placements_dir: str | None = None, trace_path: str | None = None
) -> None:
    """Schedule the runs of a store, one after the other, until the process is ended.

    Placements that are reached are written to ``placements_dir``. A run that has no scheduler, for
    its experts do not move, is left alone. The trace is for reviews that change where layers
    execute.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its supervisor ends it
    client = StoreClient(address, "scheduler")
    done: object = None  # a run that was served to its end, or cannot be
    while True:
        run = _current_run(client)
        if run is not None and run != done:
            try:
                trace = None if trace_path is None else read_trace(trace_path)
                config = SchedulerConfig.from_json(run[1], placements_dir, trace)
            except InputError as error:
                log_error(f"the scheduler cannot serve the run: {error}")
            else:
                _serve(address, config, run[1])
            done = run
        time.sleep(RUN_INTERVAL_S)


def _current_run(client: StoreClient) -> tuple[str, Any] | None:
    """The epoch of the store, and the configuration of its run's scheduler, where it has one."""
    try:
        answer = client.run(10.0)
        run = answer["run"]
        given = None if run is None else run.get("scheduler")
        return None if given is None else (str(answer["epoch"]), given)
    except (RuntimeFailure, InputError, LookupError):
        return None


def _serve(address: StoreAddress, config: SchedulerConfig, given: Any) -> None:
    """Schedule one run until all its servers have left, or the store has another."""
    log = EventLog(address, "scheduler")
    try:
        log.follow()
        scheduler = Scheduler(config, log, is_same_run=lambda: _is_same(log.client, given))
        ended = threading.Event()
        threading.Thread(target=_send_heartbeats, args=(scheduler, ended), daemon=True).start()
        try:
            scheduler.run()
        finally:
            ended.set()
    except StoreUnavailable:
        return
    finally:
        log.close()


def _is_same(client: StoreClient, given: Any) -> bool:
    run = _current_run(client)
    return run is None or run[1] == given


def _send_heartbeats(scheduler: Scheduler, ended: threading.Event) -> None:
    """Show that the process runs, also while a solver does."""
    while not ended.wait(HEARTBEAT_INTERVAL_S):
        with contextlib.suppress(RuntimeFailure, InputError):
            scheduler.log.client.heartbeat(0, 0, "scheduler", migration=scheduler.progress_text())


class Scheduler:
    """The scheduler of one run. ``now`` is a clock in seconds.

    ``is_same_run`` says, when the store was started anew, whether it has the same run again.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        log: EventLog,
        now: Callable[[], float] = time.monotonic,
        is_same_run: Callable[[], bool] = lambda: True,
    ) -> None:
        self.log = log
        self.state = RunState(config, log, now)
        self.monitor = ServerMonitor(self.state)
        self.migrations = Migrations(self.state)
        self.reviews = Reviews(self.state, self.migrations)
        self.repairs = Repairs(self.state, self.migrations, self.reviews)
        self._is_same_run = is_same_run
        self._has_log = False
        self._is_over = False
        self._requested_moves: list[str] = []

    def run(self) -> None:
        """Run until all servers have left, or the store has another run.

        Raises
        ------
        StoreUnavailable
            The log was closed.
        """
        while not self._is_over:
            self.run_once(POLL_INTERVAL_S)

    def run_once(self, timeout_s: float) -> None:
        """Handle all pending log entries, then run the periodic tasks that are due."""
        with contextlib.suppress(StoreRestartedError):  # the next entry is a NewLog
            entry = self.log.next(timeout_s)
            while entry is not None:
                self._handle(entry)
                entry = None if self.log.caught_up() else self.log.next(0)
            if self._has_log and not self._is_over:
                self._run_tasks()

    def _run_tasks(self) -> None:
        if self.monitor.due():
            self._check_servers()
        self.reviews.finish_when_reported()
        self.migrations.end_when_done()
        self.migrations.stop_inherited()
        if self.reviews.pending is not None or not self.state.alive:
            return
        if self.migrations.active is None:
            self.repairs.begin_when_due()
        if self.repairs.pending and self.migrations.active is None:
            return
        # whoever has yet to join is no server less: the request waits
        if self.migrations.active is None and self._requested_moves and not self.state.absent:
            rates = self.reviews.rates[self.state.alive]
            self.migrations.begin_requested(self._requested_moves[0], rates)
            self._requested_moves.pop(0)
        self.reviews.begin_when_due()

    def _handle(self, entry: log_entries.LogEntry | NewLog) -> None:
        if isinstance(entry, NewLog):
            self._begin_log(entry)
            return
        changed = self.state.apply(entry)
        self.state.tell_table()
        match entry:
            case log_entries.MoveRequested():
                self._note_move(entry.move)
            case log_entries.CallsReported():
                self.reviews.handle(entry)
        self.migrations.handle(entry, changed)
        if len(self.state.left) == self.state.config.placement.num_servers:
            self._is_over = True

    def _begin_log(self, new: NewLog) -> None:
        if not self._is_same_run():
            self._is_over = True
            return
        self._has_log = False  # if any of this fails, for the store was restarted again
        self.state.begin_log(new)
        self.reviews.forget_pending()
        self.migrations.begin_log(new)
        while self._requested_moves:
            text = "given up: the store of the run was restarted"
            self.migrations.answer(self._requested_moves[0], 5, text)
            self._requested_moves.pop(0)
        self.log.append(log_entries.SchedulerStarted())
        self.state.tell_table()
        self._has_log = True

    def _note_move(self, move: str) -> None:
        active = self.migrations.active
        if move in self._requested_moves or (active is not None and active.requested_by == move):
            return  # who asks repeats it when a scheduler is started
        if len(self._requested_moves) >= MAX_REQUESTED_MOVES:
            self.migrations.answer(move, 5, "refused: too many others wait for their moves")
            return
        self._requested_moves.append(move)

    def _check_servers(self) -> None:
        for reason in self.monitor.check():
            self.migrations.stop(reason)
        active = self.migrations.active
        if active is not None:
            subject = ("migration", active.number)
            if self.monitor.unchanged_s(subject, len(active.left)) > MAX_STALL_S:
                self.migrations.stop(f"no step was done for {MAX_STALL_S:g} s")

    def progress_text(self) -> str:
        """What a person is told of the migration in progress, empty where there is none."""
        active = self.migrations.active
        if active is None:
            return ""
        return f"migration {active.number}: {len(active.left)} steps left"
