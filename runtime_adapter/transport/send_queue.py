"""Long messages leave a server one after the other, as section 4 of the design has them.

TCP would share the line among messages that are under way together, so that all of them end late:
two equal ones take until 2 both, where the first could be there at 1, and its server at work.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import queue
import socket
import stat
import threading
from typing import Any

import torch

from runtime_adapter.transport.rendezvous import send

#: Messages from this size on wait for each other.
LONG_BYTES = 128 * 1024
#: What the kernel may keep of a connection without having sent it.
UNSENT_BYTES = 32 * 1024
_TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)


class SendQueue:
    """Sends in a thread of its own; one for all lanes of a process."""

    def __init__(self, timeout: datetime.timedelta) -> None:
        self._timeout = timeout
        self._waiting: queue.SimpleQueue[tuple[Any, torch.Tensor, int, int, threading.Event]]
        self._waiting = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def put(self, group: Any, message: torch.Tensor, to: int, lane: int) -> threading.Event:
        """Send to the other side of a pair when all before have left; the event says it has.

        A message that cannot be sent counts as sent: its answer will not come.
        """
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()
        left = threading.Event()
        self._waiting.put((group, message, to, lane, left))
        return left

    def _run(self) -> None:
        while True:
            group, message, to, lane, left = self._waiting.get()
            with contextlib.suppress(RuntimeError):
                send(group, message, to, lane).wait(self._timeout)
            left.set()


def limit_unsent_bytes() -> None:
    """Let "sent" mean that a message has left: the kernel takes no more than UNSENT_BYTES ahead.

    For all TCP connections that this process has by now. gloo has no setting for it. Where the
    system has none either, long messages share the line.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                    with socket.socket(fileno=os.dup(int(name))) as one:
                        one.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, UNSENT_BYTES)
