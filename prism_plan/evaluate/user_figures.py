"""What a plan means for a user, and whether servers would be faster without it, by simulation.

Short simulations of the trace that was planned on, all on requests of the same seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.errors import PrismError
from prism_plan.evaluate.offload_baseline import offload_placement
from prism_plan.evaluate.simulation import simulate_placements
from prism_plan.instance import Instance
from prism_plan.placement import Placement
from prism_plan.simulate.network import Network
from prism_plan.simulate.report import summary
from prism_plan.simulate.sampling import sample_requests, sample_seeds
from prism_plan.simulate.user_means import request_weights, users_mean
from prism_plan.token_rates import request_rates, shares_by_task
from prism_plan.trace import Trace

Floats = npt.NDArray[np.float64]

#: Samples, and requests of a server in each; of large clusters fewer, so many in all.
SAMPLES, REQUESTS, MAX_REQUESTS = 2, 40, 600
#: Solvers choose between plans by samples of lower numbers. What is best there is partly so by
#: chance, so that figures come from requests that nothing was chosen by.
FIRST_SAMPLE = 100


@dataclass(frozen=True)
class UserFigures:
    """Means over users' requests: seconds until the answer is complete and until its first token.

    Each home counts by its arrival rate, its share in all requests. ``tokens_per_s`` is the speed
    at which a user sees tokens after the first, ``None`` where answers have one token.
    """

    latency_s: float
    ttft_s: float
    tokens_per_s: float | None


def user_figures(
    placements: Sequence[tuple[str, Placement]], cluster: Cluster, trace: Trace, seed: int = 0
) -> dict[str, UserFigures]:
    """Figures for users under each placement, by name.

    Of requests with seeds from ``seed`` + :data:`FIRST_SAMPLE` on.

    Raises
    ------
    InputError
        A server with users has no arrival interval; see ``simulate_placements``.
    """
    users = sum(server.has_users for server in cluster.servers)
    number = min(REQUESTS, -(-MAX_REQUESTS // max(users, 1)))
    found: dict[str, list[Mapping[str, float | None]]] = {name: [] for name, _ in placements}
    for own_seed in sample_seeds(seed, FIRST_SAMPLE + SAMPLES)[FIRST_SAMPLE:]:
        requests = sample_requests(trace, cluster, requests_per_server=number, seed=own_seed)
        simulation = simulate_placements(list(placements), requests, trace, cluster)
        if simulation.interrupted:  # figures of a part would look like those of all
            raise KeyboardInterrupt
        weights = request_weights(requests)
        for run in simulation.runs:
            run.require_littles_law()
            found[run.placement].append(
                {
                    "latency": _mean_s(run.latency_s, weights),
                    "ttft": _mean_s(run.ttft_s, weights),
                    "tpot": _mean_s(run.tpot_s, weights),
                }
            )
    figures = {}
    for name, runs in found.items():
        tpot = [run["tpot"] for run in runs if run["tpot"]]
        figures[name] = UserFigures(
            latency_s=mean(run["latency"] or 0.0 for run in runs),
            ttft_s=mean(run["ttft"] or 0.0 for run in runs),
            tokens_per_s=1 / mean(tpot) if tpot else None,
        )
    return figures


def _mean_s(times_s: Floats, weights: Floats | None) -> float | None:
    """The mean of finite times [R], by weights where they differ; ``None`` where none is finite."""
    if weights is None:
        return summary(times_s)["mean"]
    finite = np.isfinite(times_s)
    return users_mean(times_s[finite], weights[finite]) if finite.any() else None


def without_plan(cluster: Cluster, trace: Trace, seed: int = 0) -> dict[str, UserFigures]:
    """Figures where no server calls another: each for itself, or one of them for all.

    Experts that do not fit are loaded from host memory when they are called (`offload`). The one
    for all is the server with the most memory for experts; the messages that reach it and bring the
    first token's id home count with each request, and it may not serve users of other servers that
    have ``execute_at_home``. Empty where arrival rates are not known, or experts differ in size.

    Raises
    ------
    InputError
        A figure of the cluster is wrong.
    """
    rates = request_rates(cluster)
    if rates is None or not trace.model.equal_expert_bytes:
        return {}
    found: dict[str, UserFigures] = {}
    one, reach_s = _one_for_all(cluster, trace)
    without = [
        ("each server for itself", cluster, 0.0),
        (f"{one.servers[0].name} for all", one, reach_s),
    ]
    if any(
        server.execute_at_home and server.has_users and server.name != one.servers[0].name
        for server in cluster.servers
    ):
        del without[1]
    for name, alone, more_s in without:
        try:
            instance = Instance.build(trace, alone)
            if not all(instance.slots):
                continue
            plan = offload_placement(instance)
            figures = user_figures([("offload", plan)], alone, trace, seed)["offload"]
        except PrismError:  # it does not fit
            continue
        found[name] = dataclasses.replace(
            figures, latency_s=figures.latency_s + more_s, ttft_s=figures.ttft_s + more_s
        )
    return found


def _one_for_all(cluster: Cluster, trace: Trace) -> tuple[Cluster, float]:
    """The server with the most memory for experts, with the users of all.

    Also the mean seconds that messages to it and from it take of a request.
    """
    rates = request_rates(cluster)
    assert rates is not None
    by_task = sum(
        rate * shares_by_task(trace, server.tasks, "tasks")
        for rate, server in zip(rates, cluster.servers, strict=True)
        if server.has_users
    )
    instance = Instance.of_cluster(cluster, trace.model, reserve_kv=False)
    largest = max(range(len(rates)), key=lambda n: (sum(instance.gpu_capacity[n]), -n))
    tasks = {task: float(by_task[i]) for i, task in enumerate(trace.tasks) if by_task[i] > 0}
    total = sum(tasks.values())
    server = dataclasses.replace(
        cluster.servers[largest],
        tasks={task: share / total for task, share in tasks.items()},
        arrival_interval_s=float(1 / rates.sum()),
        weight=None if cluster.servers[largest].weight is None else 1.0,
        concurrency=sum(s.concurrency for s in cluster.servers if s.has_users),
        kv_tokens=sum(s.kv_tokens for s in cluster.servers),
    )
    network = Network.of(cluster, trace.model)
    there_s = network.half_rtt_s + network.hop_overhead_s
    both_s = there_s[:, largest] + there_s[largest]
    both_s[largest] = 0.0
    reach_s = float(rates @ both_s / rates.sum())
    return dataclasses.replace(cluster, servers=(server,), pair_links=()), reach_s
