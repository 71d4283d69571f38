"""Experts of unequal size: the integer program fits to the byte, and uses every byte."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from prism_plan.errors import Infeasible, LimitReached
from prism_plan.instance import Instance
from prism_plan.model_spec import ModelShape
from prism_plan.placement_check import violations
from prism_plan.solvers import Options, ilp, solve
from tests.solvers.brute_force import SOLVER as BRUTE_FORCE

Backend = Literal["highs", "cbc"]
BACKENDS: tuple[Backend, ...] = ("highs", "cbc")
LAYERS, EXPERTS = 3, 2


def tight(seed: int) -> Instance:
    """Sizes that are almost multiples of each other; rooms that are sums of them, or a byte off."""
    rng = np.random.default_rng(seed)
    base = int(rng.integers(10**6, 4 * 10**8))
    sizes = [base * int(rng.integers(1, 4)) + int(rng.integers(-3, 4)) for _ in range(LAYERS)]
    sizes[0] += sizes[0] == sizes[1] == sizes[2]
    gpus = [1, 2] if seed % 4 == 0 else [1, 1]
    capacity = [
        [
            max(int(rng.integers(n, EXPERTS + 1, LAYERS) @ sizes) + int(rng.integers(-1, 2)), 0)
            for _ in range(count)
        ]
        for n, count in enumerate(gpus)
    ]
    return Instance(
        ModelShape("mixed", tuple(range(LAYERS)), EXPERTS, 1, tuple(sizes)),
        ("a", "b"),
        rng.integers(1, 50, (2, LAYERS, EXPERTS)).astype(float),
        tuple(map(tuple, capacity)),
    )


def local_calls(instance: Instance, held: np.ndarray) -> float:
    """Calls per second that stay at home; whole numbers here."""
    return float(instance.activations[held].sum())


@pytest.mark.parametrize("seed", range(40))
def test_as_good_as_brute_force_to_the_byte(seed: int) -> None:
    """Both back ends find the optimum of all placements that fit, and none that does not fit."""
    instance = tight(seed)
    try:
        best = BRUTE_FORCE(instance, Options()).local
    except Infeasible:
        for backend in BACKENDS:
            with pytest.raises(Infeasible):
                solve(instance, "ilp", Options(backend=backend))
        return
    for backend in BACKENDS:
        placement = solve(instance, "ilp", Options(backend=backend))
        assert violations(placement, instance=instance) == []
        assert local_calls(instance, placement.local) == local_calls(instance, best)
        bound, share = placement.plan.bound, placement.plan.remote_share
        assert bound is not None
        assert share is not None
        assert bound <= share + 1e-9


def test_the_instances_need_the_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those instances both back ends answer some with a byte too much at first."""
    again: set[str] = set()
    run = ilp._run_backend

    def counted(instance: Instance, value: object, options: Options, *, by_digits: bool) -> object:
        if by_digits:
            again.add(options.backend)
        return run(instance, value, options, by_digits=by_digits)  # type: ignore[arg-type]

    monkeypatch.setattr(ilp, "_run_backend", counted)
    for seed in range(12):
        for backend in BACKENDS:
            try:
                solve(tight(seed), "ilp", Options(backend=backend))
            except Infeasible:
                continue
    assert again == set(BACKENDS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spare", [-1, 0, 1])
def test_room_for_three_layers_less_a_byte(backend: Backend, spare: int) -> None:
    """A byte too little for both experts of a server keeps one of them away; not a byte earlier."""
    small, large = 17_301_504, 34_603_009
    instance = Instance(
        ModelShape("mixed", (0, 1), 1, 1, (small, large)),
        ("a", "b"),
        np.array([[[3.0], [5.0]], [[1.0], [1.0]]]),
        ((small + large + spare,), (10**9,)),
    )
    placement = solve(instance, "ilp", Options(backend=backend))
    assert placement.plan.remote_share == (0.3 if spare < 0 else 0.0)
    assert placement.plan.termination == "optimal"


def test_an_answer_that_never_fits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A back end whose results are a byte too large in both forms is an error of one line."""
    monkeypatch.setattr(ilp, "_fits", lambda instance, result: False)
    with pytest.raises(LimitReached, match="ilp with highs found no placement that fits to the b"):
        solve(tight(4), "ilp")


@pytest.mark.parametrize("room", [0, 5, 1023, 1024, 1025, 2**20, 3 * 2**30 + 7])
def test_digits_say_what_the_sum_says(room: int) -> None:
    """Some carries satisfy all digits exactly if the sum of sizes is at most the room."""
    import pulp

    rng = np.random.default_rng(room)
    size = [int(s) for s in (*rng.integers(1, 2**31, 4), *rng.integers(1, 2000, 3), 1024)]
    problem = pulp.LpProblem("digits", pulp.LpMinimize)
    variables = [problem.add_variable(f"x_{j}", 0, 1, "Integer") for j in range(len(size))]
    ilp._add_capacity_by_digits(problem, variables, size, room, "c")
    for code in range(2 ** len(size)):
        chosen = [code >> j & 1 for j in range(len(size))]
        values = dict(zip([v.name for v in variables], chosen, strict=True))
        fits = True
        for constraint in problem.constraints():
            # what is left of a digit after its terms without its own carry, whose factor is -1
            own = [v for v, factor in constraint.items() if factor == -1]
            used = sum(f * values[v.name] for v, f in constraint.items() if f != -1)
            over = used + constraint.constant
            if own:
                values[own[0].name] = max(int(np.ceil(over)), 0)
                fits &= values[own[0].name] <= own[0].upBound
            else:
                fits &= over <= 0
        assert fits == (sum(s * c for s, c in zip(size, chosen, strict=True)) <= room)


def test_the_reported_case() -> None:
    """Two experts of which the second is twice the first, and a GPU with a byte too little."""
    instance = Instance(
        ModelShape("mixed", (0, 1), 1, 1, (17_301_504, 34_603_008)),
        ("a", "b"),
        np.array([[[3.0], [5.0]], [[1.0], [1.0]]]),
        ((51_904_511,), (100_000_000,)),
    )
    for backend in BACKENDS:
        assert violations(solve(instance, "ilp", Options(backend=backend)), instance=instance) == []
