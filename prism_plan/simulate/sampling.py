"""The requests of a simulation, sampled from a trace by a cluster's users."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.errors import InputError
from prism_plan.limits import MAX_SEED, require_integer
from prism_plan.simulate.arrival_rates import Demand, demand
from prism_plan.simulate.arrival_trace import DRAW, MAX_S, Arriving, FixedArrivals, look_up
from prism_plan.simulate.phase_schedule import PhaseStart, Schedule
from prism_plan.simulate.poisson_arrivals import MAX_REQUESTS, arrivals_before, arrivals_by_number
from prism_plan.simulate.random_streams import Source, stream
from prism_plan.simulate.recorded_prompts import RequestList, gather_prompts, list_requests
from prism_plan.simulate.requests import Prompts, Requests
from prism_plan.simulate.synthetic_prompts import POOL, draw_prompts
from prism_plan.trace import Trace

__all__ = ["Prompts", "Requests", "sample_requests"]

#: Longer prompts than this are a mistake: of drawn ones, memory would be full of them.
MAX_PROMPT_TOKENS = 2**17


def sample_requests(
    trace: Trace,
    cluster: Cluster,
    *,
    requests_per_server: int = 100,
    duration_s: float | None = None,
    burst: int = 1,
    schedule: Schedule | None = None,
    arrivals: FixedArrivals | None = None,
    decode_tokens: int = 32,
    prompt_tokens: int = 128,
    seed: int = 0,
) -> Requests:
    """Requests of all servers: when they arrive, of which task, and which prompt they are.

    Each choice has a random stream of its own for each server, so that a change to one leaves the
    others: another number of servers, tasks or bursts does not change what else arrives, and a
    longer run begins with the shorter one.

    Parameters
    ----------
    trace : Trace
        A prompt is one of its requests, uniformly from those of the task, with replacement. Of a
        counts-only trace, prompts are drawn: see :mod:`prism_plan.simulate.synthetic_prompts`.
    cluster : Cluster
        Servers with ``tasks`` have users: Poisson arrivals of mean ``arrival_interval_s``.
    requests_per_server : int
        Of each server with users; not used where ``duration_s`` or ``arrivals`` is given.
    duration_s : float, optional
        All arrivals before this time.
    burst : int
        So many requests arrive at once; bursts are so many times as far apart.
    schedule : Schedule, optional
        Changes of tasks and intervals by the number of the request.
    arrivals : FixedArrivals, optional
        Fixed times in place of random ones.
    decode_tokens : int
        Where the trace does not tell phases, the last so many tokens of a request, at most half of
        it, are decode steps; and the decode steps of a drawn prompt.
    prompt_tokens : int
        Prefill tokens of a drawn prompt.
    seed : int
        Of all streams.

    Returns
    -------
    Requests
        In order of (time, server, number); only the prompts that occur are in memory.

    Raises
    ------
    InputError
        An option, the schedule, the file of arrivals or a server's tasks or interval is wrong, a
        prompt's phases are, or no request results.
    """
    _check_options(duration_s, burst, schedule, arrivals)
    require_integer(requests_per_server, 1, MAX_REQUESTS, "requests_per_server")
    require_integer(burst, 1, MAX_REQUESTS, "burst")
    require_integer(decode_tokens, 0, MAX_PROMPT_TOKENS, "decode_tokens")
    require_integer(prompt_tokens, 0, MAX_PROMPT_TOKENS, "prompt_tokens")
    require_integer(seed, 0, MAX_SEED, "seed")
    if trace.kind == "counts" and prompt_tokens + decode_tokens == 0:
        raise InputError("0, and 0 decode tokens", parameter="prompt_tokens", expected="a token")

    want = demand(trace, cluster, schedule)
    listed = list_requests(trace) if trace.kind == "tokens" else None
    first = np.arange(len(trace.tasks) + 1) * POOL if listed is None else listed.first
    if arrivals is not None:
        arriving = look_up(arrivals, cluster, trace, want, listed)
    else:
        _check_users(cluster, want, counts_only=trace.kind == "counts")
        number = requests_per_server if duration_s is None else None
        _check_reach(schedule, want, number)
        arriving = [
            Arriving.drawn(_random_times(want, n, number, duration_s, burst, seed))
            for n in range(cluster.num_servers)
        ]
    _check_within(schedule, cluster, want, arriving)
    if not any(len(of_server.at_s) for of_server in arriving):
        raise InputError(
            f"no request arrives before {duration_s:g} s",
            parameter="duration_s",
            remedy="simulate a longer time",
        )
    entries = [_entries(want, n, of_server, first, seed) for n, of_server in enumerate(arriving)]
    chosen, prompt = np.unique(np.concatenate(entries), return_inverse=True)
    prompts = _prompts(trace, listed, chosen, prompt_tokens, decode_tokens, seed)
    home = np.repeat(np.arange(len(arriving)), [len(of_server.at_s) for of_server in arriving])
    at_s = np.concatenate([of_server.at_s for of_server in arriving])
    order = np.lexsort((home, at_s))  # stable: a server's requests stay in order
    return Requests(
        servers=tuple(server.name for server in cluster.servers),
        prompts=prompts,
        home=home[order].astype(np.int32),
        arrival_s=at_s[order],
        prompt=prompt.reshape(-1)[order].astype(np.int32),
        rate=None if arrivals is not None else want.rate(),
        phases=_phase_starts(schedule, want, arriving),
    )


def _phase_starts(
    schedule: Schedule | None, want: Demand, arriving: Sequence[Arriving]
) -> tuple[PhaseStart, ...]:
    """When the phases that some server reached began."""
    found = []
    for number, phase in enumerate(() if schedule is None else schedule.phases, 1):
        first = int(want.first[number - 1])
        begun_s = [float(server.at_s[first]) for server in arriving if len(server.at_s) > first]
        if begun_s:
            found.append(PhaseStart(number, min(begun_s), max(begun_s), phase))
    return tuple(found)


def _random_times(
    want: Demand, n: int, number: int | None, duration_s: float | None, burst: int, seed: int
) -> npt.NDArray[np.float64]:
    """When the requests of server ``n`` arrive: the first ``number``, or all in the duration."""
    if not want.has_users(n):
        return np.zeros(0)

    def interval_s(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        means: npt.NDArray[np.float64] = want.interval_s[want.phase_of(numbers), n]
        return means

    rng = stream(seed, Source.ARRIVALS, n)
    if number is not None:
        return arrivals_by_number(rng, interval_s, number, burst)
    assert duration_s is not None
    return arrivals_before(rng, interval_s, duration_s, burst)


def _entries(
    want: Demand, n: int, arriving: Arriving, first: npt.NDArray[np.int64], seed: int
) -> npt.NDArray[np.int64]:
    """Which entry of the pool each request of server ``n`` is, [n of it].

    Those of task t are ``first[t]`` to ``first[t + 1]``. One number is drawn for each request,
    used or not, so that fixing one does not change the others.
    """
    number = len(arriving.at_s)
    phase = want.phase_of(np.arange(number, dtype=np.int64))
    by_share = stream(seed, Source.TASKS, n).random(number)
    uniform = stream(seed, Source.PROMPTS, n).random(number)
    task = arriving.task.copy()
    for f in np.unique(phase):
        draw = (phase == f) & (task == DRAW) & (arriving.entry == DRAW)
        if draw.any():
            upto = np.cumsum(want.shares[f, n])
            task[draw] = np.searchsorted(upto / upto[-1], by_share[draw], side="right")
    size = first[task + 1] - first[task]  # of no meaning where the entry is fixed
    entry = first[task] + (uniform * size).astype(np.int64)
    return np.where(arriving.entry == DRAW, entry, arriving.entry)


def _prompts(
    trace: Trace,
    listed: RequestList | None,
    chosen: npt.NDArray[np.int64],
    prompt_tokens: int,
    decode_tokens: int,
    seed: int,
) -> Prompts:
    """The chosen entries of the pool."""
    if listed is not None:
        return gather_prompts(trace, listed, chosen, decode_tokens)
    return draw_prompts(
        trace,
        (chosen // POOL).astype(np.int32),
        (chosen % POOL).astype(np.int32),
        prefill_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        seed=seed,
    )


# ---------------------------------------------------------------------------------------- checks


def _check_options(
    duration_s: float | None,
    burst: int,
    schedule: Schedule | None,
    arrivals: FixedArrivals | None,
) -> None:
    """Options that contradict each other, and the one that is no whole number."""
    if duration_s is not None and not 0 < duration_s <= MAX_S:  # NaN is neither
        raise InputError(
            f"{duration_s}", parameter="duration_s", expected=f"seconds above 0, at most {MAX_S:g}"
        )
    if arrivals is None:
        return
    if duration_s is not None or burst != 1:
        raise InputError(
            "fixed times leave nothing to draw",
            parameter="duration_s" if duration_s is not None else "burst",
            remedy="leave it or ``arrivals`` out",
        )
    for index, phase in enumerate(() if schedule is None else schedule.phases):
        if phase.arrival_interval_s is not None:
            raise InputError(
                "fixed times leave nothing to draw",
                source=schedule.source if schedule else "",
                place=f"phase[{index}].arrival_interval_s",
                remedy="leave it or ``arrivals`` out",
            )


def _check_users(cluster: Cluster, want: Demand, *, counts_only: bool) -> None:
    """Some server has users, and each that has tells how often they come."""
    for n, server in enumerate(cluster.servers):
        interval_s = want.interval_s[:, n]
        if want.has_users(n) and not ((interval_s > 0) & np.isfinite(interval_s)).all():
            given = server.arrival_interval_s
            both = counts_only and server.weight is None
            raise InputError(
                f"server {server.name!r} has tasks but "
                + ("no times" if given is None else f"{given}"),
                place=f"server[{n}].arrival_interval_s",
                expected="mean seconds between its requests",
                remedy="and to plan from a counts-only trace `weight` too, a relative token rate"
                if both
                else "`weight` is for planning, the simulator needs times",
            )
    if not any(want.has_users(n) for n in range(cluster.num_servers)):
        raise InputError(
            "no server has tasks, so no request arrives",
            place="server",
            remedy="give a server tasks in the cluster file",
        )


def _check_reach(schedule: Schedule | None, want: Demand, number: int | None) -> None:
    """So many requests reach the last phase: else it would silently be left out."""
    if schedule is not None and number is not None and number <= want.first[-1]:
        raise InputError(
            f"{number:,} requests of each server end before phase[{len(want.first) - 1}], which "
            f"begins after {want.first[-1]:,}",
            parameter="requests_per_server",
            expected=f"more than {want.first[-1]:,} for this schedule",
        )


def _check_within(
    schedule: Schedule | None, cluster: Cluster, want: Demand, arriving: Sequence[Arriving]
) -> None:
    """No server has more requests than the phases hold."""
    for server, of_server in zip(cluster.servers, arriving, strict=True):
        if schedule is not None and want.end is not None and len(of_server.at_s) > want.end:
            raise InputError(
                f"the phases hold {want.end:,} requests of a server, and {server.name!r} has "
                f"{len(of_server.at_s):,}",
                source=schedule.source,
                place=f"phase[{len(want.first) - 1}].requests",
                remedy="leave it out of the last phase, which then lasts until the end",
            )
