"""Memory that the worker and the driver of a server share."""

from __future__ import annotations

import ctypes
import multiprocessing
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, eq=False)
class SharedStatus:
    """``finished`` [1]: the driver makes no more calls, as the worker tells who pings it."""

    finished: Any

    @classmethod
    def create(cls) -> Self:
        """Not finished."""
        return cls(multiprocessing.get_context("spawn").Array(ctypes.c_bool, 1, lock=False))
