"""Samples the requests of a simulation: arrivals, tasks and prompts of every server."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.errors import InputError
from prism_plan.input_limits import MAX_SEED, require_integer
from prism_plan.seeds import RandomSource, random_stream
from prism_plan.simulate.arrival_rates import ArrivalRates, arrival_rates
from prism_plan.simulate.arrival_trace import (
    DRAW,
    MAX_S,
    ArrivalTrace,
    ServerArrivals,
    resolve_arrivals,
)
from prism_plan.simulate.phase_schedule import PhaseStart, Schedule
from prism_plan.simulate.poisson_arrivals import MAX_REQUESTS, arrivals_before, arrivals_by_number
from prism_plan.simulate.recorded_prompts import gather_prompts
from prism_plan.simulate.requests import Prompts, Requests
from prism_plan.simulate.synthetic_prompts import POOL, draw_prompts
from prism_plan.trace import Trace

__all__ = ["Prompts", "Requests", "sample_requests", "sample_seeds"]

#: Tokens of prompts that are drawn, and decode steps where the trace does not tell phases.
PROMPT_TOKENS, DECODE_TOKENS = 128, 32
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
    arrivals: ArrivalTrace | None = None,
    decode_tokens: int = DECODE_TOKENS,
    prompt_tokens: int = PROMPT_TOKENS,
    seed: int = 0,
) -> Requests:
    """Sample the requests of all servers: their arrival times, tasks and prompts.

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
    arrivals : ArrivalTrace, optional
        Fixed times in place of random ones.
    decode_tokens : int
        Decode steps of a drawn prompt; where the trace does not record phases, the last so many
        tokens of a request, at most half of it, are decode steps.
    prompt_tokens : int
        Prefill tokens of a drawn prompt.
    seed : int
        Seed of all streams (:mod:`prism_plan.seeds`).

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

    rates = arrival_rates(trace, cluster, schedule)
    recorded = trace.request_lengths() if trace.kind == "tokens" else None
    num_tasks = len(trace.tasks)
    first_prompt = np.arange(num_tasks + 1) * POOL
    if recorded is not None:
        first_prompt = recorded.first(num_tasks)
    if arrivals is not None:
        by_server = resolve_arrivals(arrivals, cluster, trace, rates, recorded)
    else:
        _check_users(cluster, rates, counts_only=trace.kind == "counts")
        number = requests_per_server if duration_s is None else None
        _check_reach(schedule, rates, number)
        by_server = [
            ServerArrivals.at_times(_random_times(rates, n, number, duration_s, burst, seed))
            for n in range(cluster.num_servers)
        ]
    _check_within(schedule, cluster, rates, by_server)
    if not any(len(own.at_s) for own in by_server):
        raise InputError(
            f"no request arrives before {duration_s:g} s",
            parameter="duration_s",
            remedy="simulate a longer time",
        )
    sampled = [
        _sample_prompts(rates, n, own, first_prompt, seed) for n, own in enumerate(by_server)
    ]
    chosen, prompt = np.unique(np.concatenate(sampled), return_inverse=True)
    if recorded is not None:
        prompts = gather_prompts(trace, recorded, chosen, decode_tokens)
    else:
        prompts = draw_prompts(
            trace,
            (chosen // POOL).astype(np.int32),
            (chosen % POOL).astype(np.int32),
            prefill_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            seed=seed,
        )
    home = np.repeat(np.arange(len(by_server)), [len(own.at_s) for own in by_server])
    at_s = np.concatenate([own.at_s for own in by_server])
    order = np.lexsort((home, at_s))  # stable: a server's requests stay in order
    return Requests(
        servers=tuple(server.name for server in cluster.servers),
        prompts=prompts,
        home=home[order].astype(np.int32),
        arrival_s=at_s[order],
        prompt=prompt.reshape(-1)[order].astype(np.int32),
        rate=None if arrivals is not None else rates.server_rates(),
        phases=_phase_starts(schedule, rates, by_server),
    )


def sample_seeds(seed: int, samples: int) -> list[int]:
    """Seeds of several samples that differ in nothing else; the first is ``seed`` itself."""
    return [(seed + sample) % (MAX_SEED + 1) for sample in range(samples)]


def _phase_starts(
    schedule: Schedule | None, rates: ArrivalRates, by_server: Sequence[ServerArrivals]
) -> tuple[PhaseStart, ...]:
    """When each phase that some server reached began."""
    starts = []
    for number, phase in enumerate(() if schedule is None else schedule.phases, 1):
        first = int(rates.first_request[number - 1])
        begun_s = [float(server.at_s[first]) for server in by_server if len(server.at_s) > first]
        if begun_s:
            starts.append(PhaseStart(number, min(begun_s), max(begun_s), phase))
    return tuple(starts)


def _random_times(
    rates: ArrivalRates, n: int, number: int | None, duration_s: float | None, burst: int, seed: int
) -> npt.NDArray[np.float64]:
    """Draw the arrival times of server ``n``: the first ``number``, or all in the duration."""
    if not rates.has_users(n):
        return np.zeros(0)

    def interval_s(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        means: npt.NDArray[np.float64] = rates.interval_s[rates.phase_of(numbers), n]
        return means

    rng = random_stream(seed, RandomSource.ARRIVALS, n)
    if number is not None:
        return arrivals_by_number(rng, interval_s, number, burst)
    assert duration_s is not None
    return arrivals_before(rng, interval_s, duration_s, burst)


def _sample_prompts(
    rates: ArrivalRates,
    n: int,
    arrivals: ServerArrivals,
    first_prompt: npt.NDArray[np.int64],
    seed: int,
) -> npt.NDArray[np.int64]:
    """Draw the prompt of each request of server ``n``, an index into all prompts, [n of it].

    Those of task t are ``first_prompt[t]`` to ``first_prompt[t + 1]``. One number is drawn for each
    request, used or not, so that fixing one does not change the others.
    """
    number = len(arrivals.at_s)
    phase = rates.phase_of(np.arange(number, dtype=np.int64))
    by_share = random_stream(seed, RandomSource.TASKS, n).random(number)
    uniform = random_stream(seed, RandomSource.PROMPTS, n).random(number)
    task = arrivals.task.copy()
    for f in np.unique(phase):
        draw = (phase == f) & (task == DRAW) & (arrivals.prompt == DRAW)
        if draw.any():
            upto = np.cumsum(rates.shares[f, n])
            task[draw] = np.searchsorted(upto / upto[-1], by_share[draw], side="right")
    size = first_prompt[task + 1] - first_prompt[task]  # not used where the prompt is given
    prompt = first_prompt[task] + (uniform * size).astype(np.int64)
    return np.where(arrivals.prompt == DRAW, prompt, arrivals.prompt)


# ---------------------------------------------------------------------------------------- checks


def _check_options(
    duration_s: float | None,
    burst: int,
    schedule: Schedule | None,
    arrivals: ArrivalTrace | None,
) -> None:
    """Refuse a duration out of range, and options that contradict each other."""
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


def _check_users(cluster: Cluster, rates: ArrivalRates, *, counts_only: bool) -> None:
    """Require that some server has users, and mean intervals of all that have."""
    for n, server in enumerate(cluster.servers):
        interval_s = rates.interval_s[:, n]
        if rates.has_users(n) and not ((interval_s > 0) & np.isfinite(interval_s)).all():
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
    if not any(rates.has_users(n) for n in range(cluster.num_servers)):
        raise InputError(
            "no server has tasks, so no request arrives",
            place="server",
            remedy="give a server tasks in the cluster file",
        )


def _check_reach(schedule: Schedule | None, rates: ArrivalRates, number: int | None) -> None:
    """Require that requests reach the last phase, which would else be left out silently."""
    first = int(rates.first_request[-1])
    if schedule is not None and number is not None and number <= first:
        raise InputError(
            f"{number:,} requests of each server end before "
            f"phase[{len(rates.first_request) - 1}], which begins after {first:,}",
            parameter="requests_per_server",
            expected=f"more than {first:,} for this schedule",
        )


def _check_within(
    schedule: Schedule | None,
    cluster: Cluster,
    rates: ArrivalRates,
    by_server: Sequence[ServerArrivals],
) -> None:
    """Require that no server has more requests than the phases have."""
    if schedule is None or rates.max_requests is None:
        return
    for server, own in zip(cluster.servers, by_server, strict=True):
        if len(own.at_s) > rates.max_requests:
            raise InputError(
                f"the phases hold {rates.max_requests:,} requests of a server, and "
                f"{server.name!r} has {len(own.at_s):,}",
                source=schedule.source,
                place=f"phase[{len(rates.first_request) - 1}].requests",
                remedy="leave it out of the last phase, which then lasts until the end",
            )
