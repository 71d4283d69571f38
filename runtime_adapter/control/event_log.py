"""The event log of a run: who loads and drops what, in one order that all servers see.

An entry is JSON under the key ``log/i`` of the store. A writer puts it at the first free place, so
the log has no gaps, and a reader of an entry has read everything that its writer knew: who reads
that an expert is dropped has read before where it was loaded. A server announces in one entry what
it has done since its last one. Kinds of entries: :mod:`~runtime_adapter.control.log_entries`.
"""

from __future__ import annotations

import datetime
import json
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from prism_plan.errors import InputError
from runtime_adapter.control.log_entries import Bounds, LogEntry, read_entry, write_entry
from runtime_adapter.transport.rendezvous import Rendezvous, RuntimeFailure
from runtime_adapter.transport.tcp_store import join_store, parse_value

#: A reader waits for the next entry so long; the longest that a socket's poll knows.
_FOREVER = datetime.timedelta(days=20)
#: How often a place of the log is read again that somebody has filled with nothing.
_EMPTY_ENTRY_INTERVAL_S = 0.05


class StoreLost(RuntimeFailure):
    """The store is lost, and with it the log."""

    def __init__(self) -> None:
        super().__init__("the store of the run is gone")


class EventLog:
    """A client of the log that appends entries and reads them; ``writer`` is its name in them.

    Raises RuntimeFailure where there is no store; its methods raise StoreLost once it is gone.
    """

    def __init__(self, rendezvous: Rendezvous, writer: str) -> None:
        self.writer = writer
        self._reading = join_store(rendezvous, host_it=False)
        # a client that waits for a key is locked meanwhile
        self._writing = join_store(rendezvous, host_it=False)
        self._lock = threading.Lock()
        self._tail = 0
        self._queue: queue.SimpleQueue[LogEntry | tuple[int, bytes] | None] = queue.SimpleQueue()
        self._following = False
        self._bounds: Bounds | None = None
        self._report: Callable[[str], None] = lambda text: None
        self._reported = False

    def expect(
        self, bounds: Bounds | None, report: Callable[[str], None] = lambda text: None
    ) -> None:
        """Skip entries out of these bounds; ``report`` gets a line about the first skipped one."""
        self._bounds, self._report = bounds, report

    @property
    def store(self) -> dist.TCPStore:
        """The store, for values that entries refer to."""
        return self._writing

    def append(self, entry: LogEntry) -> int:
        """Append an entry; returns its number."""
        text = write_entry(entry, self.writer)
        with self._lock:
            number = self._tail
            try:
                while self._writing.compare_set(f"log/{number}", "", text) != text.encode():
                    number += 1
            except RuntimeError as error:
                raise StoreLost from error
            self._tail = number + 1
        return number

    def follow(self) -> None:
        """Begin to read, from the first entry on, in a thread."""
        self._following = True
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        number = 0
        self._reading.set_timeout(_FOREVER)
        while True:
            try:
                raw = self._reading.get(f"log/{number}")
            except RuntimeError:
                self._queue.put(None)
                return
            if not raw:  # as good as free: the next writer takes this place
                time.sleep(_EMPTY_ENTRY_INTERVAL_S)
                continue
            self._queue.put((number, bytes(raw)))
            number += 1
            with self._lock:
                self._tail = max(self._tail, number)

    def next(self, timeout_s: float | None = None) -> LogEntry | None:
        """The next valid entry, or ``None`` if there is none in time; invalid ones are skipped."""
        assert self._following
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            try:
                item = self._queue.get(timeout=left_s)
            except queue.Empty:
                return None
            if item is None:
                self._queue.put(None)  # for the next call
                raise StoreLost
            if isinstance(item, LogEntry):
                return item
            try:
                return read_entry(*item, self._bounds)
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

    def _call(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        try:
            with self._lock:
                return operation(*arguments)
        except RuntimeError as error:
            raise StoreLost from error

    def put(self, key: str, values: Any) -> None:
        """Write JSON that an entry will refer to."""
        self.put_bytes(key, json.dumps(values).encode())

    def put_bytes(self, key: str, data: bytes) -> None:
        """Write bytes that an entry will refer to."""
        self._call(self._writing.set, key, data)

    def has(self, *keys: str) -> bool:
        """Whether all these keys are in the store."""
        return bool(self._call(self._writing.check, list(keys)))

    def get_bytes(self, key: str) -> bytes:
        """Bytes that an entry refers to; they are written before it, so this does not wait."""
        if not self.has(key):
            raise InputError("is not there", source=f"the run's store: {key}")
        return bytes(self._call(self._writing.get, key))

    def get(self, key: str) -> Any:
        """JSON that an entry refers to; raises InputError where it is not there, or not JSON."""
        return parse_value(self.get_bytes(key), key)
