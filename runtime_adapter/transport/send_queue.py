"""Sends long messages of a process one after the other (docs/design.md, section 4).

TCP would share the link among messages that are in flight together, so that all of them end late:
two equal ones would both take until 2, where the first could arrive at 1 and be worked on.
"""

from __future__ import annotations

import contextlib
import datetime
import queue
import threading
from typing import Any

import torch

from runtime_adapter.transport.pair_groups import send

#: Messages from this size on are queued.
LONG_BYTES = 128 * 1024


class SendQueue:
    """A queue of long messages and the thread that sends them; one for all lanes of a process."""

    def __init__(self, timeout: datetime.timedelta) -> None:
        self._timeout = timeout
        self._messages: queue.SimpleQueue[tuple[Any, torch.Tensor, int, int, threading.Event]]
        self._messages = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def put(self, group: Any, message: torch.Tensor, to: int, tag: int) -> threading.Event:
        """Queue a message to the other side of a pair; the event is set once it has left.

        A message that cannot be sent counts as sent: its answer will not come.
        """
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()
        sent = threading.Event()
        self._messages.put((group, message, to, tag, sent))
        return sent

    def _run(self) -> None:
        while True:
            group, message, to, tag, sent = self._messages.get()
            with contextlib.suppress(RuntimeError):
                send(group, message, to, tag).wait(self._timeout)
            sent.set()
