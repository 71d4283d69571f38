"""Compilation with numba, cached on disk where a cache can be kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


def jit(function: Function) -> Function:
    """Compile ``function`` on first call; later processes load the machine code from the cache.

    Where no cache folder can be written (a read-only installation without a home), the function is
    compiled again in each process.
    """
    from numba import njit

    try:
        return cast(Function, njit(cache=True)(function))
    except RuntimeError:  # numba: "no locator available"
        return cast(Function, njit(function))
