"""One copy of each expert, spread over servers in proportion to capacity, in index order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from prism_plan.instance import Instance
from prism_plan.solvers.contract import Options, Solver, SolverResult


def proportional_quotas(total: int, capacity: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Split ``total`` into integers proportional to ``capacity`` [N], by largest remainder.

    With ``total`` at most the sum of the capacities no part exceeds its capacity. Ties: lowest
    index.
    """
    capacity_sum = int(capacity.sum())
    if capacity_sum == 0:
        return np.zeros_like(capacity)
    # in integers, so that equal remainders compare equal
    parts = np.array([divmod(total * int(c), capacity_sum) for c in capacity], np.int64)
    quotas: npt.NDArray[np.int64] = parts[:, 0]
    order = np.argsort(-parts[:, 1], kind="stable")
    quotas[order[: total - int(quotas.sum())]] += 1
    return quotas


def uniform_local(instance: Instance) -> npt.NDArray[np.bool_]:
    """Locality of the uniform placement, bool [N, L, E].

    Documented assumption: experts are dealt out one by one in index order; server n's i-th turn
    comes at time (i + ½) / quota[n], so that every stretch of experts is spread in proportion.
    """
    quotas = proportional_quotas(instance.model.num_pairs, instance.slots)
    server = np.repeat(np.arange(instance.num_servers), quotas)
    turn = np.concatenate([(np.arange(q) + 0.5) / max(q, 1) for q in quotas])
    order = np.lexsort((server, turn))
    local = np.zeros((instance.num_servers, instance.model.num_pairs), bool)
    local[server[order], np.arange(instance.model.num_pairs)] = True
    return local.reshape(instance.activations.shape)


def _solve(instance: Instance, options: Options) -> SolverResult:
    return SolverResult(uniform_local(instance))


SOLVER = Solver(
    name="uniform",
    summary="one copy of each expert, dealt over the servers in proportion to their slots",
    guarantee="feasible; blind to activations",
    function=_solve,
)
