"""The event log of a run: who loads and drops what, in one order that all servers see.

The store numbers the entries, so the log has no gaps, and a reader of an entry has read everything
that its writer knew: who reads that an expert is dropped has read before where it was loaded. A
server announces in one entry what it has done since its last one. Kinds of entries:
:mod:`~runtime_adapter.control.log_entries`.

A log begins for its reader with a :class:`NewLog`, and begins anew if the store is restarted or the
reader falls too far behind. Writers wait while the store is away; what they meant for a log that is
over is refused, not appended to the next.
"""

from __future__ import annotations

import json
import queue
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from prism_plan.errors import InputError
from runtime_adapter.control.json_values import parse_value
from runtime_adapter.control.log_entries import (
    Bounds,
    LogEntry,
    NewLog,
    read_entry,
    write_entry,
)
from runtime_adapter.control.store.client import (
    StoreAddress,
    StoreClient,
    StoreRestartedError,
    StoreUnavailable,
)
from runtime_adapter.transport.rendezvous import RuntimeFailure

__all__ = ["EventLog", "NewLog", "StoreRestartedError", "StoreUnavailable"]

#: How long a read waits in the store for the next entry, and the reader for the store's answer.
READ_WAIT_S = 1.0
READ_TIMEOUT_S = 5.0
#: A writer tries anew so often; the client repeats requests within this time by itself.
WRITE_TIMEOUT_S = 10.0
#: Entries read ahead of a consumer that has no time for them.
MAX_READ_AHEAD = 10_000
RETRY_INTERVAL_S = 0.2

T = TypeVar("T")


