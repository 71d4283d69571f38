"""Arrivals at given times, whose servers, tasks and requests are found in cluster and trace."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.errors import InputError, did_you_mean
from prism_plan.simulate.arrival_rates import ArrivalRates
from prism_plan.trace import Trace
from prism_plan.trace_totals import RequestLengths

#: In place of a task or a prompt that is not given: it is drawn at random.
DRAW = -1
#: Times beyond this, in seconds, are a mistake.
MAX_S = 1e12


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: its server and time; its task and its id in the trace where they are given.

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
class ArrivalTrace:
    """Requests at given times, in any order; ``source`` is the file, for errors."""

    arrivals: tuple[Arrival, ...]
    source: str = ""


@dataclass(frozen=True, eq=False)
class ServerArrivals:
    """The n requests of one server in order of arrival.

    ``at_s`` float64 [n]; ``task`` int64 [n] and ``prompt`` int64 [n], an index into all prompts,
    are :data:`DRAW` where they are not given.
    """

    at_s: npt.NDArray[np.float64]
    task: npt.NDArray[np.int64]
    prompt: npt.NDArray[np.int64]

    @classmethod
    def at_times(cls, at_s: npt.NDArray[np.float64]) -> ServerArrivals:
        """Requests of which only the times are known."""
        drawn = np.full(len(at_s), DRAW, np.int64)
        return cls(at_s, drawn, drawn)


def resolve_arrivals(
    arrivals: ArrivalTrace,
    cluster: Cluster,
    trace: Trace,
    rates: ArrivalRates,
    recorded: RequestLengths | None,
) -> list[ServerArrivals]:
    """The arrivals of each server; the order of the lines does not matter.

    Raises
    ------
    InputError
        Names the line of an unknown server, task or request, of a request of another task, or of
        a server without tasks to draw from.
    """
    names = {server.name: n for n, server in enumerate(cluster.servers)}
    prompt_of: dict[int, int] = {}
    if recorded is not None and any(arrival.request is not None for arrival in arrivals.arrivals):
        prompt_of = {request: at for at, request in enumerate(recorded.request.tolist())}
    rows: list[list[tuple[float, int, int]]] = [[] for _ in names]
    for arrival in arrivals.arrivals:
        try:
            n = _server(arrival, names, cluster)
            task = _task(arrival, trace)
            prompt = DRAW
            if arrival.request is not None:
                prompt = _prompt(arrival, trace, recorded, prompt_of, task)
            elif task == DRAW and not rates.has_users(n):
                raise InputError(
                    f"server {arrival.server!r} has no tasks",
                    expected="a task in this line, or tasks of the server in the cluster file",
                )
        except InputError as error:
            place = ": ".join(part for part in (f"line {arrival.line}", error.place) if part)
            raise InputError(
                error.found,
                source=arrivals.source,
                place=place,
                expected=error.expected,
                remedy=error.remedy,
            ) from error
        rows[n].append((arrival.at_s, task, prompt))
    return [_in_order(own) for own in rows]


def _in_order(rows: list[tuple[float, int, int]]) -> ServerArrivals:
    """Sorted by all that is known of them, so that equal times do not depend on the file."""
    rows = sorted(rows)
    return ServerArrivals(
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


def _prompt(
    arrival: Arrival,
    trace: Trace,
    recorded: RequestLengths | None,
    prompt_of: dict[int, int],
    task: int,
) -> int:
    name = trace.name or "the trace"
    if recorded is None:
        raise InputError(
            f"{arrival.request}",
            place="request",
            expected="no request, for a counts-only trace has none",
            remedy="leave request out of all lines",
        )
    prompt = prompt_of.get(arrival.request or 0)
    if prompt is None:
        raise InputError(
            f"unknown request {arrival.request}",
            place="request",
            expected=f"one of the {len(prompt_of):,} requests of {name}, "
            f"{recorded.request.min()} to {recorded.request.max()}",
        )
    if task not in (DRAW, recorded.task[prompt]):
        raise InputError(
            f"request {arrival.request} is of task {trace.tasks[recorded.task[prompt]]!r}",
            place="request",
            expected=f"a request of task {arrival.task!r}",
        )
    return prompt
