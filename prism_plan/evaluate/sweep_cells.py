"""The cells of a sweep as workers compute them: a placement is planned, then runs under conditions.

These functions are sent to other processes and machines by their names; what they share is a
:class:`SweepWork`, which is sent once.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prism_plan import __version__
from prism_plan.cluster import Cluster
from prism_plan.errors import InputError, LimitReached, PrismError
from prism_plan.evaluate.offload_baseline import offload_placement
from prism_plan.evaluate.simulation import simulate_placements
from prism_plan.evaluate.sweep_grid import (
    GridBlock,
    num_copies,
    vary_calibration,
    vary_cluster,
)
from prism_plan.evaluate.sweep_options import SweepOptions
from prism_plan.instance import Instance
from prism_plan.io.sweep import COLUMNS, OK
from prism_plan.placement import OFFLOAD, Placement
from prism_plan.simulate.report import SimulationRun
from prism_plan.simulate.requests import Requests
from prism_plan.simulate.sampling import sample_requests
from prism_plan.solvers import Options, plans_tables, solve
from prism_plan.trace import Trace

#: Bandwidth in Mbit/s and seconds between requests of a run; ``None``: as in the cluster file.
Condition = tuple[float | None, float | None]


@dataclass(frozen=True, eq=False)
class SweepWork:
    """What all cells of a sweep share.

    The tokens of a trace file do not travel: each worker reads them by the file's absolute path.
    ``names`` are what a user calls parameters (:meth:`prism_plan.errors.PrismError.line`).
    """

    trace: Trace
    cluster: Cluster
    options: SweepOptions
    names: Mapping[str, str]
    version: str = __version__
    #: The latest split and the latest requests, which the next cell often needs again.
    kept: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": {}}

    def latest(self, kind: str, key: Any, make: Any) -> Any:
        """The value of ``make()``, or that of the call before, if its ``key`` was the same."""
        found = self.kept.get(kind)
        if found is None or found[0] != key:
            self.kept.pop(kind, None)  # before the next one takes memory
            self.kept[kind] = found = (key, make())
        return found[1]


@dataclass(frozen=True, eq=False)
class PlannedBlock:
    """The placement of a block, or the error that there is none; what its runs draw requests from.

    ``scored`` is ``None`` for the whole trace.
    """

    placement: Placement | None
    scored: Trace | None
    solve_s: float
    status: str = OK


def plan_block(work: SweepWork, block: GridBlock) -> PlannedBlock:
    """Plan the placement that all runs of a block share.

    Raises
    ------
    InputError
        This worker has another version of prism-plan.
    """
    _require_same_version(work)
    options = work.options
    try:
        planned, scored = work.trace, None
        if options.holdout is not None:
            planned, scored = _split(work, block)
        base = vary_cluster(work.cluster, gpus=block.gpus, memory_fraction=block.memory_fraction)
        instance = Instance.build(
            planned, base, min_replicas=options.min_replicas,
            reserve_kv=not plans_tables(block.solver),
        )  # fmt: skip
        begin = time.perf_counter()
        if block.solver == OFFLOAD:
            placement = offload_placement(instance)
        else:
            placement = solve(instance, block.solver, Options(seed=block.seed))
        return PlannedBlock(placement, scored, time.perf_counter() - begin)
    except PrismError as error:
        return PlannedBlock(None, None, 0.0, error.line(work.names))


def run_cells(
    work: SweepWork, block: GridBlock, planned: PlannedBlock, conditions: Sequence[Condition]
) -> list[dict[str, Any]]:
    """The rows of a block's runs under these conditions, in their order."""
    rows: dict[int, dict[str, Any]] = {}
    # those with the same requests follow each other, so that requests are drawn once
    for at in sorted(range(len(conditions)), key=lambda at: conditions[at][1] or 0.0):
        bandwidth, interval = conditions[at]
        own_gpus = sum(len(server.gpus) for server in work.cluster.servers)
        row = {
            "gpus": block.gpus or own_gpus,
            "servers": len(work.cluster.servers) * num_copies(work.cluster, block.gpus),
            "bandwidth_mbps": bandwidth,
            "arrival_interval_s": interval,
            "memory_fraction": block.memory_fraction,
            "solver": block.solver,
            "seed": block.seed,
            "status": planned.status,
        }
        if planned.placement is not None:
            try:
                run = _run(work, block, planned, planned.placement, bandwidth, interval)
                row |= _results(run.to_json()) | {"solve_s": planned.solve_s}
            except PrismError as raised:
                row["status"] = raised.line(work.names)
        rows[at] = {name: row.get(name) for name in COLUMNS}
    return [rows[at] for at in range(len(conditions))]


