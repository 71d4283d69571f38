"""The global scheduler: reviews the placement of a run and migrates it from one to the next.

A process of its own beside the first server's, so that neither answers nor requests wait for a
solver. It knows what servers hold by the log alone; it plans, announces, and waits until every step
is done. A lost server ends the migration in progress; later ones are among the others.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable

from runtime_adapter.control import log_entries
from runtime_adapter.control.event_log import EventLog, StoreLost
from runtime_adapter.control.failure_detector import SCHEDULER_HEARTBEAT
from runtime_adapter.control.migrations import Migrations
from runtime_adapter.control.placement_reviews import Reviews
from runtime_adapter.control.run_state import RunState, SchedulerConfig
from runtime_adapter.control.server_monitor import ServerMonitor
from runtime_adapter.transport.call_threads import exit_with_parent
from runtime_adapter.transport.rendezvous import RuntimeFailure

#: How long the scheduler waits for the next entry before it runs its periodic tasks.
POLL_INTERVAL_S = 0.05
HEARTBEAT_INTERVAL_S = 0.25
#: A migration is abandoned if no step is done for so long: the longest that one load may take.
MAX_STALL_S = 900.0


def run_scheduler(config: SchedulerConfig) -> None:
    """Run the scheduler until the process is ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver ends it
    exit_with_parent()
    try:
        log = EventLog(config.rendezvous, "scheduler")
        heartbeat_log = EventLog(config.rendezvous, "scheduler")
        log.follow()
        threading.Thread(target=_send_heartbeats, args=(heartbeat_log,), daemon=True).start()
        Scheduler(config, log).run()
    except RuntimeFailure:  # StoreLost as well: the run has ended
        # Not by returning: when the interpreter ends, a thread that comes back from a call of the
        # store is ended inside C++, which aborts the process with a message of its own.
        os._exit(0)


def _send_heartbeats(log: EventLog) -> None:
    """Show that the process runs, also while a solver does."""
    heartbeats = 0
    with contextlib.suppress(StoreLost):
        while True:
            heartbeats += 1
            log.put(SCHEDULER_HEARTBEAT, heartbeats)
            time.sleep(HEARTBEAT_INTERVAL_S)


class Scheduler:
    """The scheduler of one run. ``now`` is a clock in seconds."""

    def __init__(
        self, config: SchedulerConfig, log: EventLog, now: Callable[[], float] = time.time
    ) -> None:
        self.log = log
        self.state = RunState(config, log, now)
        self.monitor = ServerMonitor(self.state)
        self.migrations = Migrations(self.state)
        self.reviews = Reviews(self.state, self.migrations)
        self._requested_moves: list[str] = []

    def run(self) -> None:
        """Run until the store is lost."""
        while True:
            self.run_once(POLL_INTERVAL_S)

    def run_once(self, timeout_s: float) -> None:
        """Handle all pending log entries, then run the periodic tasks that are due."""
        entry = self.log.next(timeout_s)
        while entry is not None:
            self._handle(entry)
            entry = None if self.log.caught_up() else self.log.next(0)
        if self.monitor.due() and self.state.read_start():
            self._check_servers()
        self.reviews.finish_when_reported()
        self.migrations.end_when_done()
        if self.reviews.pending is None:
            if self.migrations.active is None and self._requested_moves:
                rates = self.reviews.rates[self.state.alive]
                self.migrations.begin_requested(self._requested_moves.pop(0), rates)
            self.reviews.begin_when_due()

    def _handle(self, entry: log_entries.LogEntry) -> None:
        match entry:
            case log_entries.ExpertsLoaded() | log_entries.DropsAnnounced():
                loaded = isinstance(entry, log_entries.ExpertsLoaded)
                for change in entry.experts:
                    self.state.expert_map.change(change.gpu, change.pair, loaded)
            case log_entries.MoveRequested():
                self._requested_moves.append(entry.move)
            case log_entries.CallsReported():
                self.reviews.handle(entry)
        self.migrations.handle(entry)

    def _check_servers(self) -> None:
        for reason in self.monitor.check():
            self.migrations.stop(reason)
        active = self.migrations.active
        if active is not None:
            subject = ("migration", active.number)
            if self.monitor.unchanged_s(subject, len(active.left)) > MAX_STALL_S:
                self.migrations.stop(f"no step was done for {MAX_STALL_S:g} s")
