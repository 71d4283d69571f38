"""Plans and simulates a cell: the interval of its load, and the runs of one seed."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

import prism_plan as pp
from prism_plan.errors import Infeasible
from prism_plan.latency.idle_time import IdleMeasure
from prism_plan.profiling.counts_csv import read_counts
from prism_plan.profiling.sources import Source
from prism_plan.solvers import get_solver
from prism_plan.solvers.busy_servers import busiest_share
from studies import paper
from studies.grid.cells import Cell

#: The solver that is judged, and what it is held against.
JUDGED = "latency"
BASELINES = (
    "prism", "exact", "layer-partition", "exact+paths", "layer-partition+paths", "pipeline",
    "offload",
)  # fmt: skip
#: Seconds between the requests of users who never meet.
IDLE_S = 1e6


class Run(NamedTuple):
    """One plan's run: its commit, seconds, and the mean latency of each home with users.

    ``mean_s`` and what follows are ``None`` where the solver found that nothing fits. ``busiest``
    is that of the simulation's report, ``solve_s`` what planning took.
    """

    commit: str
    mean_s: float | None = None
    p99_s: float | None = None
    ttft_s: float | None = None
    busiest: float | None = None
    solve_s: float | None = None
    homes_s: tuple[float, ...] = ()


def known(solver: str) -> bool:
    """Whether there is a solver of this name, or it is the baseline `offload`."""
    try:
        return solver == "offload" or bool(get_solver(solver))
    except pp.InputError:
        return False


@cache
def routing(mixtral: bool) -> pp.Trace:
    """The real routing data of a model."""
    if not mixtral:
        return paper.trace()
    folder = Path(os.environ.get("PRISM_TRACES", paper.ROOT.parent / "shared" / "traces"))
    source = Source(folder / "mixtral-8x7b-mmlu" / "counts.csv")
    return read_counts([source], pp.PRESETS["mixtral-8x7b"])


def halves(cell: Cell, seed: int) -> tuple[pp.Trace, pp.Trace]:
    """What is planned on, and what is scored on: the same counts for Mixtral."""
    trace = routing(cell.mixtral)
    return (trace, trace) if cell.mixtral else trace.split(0.5, seed)


@cache
def busy_seconds(cell: Cell) -> float:
    """Seconds for which a request of every home together keep the busiest server busy.

    Of the pipeline that is best on an idle cluster, planned on the whole trace.
    """
    trace, cluster = routing(cell.mixtral), cell.cluster(IDLE_S)
    plan = pp.solve(pp.Instance.build(trace, cluster), "pipeline", pp.Options(seed=0))
    idle = IdleMeasure(trace.model, cluster, trace, 0).idle_time(plan.on_gpu)
    return busiest_share(idle, plan.execution_table, np.ones(cluster.num_servers))


def interval_s(cell: Cell) -> float:
    """Seconds between the requests of a home that give the cell its load; four digits."""
    # the same for all loads of a regime, and planned once
    regime = dataclasses.replace(cell, name="", load="idle")
    return float(f"{busy_seconds(regime) / cell.busy_share:.4g}")


def measured(
    cell: Cell, interval: float, seed: int, solvers: tuple[str, ...], commit: str
) -> tuple[str, dict[str, Run]]:
    """The runs of some solvers under one seed, and a fingerprint of the requests.

    Every solver's plan serves the same requests, those that the seed draws whatever is planned.
    """
    planned, scored = halves(cell, seed)
    cluster = cell.cluster(interval)
    instance = pp.Instance.build(planned, cluster)
    requests = pp.sample_requests(scored, cluster, requests_per_server=cell.requests, seed=seed)
    runs = {}
    for solver in solvers:
        begun = time.perf_counter()
        try:
            if solver == "offload":
                placement = pp.offload_placement(instance)
            else:
                placement = pp.solve(instance, solver, pp.Options(seed=seed))
            solve_s = time.perf_counter() - begun
            report = pp.simulate_placements([(solver, placement)], requests, scored, cluster)
        except Infeasible:
            runs[solver] = Run(commit)
            continue
        found = report.to_json()["runs"][0]
        runs[solver] = Run(
            commit,
            found["latency_s"]["mean"],
            found["latency_s"]["p99"],
            found["ttft_s"]["mean"],
            found["busiest"],
            solve_s,
            tuple(home["latency_s"]["mean"] for home in found["servers"] if home["requests"]),
        )
    return fingerprint(requests), runs


def fingerprint(requests: pp.Requests) -> str:
    """Eight digits that tell whether two draws are of the same requests.

    Times are taken to the microsecond, for libraries may differ in the last bit.
    """
    prompts = requests.prompts
    digest = hashlib.sha256()
    for values in (
        np.round(requests.arrival_s * 1e6).astype(np.int64),
        requests.home,
        requests.prompt,
        prompts.prefill_tokens,
        prompts.decode_tokens,
        prompts.experts,
    ):
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:8]
