"""Token rates of a cluster's users, and the expert calls per second that a trace predicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.deprecated_names import renamed_parameters
from prism_plan.errors import InputError, did_you_mean
from prism_plan.trace import Trace


@dataclass(frozen=True, eq=False)
class TokenRates:
    """Tokens per second of each task at each server.

    ``rates`` is float64 [N, tasks], read-only. Where servers give a ``weight``, rates are
    relative to it instead of per second.
    """

    tasks: tuple[str, ...]
    rates: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        self.rates.setflags(write=False)


def require_users(cluster: Cluster, *, counts_only: bool = False) -> None:
    """Refuse a cluster without users, for which every placement is as good as any other.

    Single servers may be without users. With a ``counts_only`` trace arrival rates are not enough:
    each server with tasks needs a weight.

    Raises
    ------
    InputError
        No server has tasks, one with tasks has neither an arrival rate nor a weight (or no weight
        where that is needed), or the weight of every server with tasks is 0.
    """
    users = [n for n, server in enumerate(cluster.servers) if server.has_users]
    if not users:
        raise InputError(
            "no server has tasks, so no expert is called",
            place="server",
            expected="users of at least one server",
            remedy="give it tasks = { TASK = 1.0 }, and arrival_interval_s or weight",
        )
    for n in users:
        if cluster.servers[n].weight is None:
            if counts_only:
                raise _missing_weight(cluster, n)
            if cluster.servers[n].arrival_interval_s is None:
                raise _missing_rate(cluster, n)
    if all(cluster.servers[n].weight == 0 for n in users):
        raise InputError(
            "0, as of every server with tasks, so no expert is called",
            place=f"server[{users[0]}].weight",
            expected="a weight above 0 of at least one server with tasks",
        )


def _missing_rate(cluster: Cluster, server: int) -> InputError:
    return InputError(
        f"server {cluster.servers[server].name!r} has tasks but no arrival rate",
        place=f"server[{server}]",
        expected="arrival_interval_s (mean seconds between requests) or weight",
    )


def _missing_weight(cluster: Cluster, server: int) -> InputError:
    """Name all that a counts-only trace requires at once: the simulator needs arrivals too."""
    no_rate = cluster.servers[server].arrival_interval_s is None
    return InputError(
        f"server {cluster.servers[server].name!r} has tasks but no weight"
        + (" and no arrival_interval_s" if no_rate else ""),
        place=f"server[{server}]",
        expected="weight, a relative token rate, for a counts-only trace has no tokens per request"
        + ("; to simulate also arrival_interval_s" if no_rate else ""),
        remedy="give weight = 1.0 to servers that serve equally many tokens",
    )


def expected_token_rates(trace: Trace, cluster: Cluster) -> TokenRates:
    """Token rates of a cluster's users, with the mean tokens of a request from a trace.

    These are r·s_t·m_t of docs/design.md, section 1; ``weight`` replaces their sum over t.

    Raises
    ------
    InputError
        A server names a task that the trace does not have, or one without tokens; a server has
        no arrival rate, or no ``weight`` with a counts-only trace.
    """
    rates = np.zeros((cluster.num_servers, len(trace.tasks)))
    mean_tokens = trace.mean_tokens()
    for n, server in enumerate(cluster.servers):
        shares = shares_by_task(trace, server.tasks, f"server[{n}].tasks")
        tokens = shares * mean_tokens
        if not tokens.any():
            continue
        if server.weight is not None:
            rates[n] = server.weight * tokens / tokens.sum()
        elif trace.kind == "counts":
            raise _missing_weight(cluster, n)
        elif server.arrival_interval_s is None:
            raise _missing_rate(cluster, n)
        else:
            rates[n] = tokens / server.arrival_interval_s
    return TokenRates(trace.tasks, rates)


def request_rates(cluster: Cluster) -> npt.NDArray[np.float64] | None:
    """Requests per second of each server, float64 [N], 0 without users.

    ``None`` where a server with users has no ``arrival_interval_s``.
    """
    rates = np.zeros(cluster.num_servers)
    for n, server in enumerate(cluster.servers):
        if server.has_users:
            if server.arrival_interval_s is None:
                return None
            rates[n] = 1 / server.arrival_interval_s
    return rates


def shares_by_task(trace: Trace, tasks: Mapping[str, float], place: str) -> npt.NDArray[np.float64]:
    """A server's shares of requests in the order of the trace's tasks, float64 [tasks].

    Raises
    ------
    InputError
        Names a task that the trace does not have, or one without tokens.
    """
    shares = np.zeros(len(trace.tasks))
    index_of = {task: index for index, task in enumerate(trace.tasks)} if tasks else {}
    for task, share in tasks.items():
        if task not in index_of:
            raise InputError(
                f"unknown task {task!r}{did_you_mean(task, trace.tasks)}",
                place=place,
                expected=f"tasks of {trace.name or 'the trace'}: {', '.join(trace.tasks)}",
            )
        index = index_of[task]
        if share > 0 and trace.tokens[index] == 0:
            raise InputError(
                f"task {task!r} has no tokens in {trace.name or 'the trace'}",
                place=place,
                remedy="leave it out, or profile it",
            )
        shares[index] = share
    return shares


@renamed_parameters(load="token_rates")
def activations(trace: Trace, token_rates: TokenRates) -> npt.NDArray[np.float64]:
    """Expected calls per second of each expert by each server, f[n, l, e], float64 [N, L, E]."""
    calls_per_token = trace.calls_per_token()
    calls: npt.NDArray[np.float64] = np.einsum("nt,tle->nle", token_rates.rates, calls_per_token)
    return calls
