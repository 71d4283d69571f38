"""How many requests of a home are running, done and failed: what ``prism-runtime status`` shows."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class RequestCounts:
    """Counts that lanes change and the driver's heartbeat reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.running = 0
        self.done = 0
        self.failed = 0
        self.new_tokens = 0
        #: Why the last request that failed did, or "".
        self.last_error = ""

    @contextlib.contextmanager
    def running_one(self) -> Iterator[None]:
        """In the block a request runs; :meth:`ended` is called in it."""
        with self._lock:
            self.running += 1
        try:
            yield
        finally:
            with self._lock:
                self.running -= 1

    @property
    def all_ended(self) -> int:
        """Requests that are done or have failed."""
        return self.done + self.failed

    def ended(self, error: str | None, new_tokens: int = 0) -> None:
        """A request is done, or has failed for a reason, with so many tokens."""
        with self._lock:
            self.new_tokens += new_tokens
            if error is None:
                self.done += 1
            else:
                self.failed += 1
                self.last_error = error

    def to_json(self) -> dict[str, int]:
        """The numbers by name."""
        return {"running": self.running, "done": self.done, "failed": self.failed}
