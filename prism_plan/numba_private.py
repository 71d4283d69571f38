"""Every use that prism_plan makes of undocumented parts of numba, but for options of ``njit``.

Read in numba 0.68.1; where another one differs, tests/test_numba_private.py says in what.
"""

from __future__ import annotations

import sys


def load_without_scipy() -> None:
    """Load numba's functions on arrays without ``scipy.linalg``, which takes 0.2 CPU seconds.

    ``numba.np.arraymath`` looks while it is loaded whether scipy has BLAS. It has, for scipy is
    required; functions that need BLAS look again when they are compiled, so that nothing is lost.
    """
    if "numba.np.arraymath" in sys.modules:
        return
    from numba.np import linalg

    ensure_blas = getattr(linalg, "ensure_blas", None)
    if ensure_blas is None:
        return
    linalg.ensure_blas = lambda: None
    try:
        from numba.np import arraymath
    finally:
        linalg.ensure_blas = ensure_blas
    arraymath.ensure_blas = ensure_blas
