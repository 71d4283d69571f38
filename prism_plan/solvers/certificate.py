"""A lower bound on the objective that anyone can check, from dual prices of slots and coverage.

The problem is a linear program (docs/design.md, section 2). With w[n, j] the value of holding
expert j on server n, any prices μ[n] ≥ 0 on slots, ν[n, l] ≥ 0 on layer caps and λ[j] ≥ 0 on
coverage give, by weak duality,

    Σ w·x  ≤  Σ μ[n]·C'[n] + Σ ν[n, l]·cap'[n, l] − min_replicas·Σ λ[j] + Σ_pinned (w + λ)
              + Σ_{n, j open} max(0, w[n, j] + λ[j] − μ[n] − ν[n, l(j)])

for every feasible x, where C' and cap' are what the pins leave. It needs nothing from the
solver but the prices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.exact_sum import exact_sum
from prism_plan.instance import Instance

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Prices:
    """Dual prices: ``slot`` [N], ``layer_cap`` [N, L], ``coverage`` [L, E]; none negative."""

    slot: Floats
    layer_cap: Floats
    coverage: Floats


def value_bound(instance: Instance, value: Floats, prices: Prices) -> float:
    """Upper bound on Σ value·x over all feasible placements x; ``value`` is [N, L, E].

    Raises
    ------
    ValueError
        A price is negative or not finite.
    """
    for array in (prices.slot, prices.layer_cap, prices.coverage):
        if not np.isfinite(array).all() or (array < 0).any():
            raise ValueError("prices must be finite and not negative")
    pinned = instance.mask(instance.pinned)
    open_ = ~(pinned | instance.mask(instance.forbidden))
    slots = instance.slots - pinned.sum(axis=(1, 2))
    caps_left = instance.max_per_layer[:, None] - pinned.sum(axis=2)
    summands = [
        prices.slot * slots,
        (prices.layer_cap * caps_left).ravel(),
        (-instance.min_replicas * prices.coverage).ravel(),
    ]
    for n in range(instance.num_servers):
        with_coverage = value[n] + prices.coverage
        reduced = with_coverage - prices.slot[n] - prices.layer_cap[n][:, None]
        summands.append(with_coverage[pinned[n]])
        summands.append(reduced[open_[n] & (reduced > 0.0)])
    return exact_sum(np.concatenate(summands))
