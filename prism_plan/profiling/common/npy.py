"""Read arrays of whole numbers in NumPy's .npy format, without evaluating or unpickling."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.io.location import Location
from prism_plan.profiling.common.messages import TRUNCATED

_NPY_HEADER = re.compile(
    r"\{'descr': '([|<>])([A-Za-z])(\d{1,4})?', 'fortran_order': (True|False), "
    r"'shape': \(((?:\d{1,18}, ?)*(?:\d{1,18})?)\), ?\}\s*"
)
#: More make NumPy raise, and no recording has more than three.
_MAX_DIMENSIONS = 8
_INTEGER_TYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")


def parse_npy(data: bytes, at: Location) -> npt.NDArray[Any]:
    """Read the array of whole numbers in the bytes of a .npy file.

    Raises
    ------
    InputError
        Not .npy, truncated, or not whole numbers (Python objects included).
    """
    if data[:6] != b"\x93NUMPY" or len(data) < 12:
        raise at.error("not a .npy array", "NumPy's .npy format", TRUNCATED)
    start, width = (10, 2) if data[6] == 1 else (12, 4)
    end = start + int.from_bytes(data[start - width : start], "little")
    header = data[start:end].decode("latin-1")
    match = _NPY_HEADER.fullmatch(header)
    if match is None:
        kind = re.search(r"'descr': (.{1,40}?), 'fortran", header)
        found = f"an array of {kind.group(1)}" if kind else "the .npy header does not parse"
        raise at.error(found, "an array of whole numbers", TRUNCATED)
    byte_order, letter, size, fortran, dims = match.groups()
    if f"{letter}{size}" not in _INTEGER_TYPES:
        raise at.error(
            f"an array of type {byte_order}{letter}{size or ''}",
            "whole numbers (uint8, uint16 or int32)",
            "arrays of objects or fractions are no expert ids",
        )
    shape = tuple(int(word) for word in dims.replace(" ", "").split(",") if word)
    # NumPy multiplies the dimensions even of an array without elements
    if len(shape) > _MAX_DIMENSIONS or math.prod(filter(None, shape)) >= 2**40:
        raise at.error(f"an array of shape {shape!s:.60}", "[tokens, layers, top-k]", TRUNCATED)
    needed = math.prod(shape) * int(size)
    if len(data) - end != needed:
        found = f"{len(data) - end} bytes of data"
        raise at.error(found, f"{needed} for shape {shape}", TRUNCATED)
    flat = np.frombuffer(data, np.dtype(f"{byte_order}{letter}{size}"), offset=end)
    return flat.reshape(shape, order="F" if fortran == "True" else "C")
