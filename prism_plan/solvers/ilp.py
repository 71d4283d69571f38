"""The planning problem as an integer program in PuLP, which also takes experts of unequal size.

Back ends: HiGHS and the CBC that comes with PuLP. Both satisfy a constraint within a tolerance of
about 1e-6, which is some bytes where experts have millions of them. So a result is checked in
integers; one that holds a byte too much is rejected, and the problem is solved once more with the
capacities written digit by digit, where a tolerance of 1e-6 is far below one byte.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import Infeasible, LimitReached
from prism_plan.exact_sum import exact_sum
from prism_plan.instance import Instance
from prism_plan.instance_feasibility import explain_infeasible
from prism_plan.placement import server_of_gpu
from prism_plan.solvers.contract import Feature, Options, Solver, SolverResult
from prism_plan.solvers.packing import reference_local
from prism_plan.solvers.pulp_backend import solve_problem

#: A gap of this share of all calls is rounding of the back ends, not distance from the optimum.
TOLERANCE = 1e-7
#: Bits of a digit of the capacities in bytes: 2**-10 is a thousand times a back end's tolerance.
DIGIT_BITS = 10
#: The objective's largest weight after scaling, far above the back ends' absolute tolerances.
MAX_WEIGHT = 1000.0


def _solve(instance: Instance, options: Options) -> SolverResult:
    value = instance.activations
    if options.reference is not None:
        loaded = ~reference_local(instance, options.reference)
        # breaks ties for fewer loads; too small to outweigh any saving that matters
        tie_break = 1e-9 * float(value.max())
        value = value - max(options.load_price, tie_break) * loaded
    scale = MAX_WEIGHT / (float(np.abs(value).max()) or 1.0)
    result = _solve_to_the_byte(instance, value * scale, options)
    local = result.local
    if result.infeasible:
        if instance.in_slots:
            explain_infeasible(instance)
        raise Infeasible(
            "no packing of whole experts onto the GPUs covers every expert",
            shortfall=1,
            unit="experts at least",
            remedy="add memory",
        )
    if local is None:
        limit = (
            f"{options.time_limit_s:g} s" if options.time_limit_s else "the back end's own limit"
        )
        other = " or use solver exact" if instance.in_slots else ""
        raise LimitReached(
            f"ilp with {options.backend} found no placement within {limit} "
            f"({result.status}); raise ``time_limit_s``{other}"
        )
    total = exact_sum(instance.activations)
    if options.reference is not None:  # the tie-break is no part of the objective
        value = instance.activations - options.load_price * loaded
    objective = total - exact_sum(value[local])
    lower = -math.inf if result.bound is None else total + result.bound / scale
    gap = max(objective - lower, 0.0)
    optimal = result.finished and gap <= TOLERANCE * max(total, abs(objective))
    extra: dict[str, Any] = {"backend": options.backend}
    if not optimal and math.isfinite(gap):
        extra["gap"] = gap / abs(objective) if objective else gap
    return SolverResult(
        local=local,
        termination="optimal" if optimal else "time_limit",
        bound=objective if optimal else (lower if math.isfinite(lower) else None),
        on_gpu=result.on_gpu,
        extra=extra,
    )


@dataclass(frozen=True, eq=False)
class _BackendResult:
    """How one run of a back end ended, with PuLP's name of its ``status``.

    ``local`` bool [N, L, E] and ``on_gpu`` bool [G, L, E] are its best placement or ``None``
    (``on_gpu`` always where experts are of one size). ``bound`` is a proven lower bound on the
    scaled objective, ``finished`` whether the search ended by itself.
    """

    infeasible: bool
    finished: bool
    status: str
    local: npt.NDArray[np.bool_] | None
    on_gpu: npt.NDArray[np.bool_] | None
    bound: float | None


def _solve_to_the_byte(
    instance: Instance, value: npt.NDArray[np.float64], options: Options
) -> _BackendResult:
    """Minimise −Σ value·x by a back end, with a result that fits the GPUs to the byte.

    Raises
    ------
    LimitReached
        The result does not fit even where a byte is far more than the back end's tolerance.
    """
    begin = time.monotonic()
    for by_digits in (False, True):
        result = _run_backend(instance, value, options, by_digits=by_digits)
        if _fits(instance, result):
            return result
        if options.time_limit_s is not None:
            left_s = max(options.time_limit_s - (time.monotonic() - begin), 1e-3)
            options = dataclasses.replace(options, time_limit_s=left_s)
    other = "cbc" if options.backend == "highs" else "highs"
    raise LimitReached(
        f"ilp with {options.backend} found no placement that fits to the byte; "
        f"use ``backend`` {other}, or give the GPUs a little more memory"
    )


def _run_backend(
    instance: Instance, value: npt.NDArray[np.float64], options: Options, *, by_digits: bool
) -> _BackendResult:
    """Run the back end once; see :func:`_build_problem`."""
    import pulp

    problem, variables, gpu_variables = _build_problem(instance, value, by_digits=by_digits)
    bound = solve_problem(problem, options)
    status = problem.sol_status
    local = on_gpu = None
    if status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        local = _binary_values(variables, instance)
        if local is not None and gpu_variables is not None:
            on_gpu = _binary_values(gpu_variables, instance)
            local = None if on_gpu is None else local
    return _BackendResult(
        # what CBC calls "integer infeasible" PuLP calls no solution found, and infeasible
        infeasible=status == pulp.LpSolutionInfeasible
        or (local is None and problem.status == pulp.LpStatusInfeasible),
        finished=status == pulp.LpSolutionOptimal and problem.status == pulp.LpStatusOptimal,
        status=pulp.LpSolution[status],
        local=local,
        on_gpu=on_gpu,
        bound=bound,
    )


def _fits(instance: Instance, result: _BackendResult) -> bool:
    """Whether no GPU holds a byte too much, in integers; true where there is no placement."""
    if result.on_gpu is None:
        return True
    used = result.on_gpu.sum(axis=2) @ instance.expert_size
    return bool((used <= list(itertools.chain(*instance.gpu_capacity))).all())


def _build_problem(
    instance: Instance, value: npt.NDArray[np.float64], *, by_digits: bool
) -> tuple[Any, Any, Any]:
    """Minimise −Σ value·x. Variables x[n][j], and per GPU z[g][j] where experts differ in size.

    ``by_digits`` writes the capacities of GPUs in bytes digit by digit.
    """
    import pulp

    servers, layers, experts = value.shape
    pairs = layers * experts
    pinned = instance.mask(instance.pinned).reshape(servers, pairs)
    forbidden = instance.mask(instance.forbidden).reshape(servers, pairs)
    flat = value.reshape(servers, pairs).tolist()
    problem = pulp.LpProblem("placement", pulp.LpMinimize)
    x = [
        [
            problem.add_variable(
                f"x_{n}_{j}", int(pinned[n, j]), int(not forbidden[n, j]), "Integer"
            )
            for j in range(pairs)
        ]
        for n in range(servers)
    ]
    problem += pulp.LpAffineExpression(
        [(x[n][j], -flat[n][j]) for n in range(servers) for j in range(pairs)]
    )
    for j in range(pairs):
        num_replicas = pulp.LpAffineExpression([(x[n][j], 1) for n in range(servers)])
        problem += num_replicas >= instance.min_replicas
    for n, cap in enumerate(instance.layer_caps):
        for layer in range(layers if cap is not None else 0):
            held = x[n][layer * experts : (layer + 1) * experts]
            problem += pulp.LpAffineExpression([(v, 1) for v in held]) <= cap
    if instance.in_slots:
        for n, slots in enumerate(instance.slots.tolist()):
            problem += pulp.LpAffineExpression([(v, 1) for v in x[n]]) <= slots
        return problem, x, None
    # bytes in units of their greatest common divisor: only whole units of a capacity are of use
    unit = math.gcd(*instance.expert_size.tolist())
    size = np.repeat(instance.expert_size // unit, experts).tolist()
    server_of = server_of_gpu(instance.gpu_capacity).tolist()
    capacities = [capacity // unit for gpus in instance.gpu_capacity for capacity in gpus]
    z = [
        [problem.add_variable(f"z_{g}_{j}", 0, 1, "Integer") for j in range(pairs)]
        for g in range(len(server_of))
    ]
    for g, capacity in enumerate(capacities):
        if by_digits:
            _add_capacity_by_digits(problem, z[g], size, capacity, f"c_{g}")
            continue
        largest = max(size)  # in units of the largest expert the numbers are near one
        used = pulp.LpAffineExpression([(z[g][j], size[j] / largest) for j in range(pairs)])
        problem += used <= capacity / largest
    for n in range(servers):
        gpus = [g for g in range(len(server_of)) if server_of[g] == n]
        for j in range(pairs):
            problem += pulp.LpAffineExpression([(z[g][j], 1) for g in gpus]) == x[n][j]
    return problem, x, z


def _add_capacity_by_digits(
    problem: Any, variables: Sequence[Any], size: Sequence[int], capacity: int, name: str
) -> None:
    """Add Σ size·variable ≤ capacity as one constraint for each digit of the sizes, base B.

    With size = high·B + low and capacity likewise, the sum fits iff an integer carry c has
    Σ low·variable ≤ capacity_low + B·c and Σ high·variable + c ≤ capacity_high; the second is split
    again while it has several digits. Divided by B, a power of two, the coefficients are exact, at
    most one and integer multiples of 1/B, so that no sum can lie between two of them.
    """
    import pulp

    base = 1 << DIGIT_BITS
    carry: list[Any] = []  # the variable of the carry from the previous digit, if there is one
    max_carry = 0
    for digit in itertools.count():
        last = max(size) < base
        low = list(size) if last else [s % base for s in size]
        terms = [(v, s / base) for v, s in zip(variables, low, strict=True)]
        terms += [(variable, 1 / base) for variable in carry]
        if last:
            problem += pulp.LpAffineExpression(terms) <= capacity / base
            return
        max_carry = (sum(low) + max_carry) // base + 1
        carry = [problem.add_variable(f"{name}_{digit}", 0, max_carry, "Integer")]
        problem += pulp.LpAffineExpression([*terms, (carry[0], -1)]) <= (capacity % base) / base
        size, capacity = [s // base for s in size], capacity // base


def _binary_values(variables: Any, instance: Instance) -> npt.NDArray[np.bool_] | None:
    """Which variables are 1, bool [N or G, L, E]; ``None`` if some are neither 0 nor 1."""
    values = [[variable.value() for variable in row] for row in variables]
    if any(value is None for row in values for value in row):
        return None
    array = np.array(values, np.float64).reshape(len(variables), *instance.activations.shape[1:])
    if np.abs(array - np.rint(array)).max() > 1e-5:
        return None
    return array > 0.5


SOLVER = Solver(
    name="ilp",
    summary="integer program in PuLP (HiGHS or CBC), for small and medium clusters",
    guarantee="optimal, or the gap that a time limit left; experts of unequal size too",
    function=_solve,
    supports=frozenset(Feature),
)
