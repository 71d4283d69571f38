"""Compilation with numba, cached on disk where a cache folder can be written."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from prism_plan.numba_private import load_without_scipy

Function = TypeVar("Function", bound=Callable[..., Any])

_callbacks: list[Callable[[], None]] = []
#: Names of functions whose machine code cannot be kept.
_not_cached: list[str] = []


def before_first_compilation(callback: Callable[[], None]) -> None:
    """Call ``callback`` once, before this process compiles its first kernel.

    Kernels that are loaded from the cache are not compiled, so on most runs it is never called.
    """
    _callbacks.append(callback)


def code_is_kept() -> bool:
    """Whether the machine code of all kernels so far is kept for later processes."""
    return not _not_cached


def jit(function: Function) -> Function:
    """Compile ``function`` on first call; later processes load the machine code from the cache.

    The cache is ``NUMBA_CACHE_DIR``, else beside the module, else in the user's own cache folder.
    Where none can be written (a read-only installation without a home), the function is compiled
    again in each process.
    """
    return _compiled(function)


def kernel(function: Function) -> Function:
    """As :func:`jit`, for functions that allocate nothing and that Python calls.

    Their arrays are not reference counted: numba otherwise counts at every access of an array in a
    tuple, atomically, which takes several times as long as the work itself.
    """
    return _compiled(function, _nrt=False, no_cfunc_wrapper=True)


def inline_kernel(function: Function) -> Function:
    """As :func:`kernel`, for functions that only kernels call: without code for calls by Python."""
    return _compiled(function, _nrt=False, no_cfunc_wrapper=True, no_cpython_wrapper=True)


def _compiled(function: Function, **options: bool) -> Function:
    from numba import njit

    load_without_scipy()
    _register_listener()
    function.__qualname__ = f"{function.__qualname__}-{_sources_digest()}"
    try:
        return cast(Function, njit(cache=True, **options)(function))
    except RuntimeError:  # numba: "no locator available"
        _not_cached.append(function.__name__)
        return cast(Function, njit(**options)(function))


@functools.cache
def _sources_digest() -> str:
    """A digest of the modules that kernels, their helpers and constants stand in.

    It is part of the name under which numba keeps machine code. numba alone looks at the file of
    the kernel only, and would go on to run code of an older version of a helper in another file.
    """
    package = Path(__file__).parent
    digest = hashlib.sha256()
    paths = [package / name for name in ("compiled_loops.py", "jit.py", "kernel_types.py")]
    for folder in ("latency", "simulate", "solvers"):
        paths += sorted((package / folder).rglob("*.py"))
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def _register_listener() -> None:
    """Run the callbacks when numba compiles; loading from the cache raises no such event."""
    from numba.core import event

    class Compilation(event.Listener):  # type: ignore[misc]  # numba is not typed
        def on_start(self, event: Any) -> None:
            while _callbacks:
                _callbacks.pop()()

        def on_end(self, event: Any) -> None:
            """Do nothing; numba requires the method."""

    event.register("numba:compile", Compilation())
