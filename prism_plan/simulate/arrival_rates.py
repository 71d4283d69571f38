"""Arrival rates and task shares of each server's users, phase by phase."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.errors import InputError, did_you_mean
from prism_plan.simulate.phase_schedule import Phase, Schedule
from prism_plan.token_rates import shares_by_task
from prism_plan.trace import Trace


@dataclass(frozen=True, eq=False)
class ArrivalRates:
    """Task shares and mean intervals of each server's requests in F phases.

    Attributes
    ----------
    first_request : int64 [F]
        Number of the first request (0-based, of each server) of a phase.
    max_requests : int or None
        Requests of a server in all phases; ``None`` is without end.
    shares : float64 [F, N, tasks]
        Share of each task in a server's requests; all zero for a server without users.
    interval_s : float64 [F, N]
        Mean seconds between requests, NaN where not given.
    """

    first_request: npt.NDArray[np.int64]
    max_requests: int | None
    shares: npt.NDArray[np.float64]
    interval_s: npt.NDArray[np.float64]

    def phase_of(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The phase of requests of these numbers, [n]."""
        return np.searchsorted(self.first_request, numbers, side="right") - 1

    def has_users(self, server: int) -> bool:
        """Whether the server has requests of its own."""
        return bool(self.shares[0, server].any())

    def server_rates(self) -> npt.NDArray[np.float64] | None:
        """Requests per second of each server, [N], or ``None`` if they change between phases."""
        users = self.shares[0].any(axis=1)
        interval_s = self.interval_s[:, users]
        if (interval_s != interval_s[0]).any():
            return None
        rate = np.zeros(self.shares.shape[1])
        rate[users] = 1.0 / interval_s[0]
        return rate


def arrival_rates(trace: Trace, cluster: Cluster, schedule: Schedule | None = None) -> ArrivalRates:
    """Task shares and intervals of the cluster's users in every phase of a schedule.

    Raises
    ------
    InputError
        An unknown server or task, a task without tokens, a server whose users begin later than
        the first phase.
    """
    phases = (Phase(),) if schedule is None else schedule.phases
    source = "" if schedule is None else schedule.source
    names = [server.name for server in cluster.servers]
    shares = np.array(
        [
            shares_by_task(trace, server.tasks, f"server[{n}].tasks")
            for n, server in enumerate(cluster.servers)
        ]
    )
    intervals = [server.arrival_interval_s for server in cluster.servers]
    interval_s = np.array([np.nan if value is None else value for value in intervals])
    all_shares, all_intervals = [], []
    for index, phase in enumerate(phases):
        for name, tasks in phase.tasks.items():
            place = f"phase[{index}].tasks"
            if name not in names:
                raise InputError(
                    f"unknown server {name!r}{did_you_mean(name, names)}",
                    source=source,
                    place=place,
                    expected=f"servers of {cluster.name}: {', '.join(names)}",
                )
            try:
                changed = shares_by_task(trace, tasks, f"{place}.{name}")
            except InputError as error:
                raise error.within(source) from error
            n = names.index(name)
            if index and not shares[n].any():
                raise InputError(
                    f"server {name!r} has no requests before this phase, so it never comes",
                    source=source,
                    place=f"{place}.{name}",
                    expected="phases of a server with users",
                    remedy="give it tasks in phase[0] or in the cluster file",
                )
            shares = shares.copy()
            shares[n] = changed
        if phase.arrival_interval_s is not None:
            interval_s = np.full(len(names), phase.arrival_interval_s)
        all_shares.append(shares)
        all_intervals.append(interval_s)
    ends = np.cumsum([phase.requests or 0 for phase in phases])
    return ArrivalRates(
        first_request=np.concatenate([[0], ends[:-1]]).astype(np.int64),
        max_requests=None if phases[-1].requests is None else int(ends[-1]),
        shares=np.array(all_shares),
        interval_s=np.array(all_intervals),
    )
