"""Memory that the worker and the driver of a server share."""

from __future__ import annotations

import ctypes
import multiprocessing
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, eq=False)
class SharedStatus:
    """``finished`` [1]: the driver makes no more calls, as the worker tells who pings it.

    ``joined`` and ``name_taken`` [1]: the worker has joined the run; another process that is alive
    has joined it under this server's name.
    """

    finished: Any
    joined: Any
    name_taken: Any

    @classmethod
    def create(cls) -> Self:
        """None of it."""
        context = multiprocessing.get_context("spawn")
        return cls(*(context.Array(ctypes.c_bool, 1, lock=False) for _ in range(3)))

    def note_join(self, joined: bool) -> None:
        """The worker has joined, or another process has its name."""
        self.joined[0], self.name_taken[0] = joined, not joined