class EventLog:
    """Appends entries to the log and reads them; ``writer`` is this process's name in them.

    Nothing is sent before the first use, so there need not be a store yet. ``responds`` says
    whether the last read was answered; ``client`` is for all other requests to the store.
    """

    def __init__(self, address: StoreAddress, writer: str) -> None:
        self.writer = writer
        self.client = StoreClient(address, writer)
        self.responds = False
        self._queue: queue.SimpleQueue[LogEntry | NewLog | tuple[int, str]] = queue.SimpleQueue()
        self._following = False
        self._closed = threading.Event()
        self._epoch: str | None = None
        self._bounds: Bounds | None = None
        self._report: Callable[[str], None] = lambda text: None
        self._reported = False

    def expect(
        self, bounds: Bounds | None, report: Callable[[str], None] = lambda text: None
    ) -> None:
        """Skip entries out of these bounds; ``report`` gets a line about the first skipped one."""
        self._bounds, self._report = bounds, report

    # ------------------------------------------------------------------ reading

    def follow(self) -> None:
        """Begin to read in a thread, with a :class:`NewLog` first."""
        if not self._following:
            self._following = True
            threading.Thread(target=self._read, daemon=True, name="event log").start()

    def _read(self) -> None:
        epoch: str | None = None
        after = -1
        while not self._closed.is_set():
            if self._queue.qsize() > MAX_READ_AHEAD:
                self._closed.wait(RETRY_INTERVAL_S)
                continue
            try:
                answer = self.client.read(epoch, after, READ_WAIT_S, READ_TIMEOUT_S)
                snapshot = answer.get("snapshot")
                if snapshot is not None:
                    new_log = NewLog(
                        epoch=str(answer["epoch"]),
                        number=int(snapshot["number"]),
                        members=list(snapshot["members"]),
                        held=[list(expert) for expert in snapshot["held"]],
                        open_plans=list(snapshot["open_plans"]),
                        execution=snapshot["execution"],
                    )
                    epoch, after = new_log.epoch, new_log.number
                    self._queue.put(new_log)
                for number, text in answer["entries"]:
                    self._queue.put((number, text))
                    after = number
                self.responds = True
            except (InputError, RuntimeFailure, LookupError, TypeError, ValueError):
                self.responds = False  # whatever it says, it may be a store again
                self._closed.wait(RETRY_INTERVAL_S)

    def next(self, timeout_s: float | None = None) -> LogEntry | NewLog | None:
        """The next valid entry, or ``None`` if there is none in time; invalid ones are skipped.

        A :class:`NewLog` comes first, and where the store was restarted. A store that is away is
        no error: there is no entry in time.
        """
        assert self._following
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            try:
                item = self._queue.get(timeout=left_s)
            except queue.Empty:
                return None
            if isinstance(item, NewLog):
                self._epoch = item.epoch
                return item
            if isinstance(item, LogEntry):
                return item
            number, text = item
            try:
                return read_entry(number, text.encode(), self._bounds)
            except InputError as error:
                self.skip(error)

    def skip(self, error: Exception) -> None:
        """Report why an entry is ignored, the first time only: more lines would flood the log."""
        if not self._reported:
            self._reported = True
            self._report(f"{error}; it is skipped, as are others that no server of this run writes")

    def wake(self) -> None:
        """Let the thread that waits in :meth:`next` return at once."""
        self._queue.put(LogEntry())

    def caught_up(self) -> bool:
        """Whether every entry that was read has been taken."""
        return self._queue.empty()

    # ------------------------------------------------------------------ writing

    def append(self, entry: LogEntry) -> int:
        """Append an entry to the log that :meth:`next` is in; returns its number.

        Waits while the store is away; so do all methods below.

        Raises
        ------
        StoreRestartedError
            That log is over; :meth:`next` gives the new one.
        StoreUnavailable
            :meth:`close` was called meanwhile.
        InputError, LimitReached
            The store refuses the entry, or is full.
        """
        values = json.loads(write_entry(entry, self.writer))
        token = uuid.uuid4().hex  # for it may be in the log although no answer came
        return self._in_epoch(
            lambda epoch: self.client.append(values, epoch, WRITE_TIMEOUT_S, token)
        )

    def put(self, key: str, values: Any) -> None:
        """Write JSON that an entry will refer to; raises as :meth:`append`."""
        self.put_bytes(key, json.dumps(values).encode())

    def put_bytes(self, key: str, data: bytes) -> None:
        """Write bytes that an entry will refer to; raises as :meth:`append`."""
        self._in_epoch(lambda epoch: self.client.put(key, data, epoch, 6 * WRITE_TIMEOUT_S))

    def has(self, *keys: str) -> bool:
        """Whether all these keys are in the store."""
        return self._wait_for_store(lambda: self.client.has(list(keys), WRITE_TIMEOUT_S))

    def get_bytes(self, key: str) -> bytes:
        """Bytes that an entry refers to; raises InputError where they are not there."""
        return self._wait_for_store(lambda: self.client.get(key, 6 * WRITE_TIMEOUT_S))

    def get(self, key: str) -> Any:
        """JSON that an entry refers to; raises InputError where it is not there, or not JSON."""
        return parse_value(self.get_bytes(key), key)

    def delete(self, prefix: str) -> None:
        """Delete all values whose keys begin with ``prefix``."""
        self._wait_for_store(lambda: self.client.delete(prefix, WRITE_TIMEOUT_S))

    def close(self) -> None:
        """End reading; whoever waits for the store gets StoreUnavailable."""
        self._closed.set()
        self.client.close()

    def _in_epoch(self, operation: Callable[[str], T]) -> T:
        epoch = self._epoch
        if epoch is None:  # nothing was read yet
            epoch = str(self._wait_for_store(lambda: self.client.run(WRITE_TIMEOUT_S))["epoch"])
            if not self._following:
                self._epoch = epoch
        try:
            return self._wait_for_store(lambda: operation(epoch))
        except StoreRestartedError:
            if not self._following:
                self._epoch = None
            raise

    def _wait_for_store(self, operation: Callable[[], T]) -> T:
        while True:
            try:
                return operation()
            except StoreUnavailable:
                if self._closed.is_set():
                    raise