def plan_and_run(
    work: SweepWork, block: GridBlock, conditions: Sequence[Condition]
) -> list[dict[str, Any]]:
    """Plan a block's placement and run it; returns a row for each of these conditions, in order."""
    return run_cells(work, block, plan_block(work, block), conditions)


def _split(work: SweepWork, block: GridBlock) -> tuple[Trace, Trace]:
    """The requests that a block plans on, and those that it simulates."""
    share = work.options.holdout
    assert share is not None
    parts: tuple[Trace, Trace] = work.latest(
        "split", block.seed, lambda: work.trace.split(share, block.seed)
    )
    return parts


def _require_same_version(work: SweepWork) -> None:
    if work.version != __version__:
        raise InputError(
            f"a worker has prism-plan {__version__}",
            parameter="scheduler",
            expected=f"workers with version {work.version}, as here",
        )


def _run(
    work: SweepWork,
    block: GridBlock,
    planned: PlannedBlock,
    placement: Placement,
    bandwidth_mbps: float | None,
    arrival_interval_s: float | None,
) -> SimulationRun:
    trace = work.trace if planned.scored is None else planned.scored
    target = vary_cluster(
        work.cluster,
        gpus=block.gpus,
        memory_fraction=block.memory_fraction,
        bandwidth_mbps=bandwidth_mbps,
        arrival_interval_s=arrival_interval_s,
    )
    # neither links nor memory change what is asked for
    key = (block.gpus, arrival_interval_s, block.seed)
    requests: Requests = work.latest(
        "requests", key, lambda: _sample(work.options, trace, target, block.seed)
    )
    calibration = work.options.simulation.calibration
    if calibration is not None:
        copies = num_copies(work.cluster, block.gpus)
        calibration = vary_calibration(calibration, work.cluster, copies)
    simulation = dataclasses.replace(
        work.options.simulation, seed=block.seed, calibration=calibration
    )
    known = trace  # what reviews plan on
    if work.options.holdout is not None and simulation.migrate != "never":
        known, _ = _split(work, block)
    result = simulate_placements(
        [(block.solver, placement)], requests, trace, target, simulation, planned_on=known
    )
    if result.interrupted:
        raise KeyboardInterrupt
    if result.partial:
        raise LimitReached(f"the time limit of {simulation.time_limit_s:g} s was reached")
    return result.runs[0]


def _sample(options: SweepOptions, trace: Trace, target: Cluster, seed: int) -> Requests:
    return sample_requests(
        trace,
        target,
        requests_per_server=options.requests_per_server,
        burst=options.burst,
        decode_tokens=options.decode_tokens,
        prompt_tokens=options.prompt_tokens,
        seed=seed,
    )


def _results(run: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row that come from the report of its run."""
    same = (
        "requests", "remote_share", "waiting_share", "destinations", "bytes_sent", "events",
        "runtime_s",
    )  # fmt: skip
    return {
        **{name: run[name] for name in same},
        **{f"latency_{key}_s": run["latency_s"][key] for key in ("mean", "p50", "p95", "p99")},
        "ttft_mean_s": run["ttft_s"]["mean"],
        "tpot_mean_s": run["tpot_s"]["mean"],
        "utilisation": run["busiest"],
    }
