"""Repairs where experts differ in size: one integer program for each goal, in their order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import Infeasible, LimitReached
from prism_plan.instance import Instance
from prism_plan.instance_feasibility import require_feasible
from prism_plan.placement import Placement, server_of_gpu

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

#: Part of the largest expert by which a capacity is lowered where a result exceeds it by rounding.
MARGIN = 1e-5
#: Share of a sum of calls within which two are taken for equal.
TOLERANCE = 1e-7
#: The status of `scipy.optimize.milp` where no point satisfies the constraints.
INFEASIBLE = 2


def repair_unequal_sizes(
    held: Placement, instance: Instance, calls: Floats, *, partly: bool
) -> Bools:
    """What each GPU holds after the repair, bool [G, L, E].

    ``calls`` [N, L, E] are those that dropped copies would serve; see
    :func:`~prism_plan.migration.repair.repair_placement`. A copy that changes its GPU is loaded.

    Raises
    ------
    Infeasible
        Not every expert can have its replicas (without ``partly``), or the pins do not fit.
    LimitReached
        The back end found no result, or none that fits to the byte.
    """
    if not partly:
        require_feasible(instance)
    size = np.repeat(instance.expert_size, instance.model.num_experts)
    capacity = np.array([cap for gpus in instance.gpu_capacity for cap in gpus], np.int64)
    lowered = np.zeros(len(capacity))
    for _ in range(3):
        program = _Program(held, instance, calls, lowered, partly=partly)
        on_gpu = program.solve()
        exceeded = on_gpu @ size > capacity
        if not exceeded.any():
            return on_gpu.reshape(held.on_gpu.shape)
        lowered += MARGIN * exceeded
    raise LimitReached("found no repair that fits to the byte; give the GPUs a little more memory")


class _Program:
    """The repair as an integer program that is solved goal by goal.

    Variables: whether a GPU holds a pair, [G, J]; then for each pair how many of its replicas are
    missing, [J], and whether nobody holds it, [J].
    """

    def __init__(
        self, held: Placement, instance: Instance, calls: Floats, lowered: Floats, *, partly: bool
    ) -> None:
        servers, pairs = instance.num_servers, instance.model.num_pairs
        self._server = server_of_gpu(instance.gpu_capacity)
        self._shape = len(self._server), pairs
        self._held = held.on_gpu.reshape(self._shape)
        self._on_server = held.local.reshape(servers, pairs)
        self._calls = calls.reshape(servers, pairs)
        self._partly = partly
        self._replicas = min(instance.min_replicas, servers) if partly else instance.min_replicas
        self._rows, self._low, self._high = self._constraints(instance, lowered)

    def _constraints(self, instance: Instance, lowered: Floats) -> tuple[Any, Floats, Floats]:
        """Rows over all variables, and the least and the most of each."""
        from scipy import sparse

        servers, (gpus, pairs) = instance.num_servers, self._shape
        layers, experts = instance.model.num_layers, instance.model.num_experts
        each_pair = sparse.eye_array(pairs)
        of_server = (self._server == np.arange(servers)[:, None]).astype(float)
        anywhere = sparse.kron(np.ones((1, gpus)), each_pair)
        # bytes in units that all sizes are multiples of, and numbers near one
        size = np.repeat(instance.expert_size, experts)
        unit = math.gcd(*size.tolist())
        largest = int(size.max()) // unit
        room = [cap // unit / largest for caps in instance.gpu_capacity for cap in caps]
        pinned = instance.mask(instance.pinned).astype(float).ravel()
        allowed = (~instance.mask(instance.forbidden)).astype(float).ravel()
        layer = sparse.kron(sparse.eye_array(layers), np.ones((1, experts)))
        rows = [
            [sparse.kron(of_server, each_pair), None, None],
            [anywhere, each_pair, None],
            [anywhere, None, each_pair],
            [sparse.kron(sparse.eye_array(gpus), (size // unit / largest)[None]), None, None],
            [sparse.kron(of_server, layer), None, None],
        ]
        no_limit = np.full(servers * layers, -np.inf)
        low = [
            pinned,
            np.full(pairs, self._replicas),
            np.ones(pairs),
            np.full(gpus, -np.inf),
            no_limit,
        ]
        high = [
            allowed,
            np.full(pairs, np.inf),
            np.full(pairs, np.inf),
            np.array(room) - lowered,
            np.repeat(instance.max_per_layer, layers).astype(float),
        ]
        return sparse.block_array(rows).tocsr(), np.concatenate(low), np.concatenate(high)

    def solve(self) -> Bools:
        """What each GPU holds, bool [G, J]."""
        required = np.ones(self._shape[1], bool)
        if self._partly:
            required &= self._on_server.any(axis=0)
        try:
            return self._by_goals(required)
        except Infeasible:
            if not self._partly:
                raise
            return self._by_goals(np.zeros_like(required))  # rules take some expert's last copy

    def _by_goals(self, required: Bools) -> Bools:
        """The same where the ``required`` pairs [J] are held somewhere."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        gpus, pairs = self._shape
        missing = np.full(pairs, self._replicas if self._partly else 0)
        most = np.concatenate([np.ones(gpus * pairs), missing, ~required])
        constraints = [LinearConstraint(self._rows, self._low, self._high)]
        x = None
        for cost, slack in self._goals():
            result = milp(
                cost,
                constraints=constraints,
                bounds=Bounds(0, most),
                integrality=np.ones(len(cost)),
                options={"mip_rel_gap": 0.0},
            )
            if result.status == INFEASIBLE:
                raise Infeasible(
                    "no packing of whole experts onto the GPUs has the wanted replicas and keeps "
                    "the rules",
                    shortfall=1,
                    unit="experts at least",
                    remedy="add memory, or lower ``min_replicas``",
                )
            if result.x is None:
                raise LimitReached(f"found no repair: {result.message}")
            x = np.rint(result.x)
            constraints.append(LinearConstraint(cost[None], -np.inf, float(cost @ x) + slack))
        assert x is not None
        found: Bools = x[: gpus * pairs].reshape(gpus, pairs) > 0
        return found

    def _goals(self) -> list[tuple[Floats, float]]:
        """What is minimised, one after the other, and by how much later goals may exceed it."""
        gpus, pairs = self._shape
        none = np.zeros(pairs)
        calls = np.where(self._on_server, self._calls, 0.0)
        dropped = calls / (calls.max(initial=0.0) or 1.0)
        loads = np.concatenate([~self._held.ravel(), none, none]).astype(float)
        kept_calls = np.concatenate([dropped[self._server].ravel(), none, none])
        kept = np.concatenate([self._on_server[self._server].ravel(), none, none]).astype(float)
        goals = [
            (loads, 0.5),
            (-kept_calls, TOLERANCE * max(float(dropped.sum()), 1.0)),
            (-kept, 0.5),
        ]
        if self._partly:
            nothing = np.zeros(gpus * pairs)
            nowhere = np.concatenate([nothing, none, np.ones(pairs)])
            missing = np.concatenate([nothing, np.ones(pairs), none])
            goals = [(nowhere, 0.5), (missing, 0.5), *goals]
        return goals
