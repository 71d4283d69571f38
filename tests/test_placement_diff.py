"""What moves between two placements."""

from __future__ import annotations

import numpy as np
import pytest

from prism_plan.errors import WrongModel
from prism_plan.model_spec import ModelShape
from prism_plan.placement import Placement, SolveReport
from prism_plan.placement_diff import diff

MODEL = ModelShape("m", (1, 3), 3, 1, (10, 100))


def placed(names: str, gpus: list[int], held: np.ndarray, model: ModelShape = MODEL) -> Placement:
    """A placement of servers with one-letter names and so many GPUs each."""
    return Placement(model, tuple(names), tuple((9,) * g for g in gpus), held, SolveReport("hand"))


def test_nothing_moves_between_equals() -> None:
    """A placement against itself: no loads, no drops, no bytes."""
    held = np.random.default_rng(0).random((3, 2, 3)) < 0.5
    result = diff(placed("ab", [1, 2], held), placed("ab", [1, 2], held))
    values = result.to_json()
    assert (values["loads"], values["drops"], values["shifts"], values["moved_bytes"]) == (0,) * 4


def test_loads_drops_and_shifts() -> None:
    """One of each by hand: counted per server and layer, paid by the size of the layer."""
    before = np.zeros((3, 2, 3), bool)
    after = np.zeros((3, 2, 3), bool)
    before[0, 0, 1] = True  # a drops (1, 1)
    after[0, 1, 2] = True  # a loads (3, 2)
    before[1, 0, 0] = after[2, 0, 0] = True  # b moves (1, 0) from its GPU 0 to its GPU 1
    values = diff(placed("ab", [1, 2], before), placed("ab", [1, 2], after)).to_json()
    a, b = values["servers"]
    assert (a["loads"], a["drops"], a["shifts"], a["moved_bytes"]) == ([[3, 2]], [[1, 1]], [], 100)
    assert (b["loads"], b["drops"], b["shifts"], b["moved_bytes"]) == ([], [], [[1, 0]], 10)
    assert values["moved_bytes"] == 110
    assert values["layers"] == [
        {"layer": 1, "loads": 0, "drops": 1, "shifts": 1},
        {"layer": 3, "loads": 1, "drops": 0, "shifts": 0},
    ]


def test_servers_are_matched_by_name() -> None:
    """Order does not matter; a server that is gone drops all, a new one loads all."""
    held = np.random.default_rng(1).random((2, 2, 3)) < 0.5
    swapped = diff(placed("ab", [1, 1], held), placed("ba", [1, 1], held[::-1]))
    assert swapped.to_json()["loads"] == 0
    result = diff(placed("ab", [1, 1], held), placed("bc", [1, 1], held[::-1]))
    assert result.servers == ("b", "c", "a")
    assert result.loads.sum(axis=(1, 2)).tolist() == [0, held[0].sum(), 0]
    assert result.drops.sum(axis=(1, 2)).tolist() == [0, 0, held[0].sum()]


@pytest.mark.parametrize("seed", range(20))
def test_moves_lead_from_a_to_b(seed: int) -> None:
    """A's experts minus the drops plus the loads are B's, for random placements."""
    rng = np.random.default_rng(seed)
    a = placed("ab", [2, 1], rng.random((3, 2, 3)) < 0.5)
    b = placed("ab", [2, 1], rng.random((3, 2, 3)) < 0.5)
    result = diff(a, b)
    assert (((a.local & ~result.drops) | result.loads) == b.local).all()
    assert not (result.loads & a.local).any()
    assert not (result.drops & ~a.local).any()
    newly = ((b.on_gpu & ~a.on_gpu)[:2].any(axis=0), (b.on_gpu & ~a.on_gpu)[2])
    assert ((result.loads | result.shifts) == np.stack(newly)).all()


def test_other_models_do_not_compare() -> None:
    """Two models' placements have no difference."""
    held = np.zeros((1, 2, 3), bool)
    other = ModelShape("n", (1, 3), 3, 1, (10, 100))
    with pytest.raises(WrongModel):
        diff(placed("a", [1], held), placed("a", [1], held, other))
