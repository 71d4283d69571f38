"""Compilation with numba, cached on disk where a cache can be kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])

_notices: list[Callable[[], None]] = []
_listening = False


def before_first_compilation(notice: Callable[[], None]) -> None:
    """Call ``notice`` once, before this process compiles its first kernel.

    Kernels that are loaded from the cache are not compiled, so on most runs it is never called.
    """
    _notices.append(notice)


def jit(function: Function) -> Function:
    """Compile ``function`` on first call; later processes load the machine code from the cache.

    Where no cache folder can be written (a read-only installation without a home), the function is
    compiled again in each process.
    """
    from numba import njit

    _listen()
    try:
        return cast(Function, njit(cache=True)(function))
    except RuntimeError:  # numba: "no locator available"
        return cast(Function, njit(function))


def _listen() -> None:
    """Have numba tell when it compiles, which it does not for what it loads from the cache."""
    global _listening
    if _listening:
        return
    _listening = True
    from numba.core import event

    class Compilation(event.Listener):  # type: ignore[misc]  # numba is not typed
        def on_start(self, event: Any) -> None:
            while _notices:
                _notices.pop()()

        def on_end(self, event: Any) -> None:
            """Nothing is told when it ends."""

    event.register("numba:compile", Compilation())
