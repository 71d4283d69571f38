"""How many tokens the KV caches of a home's requests may hold at once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable


class KvRoom:
    """Room for ``limit`` tokens, taken and given back by whoever names itself; no bound if 0.

    First come, first served: a long request is not passed by short ones for which there is room.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._taken: dict[Hashable, int] = {}
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    def fits(self, tokens: int) -> bool:
        """Whether so many tokens fit when nobody else has any."""
        return not self.limit or tokens <= self.limit

    def take(self, owner: Hashable, tokens: int, timeout_s: float | None = None) -> bool:
        """Wait for room, which ``owner`` then has instead of what it had; False if there is none.

        Without a ``timeout_s`` only those wait that fit once the others are done.
        """
        self.give_back(owner)
        if not self.fits(tokens):
            return False
        turn = object()
        with self._changed:
            self._waiting.append(turn)
            found = self._changed.wait_for(lambda: self._may_take(turn, tokens), timeout_s)
            self._waiting.remove(turn)
            if found:
                self._taken[owner] = tokens
            self._changed.notify_all()
        return found

    def _may_take(self, turn: object, tokens: int) -> bool:
        has_room = not self.limit or sum(self._taken.values()) + tokens <= self.limit
        return has_room and self._waiting[0] is turn

    def give_back(self, owner: Hashable) -> None:
        """What ``owner`` had is free."""
        with self._changed:
            if self._taken.pop(owner, None) is not None:
                self._changed.notify_all()
