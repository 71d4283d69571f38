"""Plans whose servers would be busy: queues are no part of the idle time, so a simulation decides.

The idle time of a request lets all homes choose the same server, or the same links. Where a server
would execute layers for more than :data:`IDLE_SHARE` of its time, or calls stay remote, candidates
are compared by short simulations of the trace on the same requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.input_limits import MAX_SEED
from prism_plan.instance import Instance
from prism_plan.placement import Placement, SolveReport, server_of_gpu
from prism_plan.simulate.sampling import sample_requests
from prism_plan.simulate.short_run import short_run
from prism_plan.solvers.idle_time import IdleTime
from prism_plan.trace import Trace

#: Share of its time that a server may execute layers before queues are looked at.
IDLE_SHARE = 0.3
#: Samples of requests that are simulated. In each, requests of a server: of large clusters fewer,
#: so many in all.
SAMPLES, SIMULATED_REQUESTS, MAX_SIMULATED = 2, 40, 600


class Candidate(NamedTuple):
    """A plan by what the simulator needs: on_gpu bool [G, L, E], a table int32 [N, L]."""

    on_gpu: npt.NDArray[np.bool_]
    execution: npt.NDArray[np.int32]
    gpu_capacity: tuple[tuple[int, ...], ...]


def queues_matter(idle: IdleTime, plan: Candidate, cluster: Cluster) -> bool:
    """Whether the idle time alone cannot be trusted to order candidates.

    False where the interval of a server with users is not known: the cluster is planned as idle.
    """
    if any(s.has_users and s.arrival_interval_s is None for s in cluster.servers):
        return False
    if busiest_share(idle, plan.execution, cluster) > IDLE_SHARE:
        return True
    owner = server_of_gpu([[0] * len(server.gpus) for server in cluster.servers])
    local = np.zeros((cluster.num_servers, *plan.on_gpu.shape[1:]), bool)
    np.logical_or.at(local, owner, plan.on_gpu)
    at_work = local[plan.execution, np.arange(plan.execution.shape[1])]
    return not bool(at_work[idle.has_users].all())


def busiest_share(idle: IdleTime, table: npt.NDArray[np.int32], cluster: Cluster) -> float:
    """The largest share of time for which a server would execute layers."""
    busy = np.zeros(cluster.num_servers)
    layers = np.arange(table.shape[1])
    for n, server in enumerate(cluster.servers):
        if server.has_users and server.arrival_interval_s is not None:
            seconds = idle.of_home(n).layer_s[layers, table[n]] / server.arrival_interval_s
            np.add.at(busy, table[n], seconds)
    return float(busy.max())


def simulated_s(
    candidates: Mapping[str, Candidate], instance: Instance, cluster: Cluster, trace: Trace,
    seed: int,
) -> dict[str, list[float]]:  # fmt: skip
    """Mean seconds of a request under each candidate in each sample; all on the same requests."""
    users = sum(server.has_users for server in cluster.servers)
    number = min(SIMULATED_REQUESTS, -(-MAX_SIMULATED // users))
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for sample in range(SAMPLES):
        requests = sample_requests(
            trace, cluster, requests_per_server=number, seed=(seed + sample) % MAX_SEED
        )
        for name, (on_gpu, execution, capacity) in candidates.items():
            placement = Placement(
                instance.model, instance.servers, capacity, on_gpu, SolveReport("candidate"),
                execution=execution,
            )  # fmt: skip
            outcome = short_run(placement, requests, cluster, trace.model)
            found[name].append(float(np.mean(outcome.done_s - requests.arrival_s)))
    return found
