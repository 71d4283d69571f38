"""The log of a run: who loads and drops what, in one order that all servers see.

An entry is JSON under the key ``log/i`` of the store. A writer puts it at the first place that is
free, so the log has no gaps and whoever reads an entry has read all that it was written in
knowledge of: who reads that an expert is dropped has read where it was loaded before.

==========  ========================================  ==========================================
what        more                                      written by
==========  ========================================  ==========================================
plan        plan (its steps are at ``plan/<plan>``)   the scheduler
load        plan, experts [step, gpu, pair, slot]     the GPUs' server: they serve from now on
drop        plan, experts [step, gpu, pair, 0]        the GPUs' server: they are no longer called
seen        server, plan, steps                       a driver: no call counts on what they drop
dropped     plan, steps                               the GPUs' server: the slots are free
failed      plan, step, server, reason                the GPU's server: the step cannot be done
stop        plan, reason                              the scheduler: begin no further step
halted      plan, server                              a server: no step is under way any more
over        plan, done, text                          the scheduler
review      review                                    the scheduler
calls       review, server                            a driver: its calls are in the store
move        move (the placement is at ``move/<id>``)  the command ``move``
moved       move, code, text                          the scheduler: how it ended
note        text                                      the scheduler: for the first server's log
==========  ========================================  ==========================================

A server announces in one entry what it has done since its last one. GPUs are counted over all
servers in order, slots within their GPU. What is no such entry is skipped: see
:mod:`~runtime_adapter.control.log_entries`.
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
from runtime_adapter.control.log_entries import Bounds, Entry, read_entry
from runtime_adapter.transport.rendezvous import Rendezvous, RuntimeFailure, join_store, read_json

#: A reader waits for the next entry so long; the longest that a socket's poll knows.
_FOREVER = datetime.timedelta(days=20)
#: Between two looks at a place of the log that somebody has filled with nothing.
_EMPTY_S = 0.05
#: Under this key of the store the scheduler gives its signs of life.
BEAT = "beat/scheduler"


class StoreLost(RuntimeFailure):
    """The store is not there any more, and so nobody tells what changes."""

    def __init__(self) -> None:
        super().__init__("the store of the run is gone")


class EventLog:
    """One reader and writer of the log; ``by`` is its name in the entries.

    Raises
    ------
    RuntimeFailure
        There is no store.
    """

    def __init__(self, rendezvous: Rendezvous, by: str) -> None:
        self.by = by
        self._reading = join_store(rendezvous, host_it=False)
        # a client that waits for a key is locked meanwhile
        self._telling = join_store(rendezvous, host_it=False)
        self._lock = threading.Lock()
        self._tail = 0
        self._queue: queue.SimpleQueue[Entry | tuple[int, bytes] | None] = queue.SimpleQueue()
        self._following = False
        self._bounds: Bounds | None = None
        self._report: Callable[[str], None] = lambda text: None
        self._reported = False

    def expect(
        self, bounds: Bounds | None, report: Callable[[str], None] = lambda text: None
    ) -> None:
        """Skip entries out of these bounds; ``report`` is told of the first one that is skipped."""
        self._bounds, self._report = bounds, report

    @property
    def store(self) -> dist.TCPStore:
        """For values that entries speak of."""
        return self._telling

    def tell(self, what: str, **values: Any) -> int:
        """Append an entry; returns its number.

        Raises
        ------
        StoreLost
            There is no store any more.
        """
        text = json.dumps({"what": what, **values, "by": self.by})
        with self._lock:
            at = self._tail
            try:
                while self._telling.compare_set(f"log/{at}", "", text) != text.encode():
                    at += 1
            except RuntimeError as error:
                raise StoreLost from error
            self._tail = at + 1
        return at

    def follow(self) -> None:
        """Begin to read, from the first entry on."""
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
                time.sleep(_EMPTY_S)
                continue
            self._queue.put((number, bytes(raw)))
            number += 1
            with self._lock:
                self._tail = max(self._tail, number)

    def next(self, timeout_s: float | None = None) -> Entry | None:
        """The next entry, or ``None`` if none comes in time; what is no entry is skipped.

        Raises
        ------
        StoreLost
            There is no store any more.
        """
        assert self._following
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            try:
                found = self._queue.get(timeout=left_s)
            except queue.Empty:
                return None
            if found is None:
                self._queue.put(None)  # for whoever asks again
                raise StoreLost
            if isinstance(found, Entry):
                return found
            try:
                return read_entry(*found, self._bounds)
            except InputError as error:
                self.skip(error)

    def skip(self, error: Exception) -> None:
        """Say once why an entry is not heeded; more of them would only fill the reader's log."""
        if not self._reported:
            self._reported = True
            self._report(f"{error}; it is skipped, as are others that no server of this run writes")

    def wake(self) -> None:
        """Let who waits in :meth:`next` have an entry that is only for this reader."""
        self._queue.put(Entry(-1, "wake"))

    def caught_up(self) -> bool:
        """Whether all that was read has been taken."""
        return self._queue.empty()

    def put(self, key: str, values: Any) -> None:
        """Write JSON that an entry will speak of.

        Raises
        ------
        StoreLost
            There is no store any more.
        """
        self.put_bytes(key, json.dumps(values).encode())

    def put_bytes(self, key: str, data: bytes) -> None:
        """Write bytes that an entry will speak of; raises as :meth:`put`."""
        try:
            with self._lock:
                self._telling.set(key, data)
        except RuntimeError as error:
            raise StoreLost from error

    def get_bytes(self, key: str) -> bytes:
        """Bytes that an entry speaks of; raises as :meth:`get`.

        They are written before the entry, so nobody waits for them.
        """
        if not self.there(key):
            raise InputError("is not there", source=f"the run's store: {key}")
        try:
            with self._lock:
                return bytes(self._telling.get(key))
        except RuntimeError as error:
            raise StoreLost from error

    def get(self, key: str) -> Any:
        """JSON that an entry speaks of.

        Raises
        ------
        StoreLost
            There is no store any more.
        InputError
            It is not there, or no JSON.
        """
        return read_json(self.get_bytes(key), key)

    def there(self, *keys: str) -> bool:
        """Whether all these keys are in the store; raises as :meth:`put`."""
        try:
            with self._lock:
                return bool(self._telling.check(list(keys)))
        except RuntimeError as error:
            raise StoreLost from error
