"""The requests behind recent calls: of which tasks, how many, and what their messages cost.

Reviews of execution tables need them (docs/design.md, sections 5 and 10), and have only counts of
expert calls by home server. The tasks of a home are the mixture of the trace's tasks that makes its
calls most likely; how long a request is, and what its messages between servers cost, is the mean
over prompts of these tasks, as solvers ``NAME+paths`` measure it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.latency.idle_time import IdleTime, idle_time
from prism_plan.trace import Trace

Floats = npt.NDArray[np.float64]

#: Steps of expectation maximisation, after which shares are right within one or two hundredths.
STEPS = 200
#: Tasks with fewer tokens of a home, as a share of its most frequent task's, are not asked for.
LEAST_SHARE = 0.01
#: Homes with fewer requests, as a share of the home with most of them, have no users: a window
#: forgets them step by step, and tables are not planned for them.
LEAST_ARRIVALS = 1e-4


@dataclass(frozen=True, eq=False)
class RecentRequests:
    """What was asked for recently: ``arrivals`` [N] requests per second of each home server.

    ``cluster`` has the estimated tasks and arrivals of its servers; those with hardly any have no
    users.
    ``idle`` is the measure of a mean request of each home, ``None`` where nobody called anything.
    """

    cluster: Cluster
    arrivals: Floats
    idle: IdleTime | None

    def messages_s(self, execution: npt.NDArray[np.integer] | None, horizon_s: float) -> float:
        """Seconds of hidden states and token ids of the requests expected within the horizon.

        ``execution`` [N, L] is the execution table, ``None`` where layers execute at home.
        """
        if execution is None or self.idle is None:
            return 0.0
        return float((self.arrivals * self.idle.messages_s(execution)).sum()) * horizon_s


def requests_behind(
    rates: Floats, cluster: Cluster, trace: Trace, on_gpu: npt.NDArray[np.bool_], seed: int = 0
) -> RecentRequests:
    """The requests behind calls per second [N, L, E].

    A home's requests per second are its calls / (L · top_k) / mean tokens of a request. ``on_gpu``
    bool [G, L, E] is the placement whose experts the measure counts; messages do not depend on it.
    """
    shares = task_shares(rates, trace)
    servers = [
        dataclasses.replace(
            server,
            tasks={task: share for task, share in zip(trace.tasks, row, strict=True) if share},
        )
        for server, row in zip(cluster.servers, shares.tolist(), strict=True)
    ]
    recent = dataclasses.replace(cluster, servers=tuple(servers))
    if not shares.any():
        return RecentRequests(recent, np.zeros(len(servers)), None)
    idle = idle_time(on_gpu, trace.model, recent, trace, seed)
    tokens_per_s = rates.sum(axis=(1, 2)) / (trace.model.num_layers * trace.model.top_k)
    known = idle.tokens > 0
    arrivals = np.where(known, tokens_per_s / np.where(known, idle.tokens, 1.0), 0.0)
    servers = [
        dataclasses.replace(server, arrival_interval_s=1 / rate, weight=None)
        if rate > LEAST_ARRIVALS * arrivals.max()
        else dataclasses.replace(server, tasks={})
        for server, rate in zip(servers, arrivals.tolist(), strict=True)
    ]
    recent = dataclasses.replace(recent, servers=tuple(servers))
    return RecentRequests(recent, arrivals, idle)


def task_shares(rates: Floats, trace: Trace) -> Floats:
    """Shares of the trace's tasks in the requests behind calls [N, L, E], by home, float64 [N, T].

    The likeliest mixture of the tasks' calls per token, by expectation maximisation; of tasks that
    call the same experts none is told from the other. Zero for a home without calls, or whose
    experts no task of the trace calls.
    """
    calls = trace.calls_per_token().reshape(len(trace.tasks), -1)
    tokens = trace.mean_tokens()
    shares = np.zeros((len(rates), len(calls)))
    for home, counted in enumerate(rates.reshape(len(rates), -1)):
        pairs = np.flatnonzero((counted > 0) & (calls.sum(axis=0) > 0))
        if not len(pairs):
            continue
        likely, weight = calls[:, pairs], counted[pairs] / counted[pairs].max()
        mixture = calls.any(axis=1).astype(float)
        for _ in range(STEPS):
            expected = mixture @ likely
            mixture = mixture * (likely @ (weight / np.maximum(expected, 1e-300)))
            mixture /= mixture.sum()
        mixture[mixture < LEAST_SHARE * mixture.max()] = 0.0
        of_requests = mixture / np.where(tokens > 0, tokens, 1.0)
        shares[home] = of_requests / of_requests.sum()
    return shares
