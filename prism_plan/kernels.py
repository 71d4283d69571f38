"""Compiled loops over many tokens. Everything here is plain arithmetic on arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.jit import jit


@jit
def count_selections(
    experts: npt.NDArray[np.uint16], task: npt.NDArray[np.int32], counts: npt.NDArray[np.int64]
) -> None:  # pragma: no cover - compiled
    """``counts[task[t], l, experts[t, l, k]] += 1`` for all t, l, k."""
    tokens, layers, top_k = experts.shape
    for t in range(tokens):
        of_task = counts[task[t]]
        for layer in range(layers):
            row = of_task[layer]
            for k in range(top_k):
                row[experts[t, layer, k]] += 1


@jit
def first_bad_selection(
    experts: npt.NDArray[np.uint16], num_experts: int
) -> tuple[int, int]:  # pragma: no cover - compiled
    """Row and layer of the first id out of range or named twice; (-1, -1) if all are good."""
    tokens, layers, top_k = experts.shape
    for t in range(tokens):
        for layer in range(layers):
            for k in range(top_k):
                e = experts[t, layer, k]
                if e >= num_experts:
                    return t, layer
                for other in range(k):
                    if experts[t, layer, other] == e:
                        return t, layer
    return -1, -1
