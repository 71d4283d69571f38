"""The flow where replicas may be missing; `tests/migration/test_repair.py` has its optima."""

from __future__ import annotations

import numpy as np
import pytest

from prism_plan.errors import LimitReached
from prism_plan.instance import Instance
from prism_plan.model_spec import ModelShape
from prism_plan.solvers.missing_replicas import ranked_weights, solve_with_missing
from tests.migration.moves_by_hand import placed


def test_prices_of_missing_replicas() -> None:
    """One for each replica, not falling; a problem too large for so many goals is refused."""
    held = placed([[0], []], [2, 2], pairs=2)
    instance = Instance(held.model, held.servers, np.zeros((2, 1, 2)), ((2,), (2,)))
    value = np.zeros((2, 1, 2))
    falling = np.array([[[2.0, 2.0]], [[1.0, 2.0]]])
    for replicas, price in ((1, np.zeros((2, 1, 2))), (2, falling)):
        with pytest.raises(ValueError, match="a price for each replica"):
            solve_with_missing(instance.replace(min_replicas=replicas), value, price)
    high, low = ranked_weights(instance, 2)
    assert high >= 2 * 3 * low
    assert low >= 2**20
    many = Instance(
        ModelShape("m", tuple(range(60)), 1, 1, 1), tuple(f"s{n}" for n in range(2000)),
        np.zeros((2000, 60, 1)), ((1,),) * 2000, layer_caps=(1,) * 2000,
    )  # fmt: skip
    with pytest.raises(LimitReached, match="remove layer_cap"):
        ranked_weights(many, 4)
