"""The log of a run: who loads and drops what, in one order that all servers see.

An entry is JSON under the key ``news/i`` of the store. A writer puts it at the first place that is
free, so the log has no gaps and whoever reads an entry has read all that it was written in
knowledge of: who reads that an expert is dropped has read where it was loaded before.

==========  ========================================  ==========================================
what        more                                      written by
==========  ========================================  ==========================================
plan        plan (its steps are at ``plan/<plan>``)   the scheduler
load        plan, experts [step, gpu, pair, slot]     the GPUs' server: they serve from now on
drop        plan, experts [step, gpu, pair, 0]        the GPUs' server: they are no longer called
seen        server, plan, steps                       a front: no call counts on what they drop
dropped     plan, steps                               the GPUs' server: the slots are free
failed      plan, step, server, reason                the GPU's server: the step cannot be done
stop        plan, reason                              the scheduler: begin no further step
halted      plan, server                              a server: no step is under way any more
over        plan, done, text                          the scheduler
review      review                                    the scheduler
calls       review, server                            a front: its calls are in the store
move        move (the placement is at ``move/<id>``)  the command ``move``
moved       move, code, text                          the scheduler: how it ended
note        text                                      the scheduler: for the first server's log
==========  ========================================  ==========================================

A server announces in one entry what it has done since its last one. GPUs are counted over all
servers in order, slots within their GPU.
"""

from __future__ import annotations

import datetime
import json
import queue
import threading
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from runtime_adapter.links import Meeting, RuntimeFailure, join_store

#: A reader waits for the next entry so long; the longest that a socket's poll knows.
_FOREVER = datetime.timedelta(days=20)


class StoreLost(RuntimeFailure):
    """The store is not there any more, and so nobody tells what changes."""

    def __init__(self) -> None:
        super().__init__("the store of the run is gone")


@dataclass(frozen=True)
class Entry:
    """One entry of the log and its number."""

    number: int
    what: str
    values: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        return self.values[key]


class News:
    """One reader and writer of the log; ``by`` is its name in the entries.

    Raises
    ------
    RuntimeFailure
        There is no store.
    """

    def __init__(self, meeting: Meeting, by: str) -> None:
        self.by = by
        self._reading = join_store(meeting, host_it=False)
        # a client that waits for a key is locked meanwhile
        self._telling = join_store(meeting, host_it=False)
        self._lock = threading.Lock()
        self._tail = 0
        self._queue: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._following = False

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
                while self._telling.compare_set(f"news/{at}", "", text) != text.encode():
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
                values = json.loads(self._reading.get(f"news/{number}"))
            except (RuntimeError, ValueError):
                self._queue.put(None)
                return
            self._queue.put(Entry(number, values.pop("what"), values))
            number += 1
            with self._lock:
                self._tail = max(self._tail, number)

    def next(self, timeout_s: float | None = None) -> Entry | None:
        """The next entry, or ``None`` if none comes in time.

        Raises
        ------
        StoreLost
            There is no store any more.
        """
        assert self._following
        try:
            entry = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if entry is None:
            self._queue.put(None)  # for whoever asks again
            raise StoreLost
        return entry

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
        """Bytes that an entry speaks of; raises as :meth:`put`."""
        try:
            with self._lock:
                return bytes(self._telling.get(key))
        except RuntimeError as error:
            raise StoreLost from error

    def get(self, key: str) -> Any:
        """JSON that an entry speaks of; raises as :meth:`put`."""
        return json.loads(self.get_bytes(key))

    def there(self, *keys: str) -> bool:
        """Whether all these keys are in the store; raises as :meth:`put`."""
        try:
            with self._lock:
                return bool(self._telling.check(list(keys)))
        except RuntimeError as error:
            raise StoreLost from error
