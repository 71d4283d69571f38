"""Arrivals from a file, looked up in the cluster and the trace."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.errors import InputError, did_you_mean
from prism_plan.simulate.arrival_rates import Demand
from prism_plan.simulate.recorded_prompts import RequestList
from prism_plan.trace import Trace

#: In place of a code or an index: it is to be drawn.
DRAW = -1
#: Times beyond this, in seconds, are a mistake.
MAX_S = 1e12


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: where and when; its task and its id in the trace where they are given.

    Raises
    ------
    InputError
        The time is negative, NaN, infinite or beyond :data:`MAX_S`.
    """

    server: str
    at_s: float
    task: str | None = None
    request: int | None = None
    line: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.at_s <= MAX_S:  # NaN is neither
            raise InputError(
                f"{self.at_s}",
                place=f"line {self.line}: at_s",
                expected=f"seconds from the start, 0 to {MAX_S:g}",
            )


@dataclass(frozen=True)
class FixedArrivals:
    """Requests at fixed times, in any order; ``source`` is the file, for errors."""

    arrivals: tuple[Arrival, ...]
    source: str = ""


@dataclass(frozen=True, eq=False)
class Arriving:
    """The n requests of one server in order.

    ``at_s`` float64 [n]; ``task`` int64 [n] and ``entry`` int64 [n], an index into the pool of all
    prompts, are :data:`DRAW` where they are not fixed.
    """

    at_s: npt.NDArray[np.float64]
    task: npt.NDArray[np.int64]
    entry: npt.NDArray[np.int64]

    @classmethod
    def drawn(cls, at_s: npt.NDArray[np.float64]) -> Arriving:
        """Requests of which only the times are known."""
        nothing = np.full(len(at_s), DRAW, np.int64)
        return cls(at_s, nothing, nothing)


def look_up(
    fixed: FixedArrivals,
    cluster: Cluster,
    trace: Trace,
    want: Demand,
    listed: RequestList | None,
) -> list[Arriving]:
    """The arrivals of each server; the order of the lines does not matter.

    Raises
    ------
    InputError
        Names the line of an unknown server, task or request, of a request of another task, or of
        a server without tasks to draw from.
    """
    names = {server.name: n for n, server in enumerate(cluster.servers)}
    entry_of: dict[int, int] = {}
    if listed is not None and any(arrival.request is not None for arrival in fixed.arrivals):
        entry_of = {request: at for at, request in enumerate(listed.request.tolist())}
    rows: list[list[tuple[float, int, int]]] = [[] for _ in names]
    for arrival in fixed.arrivals:
        try:
            n = _server(arrival, names, cluster)
            task = _task(arrival, trace)
            entry = DRAW
            if arrival.request is not None:
                entry = _entry(arrival, trace, listed, entry_of, task)
            elif task == DRAW and not want.has_users(n):
                raise InputError(
                    f"server {arrival.server!r} has no tasks",
                    expected="a task in this line, or tasks of the server in the cluster file",
                )
        except InputError as error:
            place = ": ".join(part for part in (f"line {arrival.line}", error.place) if part)
            raise InputError(
                error.found,
                source=fixed.source,
                place=place,
                expected=error.expected,
                remedy=error.remedy,
            ) from error
        rows[n].append((arrival.at_s, task, entry))
    return [_in_order(of_server) for of_server in rows]


def _in_order(rows: list[tuple[float, int, int]]) -> Arriving:
    """Sorted by all that is known of them, so that equal times do not depend on the file."""
    rows = sorted(rows)
    return Arriving(
        np.array([row[0] for row in rows], np.float64),
        np.array([row[1] for row in rows], np.int64),
        np.array([row[2] for row in rows], np.int64),
    )


def _server(arrival: Arrival, names: dict[str, int], cluster: Cluster) -> int:
    if arrival.server not in names:
        raise InputError(
            f"unknown server {arrival.server!r}{did_you_mean(arrival.server, names)}",
            place="server",
            expected=f"servers of {cluster.name}: {', '.join(names)}",
        )
    return names[arrival.server]


def _task(arrival: Arrival, trace: Trace) -> int:
    if arrival.task is None:
        return DRAW
    if arrival.task not in trace.tasks or not trace.tokens[trace.tasks.index(arrival.task)]:
        known = [name for name, number in zip(trace.tasks, trace.tokens, strict=True) if number]
        raise InputError(
            f"unknown task {arrival.task!r}{did_you_mean(arrival.task, known)}",
            place="task",
            expected=f"tasks of {trace.name or 'the trace'}: {', '.join(known)}",
        )
    return trace.tasks.index(arrival.task)


def _entry(
    arrival: Arrival,
    trace: Trace,
    listed: RequestList | None,
    entry_of: dict[int, int],
    task: int,
) -> int:
    name = trace.name or "the trace"
    if listed is None:
        raise InputError(
            f"{arrival.request}",
            place="request",
            expected="no request, for a counts-only trace has none",
            remedy="leave request out of all lines",
        )
    entry = entry_of.get(arrival.request or 0)
    if entry is None:
        raise InputError(
            f"unknown request {arrival.request}",
            place="request",
            expected=f"one of the {len(entry_of):,} requests of {name}, "
            f"{listed.request.min()} to {listed.request.max()}",
        )
    if task not in (DRAW, listed.task[entry]):
        raise InputError(
            f"request {arrival.request} is of task {trace.tasks[listed.task[entry]]!r}",
            place="request",
            expected=f"a request of task {arrival.task!r}",
        )
    return entry
