"""Plans whose servers would be busy: queues are no part of the idle time, so a simulation decides.

The idle time of a request lets all homes choose the same server, or the same links. Where a server
would execute layers for more than :data:`IDLE_SHARE` of its time, or calls stay remote, candidates
are compared by short simulations of the trace on the same requests.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.latency.idle_time import IdleTime
from prism_plan.placement import Placement
from prism_plan.simulate.sampling import sample_requests, sample_seeds
from prism_plan.simulate.short_run import short_run
from prism_plan.simulate.user_means import request_weights, users_mean
from prism_plan.token_rates import request_rates
from prism_plan.trace import Trace

#: Share of its time that a server may execute layers before queues are looked at.
IDLE_SHARE = 0.3
#: Samples of requests that are simulated. In each, requests of a server: of large clusters fewer,
#: so many in all.
SAMPLES, SIMULATED_REQUESTS, MAX_SIMULATED = 2, 40, 600


def queues_matter(idle: IdleTime, plan: Placement, cluster: Cluster) -> bool:
    """Whether the idle time alone cannot be trusted to order candidates.

    False where the interval of a server with users is not known: the cluster is planned as idle.
    """
    rates = request_rates(cluster)
    if rates is None:
        return False
    if busiest_share(idle, plan.execution_table, rates) > IDLE_SHARE:
        return True
    return not bool(plan.local_to_execution[idle.has_users].all())


def busiest_share(
    idle: IdleTime, table: npt.NDArray[np.int32], rates: npt.NDArray[np.float64]
) -> float:
    """The largest share of time for which a server would execute layers.

    ``rates`` [N] are requests per second of each home.
    """
    busy = np.zeros(len(rates))
    layers = np.arange(table.shape[1])
    for n in np.flatnonzero(rates).tolist():
        np.add.at(busy, table[n], rates[n] * idle.of_home(n).layer_s[layers, table[n]])
    return float(busy.max())


def simulated_s(
    candidates: Mapping[str, Placement], cluster: Cluster, trace: Trace, seed: int
) -> dict[str, list[float]]:
    """Mean seconds of a user's request under each candidate in each sample, homes by their rates.

    All on the same requests.
    """
    users = sum(server.has_users for server in cluster.servers)
    number = min(SIMULATED_REQUESTS, -(-MAX_SIMULATED // users))
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for own_seed in sample_seeds(seed, SAMPLES):
        requests = sample_requests(trace, cluster, requests_per_server=number, seed=own_seed)
        weights = request_weights(requests)
        for name, placement in candidates.items():
            outcome = short_run(placement, requests, cluster, trace.model)
            found[name].append(users_mean(outcome.done_s - requests.arrival_s, weights))
    return found
