"""The type of numbers that compiled functions pass to each other."""

from __future__ import annotations

from typing import Any

import numpy as np

#: Kernels call helpers with numbers of this type: numba compiles a helper anew for each constant
#: that it is called with, and for numbers of 32 bits.
int64: Any = np.int64
