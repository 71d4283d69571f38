"""Undocumented parts of numba that prism_plan uses: as read, and without a loss."""

from __future__ import annotations

import inspect
import subprocess
import sys

CHANGED = "changed since prism_plan/numba_private.py was written: read it anew"

KERNEL_THEN_BLAS = """
import sys
import numpy as np
from prism_plan.jit import kernel

@kernel
def first(numbers):
    return numbers[0]

assert first(np.ones(3)) == 1.0
print("scipy.linalg" in sys.modules)
from numba import njit
print(njit(lambda a, b: np.dot(a, b))(np.full((2, 2), 2.0), np.full((2, 2), 3.0)).tolist())
print("scipy.linalg" in sys.modules)
"""


def test_numba_is_loaded_without_scipy_linalg_until_it_is_needed() -> None:
    """A kernel runs without scipy.linalg; a product of matrices then loads it, and is right."""
    result = subprocess.run(
        [sys.executable, "-c", KERNEL_THEN_BLAS], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["False", "[[12.0, 12.0], [12.0, 12.0]]", "True"]


def test_numba_looks_for_blas_while_it_is_loaded() -> None:
    """What is put off is there: arraymath calls ensure_blas, by the name it has from linalg."""
    from numba.np import arraymath, linalg

    assert "ensure_blas()" in inspect.getsource(arraymath), f"numba has {CHANGED}"
    assert arraymath.ensure_blas is linalg.ensure_blas
    assert "scipy.linalg" in inspect.getsource(linalg.ensure_blas), f"numba has {CHANGED}"


def test_options_of_kernels_are_known() -> None:
    """The options that leave out reference counts and wrappers are numba's."""
    from numba.core.options import TargetOptions
    from numba.core.registry import cpu_target

    options = cpu_target.options
    assert issubclass(options, TargetOptions)
    for name in ("_nrt", "no_cfunc_wrapper", "no_cpython_wrapper"):
        assert hasattr(options, name), f"numba: option {name} has {CHANGED}"
