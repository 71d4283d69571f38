"""One copy of each expert, spread over servers in proportion to capacity, in index order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from prism_plan.instance import Instance
from prism_plan.solvers.contract import Answer, Options, Solver


def proportional_quotas(total: int, capacity: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """``total`` in whole parts proportional to ``capacity`` [N], by largest remainder.

    With ``total`` at most the sum of the capacities no part exceeds its capacity. Ties: lowest
    index.
    """
    everything = int(capacity.sum())
    if everything == 0:
        return np.zeros_like(capacity)
    # whole-number arithmetic, so that remainders that are equal compare equal
    parts = [divmod(total * int(c), everything) for c in capacity]
    quotas = np.array([whole for whole, _ in parts], np.int64)
    order = sorted(range(len(parts)), key=lambda n: (-parts[n][1], n))
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


def _solve(instance: Instance, options: Options) -> Answer:
    return Answer(uniform_local(instance))


SOLVER = Solver(
    name="uniform",
    summary="one copy of each expert, dealt over the servers in proportion to their slots",
    guarantee="feasible; blind to activations",
    function=_solve,
)
