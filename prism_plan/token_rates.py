"""What a cluster's users ask for, by a trace: token rates and expected expert calls per server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
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
    """Refuse a cluster that nothing can be planned for, whatever the trace is.

    With ``counts_only`` traces arrival rates do not help: each server with tasks needs a weight.

    Without users every placement is as good as any other, and "0 % remote" would say nothing.
    Single servers may be without users.

    Raises
    ------
    InputError
        No server has tasks, one with tasks has neither an arrival rate nor a weight (or no weight
        where that is needed), or the weight of every server with tasks is 0.
    """
    users = [n for n, server in enumerate(cluster.servers) if server.has_users]
    if not users:
        raise InputError(
            "no server has tasks, so nobody asks for an expert",
            place="server",
            expected="users of at least one server",
            remedy="give it tasks = { TASK = 1.0 }, and arrival_interval_s or weight",
        )
    for n in users:
        if cluster.servers[n].weight is None:
            if counts_only:
                raise _without_weight(cluster, n)
            if cluster.servers[n].arrival_interval_s is None:
                raise _without_rate(cluster, n)
    if all(cluster.servers[n].weight == 0 for n in users):
        raise InputError(
            "0, as of every server with tasks, so nobody asks for an expert",
            place=f"server[{users[0]}].weight",
            expected="a weight above 0 of at least one server with tasks",
        )


def _without_rate(cluster: Cluster, server: int) -> InputError:
    return InputError(
        f"server {cluster.servers[server].name!r} has tasks but no arrival rate",
        place=f"server[{server}]",
        expected="arrival_interval_s (mean seconds between requests) or weight",
    )


def _without_weight(cluster: Cluster, server: int) -> InputError:
    """What a counts-only trace asks for, all at once: the simulator needs arrivals too."""
    known = cluster.servers[server].arrival_interval_s
    return InputError(
        f"server {cluster.servers[server].name!r} has tasks but no weight"
        + ("" if known is not None else " and no arrival_interval_s"),
        place=f"server[{server}]",
        expected="weight, a relative token rate, for a counts-only trace tells no tokens a request"
        + ("" if known is not None else "; to simulate also arrival_interval_s"),
        remedy="give weight = 1.0 to servers that serve equally many tokens",
    )


def expected_token_rates(trace: Trace, cluster: Cluster) -> TokenRates:
    """Token rates r·s_t·m_t of DESIGN section 1 (``weight`` replaces their sum over t).

    Raises
    ------
    InputError
        A server names a task that the trace does not have, or one without tokens; tells no
        arrival rate; the trace is counts-only and a server has no ``weight``.
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
            raise _without_weight(cluster, n)
        elif server.arrival_interval_s is None:
            raise _without_rate(cluster, n)
        else:
            rates[n] = tokens / server.arrival_interval_s
    return TokenRates(trace.tasks, rates)


def shares_by_task(trace: Trace, tasks: Mapping[str, float], place: str) -> npt.NDArray[np.float64]:
    """A server's shares of requests in the order of the trace's tasks, float64 [tasks].

    Raises
    ------
    InputError
        Names a task that the trace does not have, or one without tokens.
    """
    shares = np.zeros(len(trace.tasks))
    number = {task: index for index, task in enumerate(trace.tasks)} if tasks else {}
    for task, share in tasks.items():
        if task not in number:
            raise InputError(
                f"unknown task {task!r}{did_you_mean(task, trace.tasks)}",
                place=place,
                expected=f"tasks of {trace.name or 'the trace'}: {', '.join(trace.tasks)}",
            )
        index = number[task]
        if share > 0 and trace.tokens[index] == 0:
            raise InputError(
                f"task {task!r} has no tokens in {trace.name or 'the trace'}",
                place=place,
                remedy="leave it out, or profile it",
            )
        shares[index] = share
    return shares


def activations(trace: Trace, load: TokenRates) -> npt.NDArray[np.float64]:
    """f[n, l, e], expected calls per second, float64 [N, L, E]."""
    calls: npt.NDArray[np.float64] = np.einsum("nt,tle->nle", load.rates, trace.calls_per_token())
    return calls
