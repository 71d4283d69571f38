"""How many tokens the KV caches of a home's requests may hold at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable


class KvRoom:
    """Room for ``limit`` tokens, taken and given back by whoever names itself; no bound if 0."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._taken: dict[Hashable, int] = {}
        self._changed = threading.Condition()

    def fits(self, tokens: int) -> bool:
        """Whether so many tokens fit when nobody else has any."""
        return not self.limit or tokens <= self.limit

    def take(self, owner: Hashable, tokens: int, timeout_s: float | None = None) -> bool:
        """Wait for room, which ``owner`` then has instead of what it had; False if there is none.

        Without a ``timeout_s`` only those wait that fit once the others are done.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            if self._taken.pop(owner, None) is not None:
                self._changed.notify_all()
            while self.limit and sum(self._taken.values()) + tokens > self.limit:
                left_s = None if deadline is None else deadline - time.monotonic()
                if not self.fits(tokens) or (left_s is not None and left_s <= 0):
                    return False
                self._changed.wait(left_s)
            self._taken[owner] = tokens
        return True

    def give_back(self, owner: Hashable) -> None:
        """What ``owner`` had is free."""
        with self._changed:
            if self._taken.pop(owner, None) is not None:
                self._changed.notify_all()
