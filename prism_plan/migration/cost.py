"""The two sides of a migration, in seconds: remote calls over a horizon, and loading experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.model_spec import ModelSpec
from prism_plan.simulate.network import Network

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

#: T_mig: the sum of all loads, as in the paper, or the maximum over GPUs, which load in parallel.
MigrationCost = Literal["sum", "max"]


def call_seconds(cluster: Cluster, model: ModelSpec) -> Floats:
    """Expected seconds of one remote call of each server, float64 [N].

    One token on idle links, without compute: call overhead, and the mean over the other servers
    of the round trip and the payload both ways. It does not depend on the placement. Zero for a
    single server.

    Raises
    ------
    InputError
        A bandwidth or a time of the links is out of range.
    """
    others = cluster.num_servers - 1
    if not others:
        return np.zeros(1)
    network = Network.of(cluster, model)
    to_others: Floats = network.call_cost_s().sum(axis=1)
    return network.call_overhead_s + to_others / others


def gpu_load_gbs(cluster: Cluster) -> Floats:
    """Load bandwidth of each GPU of all servers in order, GB/s, float64 [G]."""
    return np.array([gpu.load_gbs for server in cluster.servers for gpu in server.gpus], float)


def communication_s(
    rates: Floats,
    local: Bools,
    call_s: Floats,
    horizon_s: float,
    execution: npt.NDArray[np.integer] | None = None,
) -> float:
    """Expected seconds of remote calls over the horizon: C(P) where layers execute at home.

    ``rates`` [N, L, E] in calls per second by home server, ``local`` [N, L, E] whether the server
    that executes the layer holds the expert, ``call_s`` [N] of the server that calls. ``execution``
    [N, L] says which that is, ``None`` that it is the home.
    """
    missed = np.where(local, 0.0, rates)
    if execution is None:
        return float((missed.sum(axis=(1, 2)) * call_s).sum()) * horizon_s
    return float((missed.sum(axis=2) * call_s[execution]).sum()) * horizon_s


def migration_s(
    loads: Bools, expert_bytes: Sequence[int], load_gbs: Floats, how: MigrationCost = "sum"
) -> float:
    """T_mig: seconds of loading experts.

    ``loads`` [G, L, E] what each GPU newly loads, ``expert_bytes`` [L] bytes of an expert of each
    layer, ``load_gbs`` [G].
    """
    per_gpu = loads.sum(axis=2) @ np.asarray(expert_bytes, float) / (load_gbs * 1e9)
    return float(per_gpu.sum() if how == "sum" else per_gpu.max())
