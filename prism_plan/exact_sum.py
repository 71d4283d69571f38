"""Sums of floats that are correctly rounded, as math.fsum's, at the speed of numpy.

High parts of all values are split off such that they add up without rounding, until nothing is
left; the few sums of them are added by math.fsum (Rump, Ogita and Oishi, Accurate floating-point
summation part I, SIAM J. Sci. Comput. 31(1), 2008, section 3).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

#: Values that are split at once: all of them stay in the processor's cache.
_BLOCK = 1 << 14
#: Up to so many values math.fsum is faster.
_FEW = 256
#: Beyond it a sum could overflow; math.fsum then says so.
_LARGEST = 2.0**960


def exact_sum(values: npt.NDArray[np.float64]) -> float:
    """Sum of all values of an array, float64 of any shape, correctly rounded."""
    flat = values.ravel()
    if len(flat) <= _FEW:
        return math.fsum(flat.tolist())
    parts: list[float] = []
    for start in range(0, len(flat), _BLOCK):
        (of_block,) = _split_sums(flat[None, start : start + _BLOCK])
        parts += of_block
    return math.fsum(parts)


def exact_row_sums(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sums of the rows of [rows, columns], each correctly rounded, float64 [rows]."""
    rows, columns = values.shape
    sums = np.empty(rows)
    at_once = max(1, _BLOCK // max(columns, 1))
    for start in range(0, rows, at_once):
        parts = _split_sums(values[start : start + at_once])
        sums[start : start + len(parts)] = [math.fsum(of_row) for of_row in parts]
    return sums


def _split_sums(values: npt.NDArray[np.float64]) -> list[list[float]]:
    """Floats for each row of [rows, columns] whose exact sum is the row's."""
    rest = values.copy()
    # the most by which a sum of columns can exceed its largest summand, as a power of two
    headroom = values.shape[1].bit_length()
    sums = []
    while largest := max(float(rest.max(initial=0.0)), -float(rest.min(initial=0.0))):
        if not largest < _LARGEST:  # nor if it is not a number
            return [row.tolist() for row in values]
        # to add it rounds off what lies more than 53 bits below; high parts are multiples of that
        # bit, and so are their sums, which stay below it: none is rounded
        divider = math.ldexp(1.0, math.frexp(largest)[1] + headroom)
        high = rest + divider
        high -= divider
        rest -= high
        sums.append(high.sum(axis=1))
    return np.stack(sums, axis=1).tolist() if sums else [[]] * len(values)
