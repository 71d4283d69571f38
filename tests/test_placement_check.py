"""The check of placements: each broken constraint is found, with place and amount."""

from __future__ import annotations

import numpy as np

from prism_plan.instance import Instance
from prism_plan.model_spec import ModelShape
from prism_plan.placement import Placement, SolveReport
from prism_plan.placement_check import violations
from prism_plan.solvers import solve


def placed(held: np.ndarray, slots: tuple[tuple[int, ...], ...]) -> Placement:
    model = ModelShape("m", (3, 4), held.shape[2], 1, 7)
    names = tuple(f"s{n}" for n in range(len(slots)))
    return Placement(model, names, slots, held, SolveReport("hand"))


def test_violations_are_named() -> None:
    """Each broken constraint is found once, with place and amount."""
    held = np.zeros((3, 2, 2), bool)
    held[0] = [[True, True], [True, False]]
    held[2] = [[True, False], [True, False]]
    placement = placed(held, ((2,), (4, 4)))
    found = violations(placement)
    assert [(v.constraint, v.where, v.amount) for v in found] == [
        ("coverage", "layer 4 expert 1", 1),
        ("capacity", "server 's0' gpu[0]", 1),
    ]
    instance = Instance(
        placement.model,
        placement.servers,
        np.ones((2, 2, 2)),
        ((2,), (4, 1)),
        min_replicas=2,
        pinned=((1, 1, 1),),
        forbidden=((0, 0, 1),),
        layer_caps=(1, None),
    )
    found = violations(placement, instance=instance)
    assert [(v.constraint, v.amount) for v in found] == [
        ("min_replicas", 1),
        ("coverage", 2),
        ("capacity", 1),
        ("capacity", 1),
        ("capacity", 1),
        ("pin", 1),
        ("forbid", 1),
        ("layer_cap", 1),
    ]
    assert "server 's0' layer 3 holds 2 experts, layer_cap is 1" in found[-1].message


def test_other_servers_are_a_violation() -> None:
    """A placement for other servers, or other GPUs, says so instead of being scored."""
    placement = placed(np.ones((2, 2, 2), bool), ((4,), (4,)))
    model, f = placement.model, np.ones((2, 2, 2))
    other = Instance(model, ("x", "y"), f, ((4,), (4,)))
    assert [v.constraint for v in violations(placement, instance=other)] == ["servers"]
    gpus = Instance(model, placement.servers, f, ((2, 2), (4,)))
    assert [v.constraint for v in violations(placement, instance=gpus)] == ["gpus"]


def test_no_violations_of_a_solver() -> None:
    """What a solver returns breaks nothing, also as seen by the placement alone."""
    model = ModelShape("m", (0, 1), 4, 2, 7)
    f = np.random.default_rng(0).random((2, 2, 4))
    instance = Instance(model, ("a", "b"), f, ((5,), (3, 3)))
    assert violations(solve(instance, "prism"), instance=instance) == []
