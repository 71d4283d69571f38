"""Runs a sweep: many simulations over a grid of clusters, arrivals, solvers and seeds."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prism_plan.cluster import Cluster
from prism_plan.errors import InputError, LimitReached, PrismError
from prism_plan.evaluate.offload_baseline import offload_placement
from prism_plan.evaluate.simulation import simulate_placements
from prism_plan.evaluate.simulation_options import SimulationOptions
from prism_plan.evaluate.sweep_grid import (
    Grid,
    GridBlock,
    num_copies,
    vary_calibration,
    vary_cluster,
)
from prism_plan.input_limits import MAX_REPLICAS, require_integer
from prism_plan.instance import Instance
from prism_plan.io.sweep import COLUMNS, OK
from prism_plan.placement import OFFLOAD, Placement
from prism_plan.simulate.poisson_arrivals import MAX_REQUESTS
from prism_plan.simulate.report import SimulationRun
from prism_plan.simulate.sampling import MAX_PROMPT_TOKENS, sample_requests
from prism_plan.solvers import Options, solve
from prism_plan.token_rates import require_users
from prism_plan.trace import Trace


@dataclass(frozen=True)
class SweepOptions:
    """The options that all runs of a sweep share: requests, hold-out, replicas, simulation.

    Raises
    ------
    InputError
        A value is out of range.
    """

    requests_per_server: int = 20
    burst: int = 1
    decode_tokens: int = 32
    prompt_tokens: int = 128
    holdout: float | None = None
    min_replicas: int = 1
    simulation: SimulationOptions = dataclasses.field(default_factory=SimulationOptions)

    def __post_init__(self) -> None:
        require_integer(self.requests_per_server, 1, MAX_REQUESTS, "requests_per_server")
        require_integer(self.burst, 1, MAX_REQUESTS, "burst")
        require_integer(self.decode_tokens, 0, MAX_PROMPT_TOKENS, "decode_tokens")
        require_integer(self.prompt_tokens, 0, MAX_PROMPT_TOKENS, "prompt_tokens")
        require_integer(self.min_replicas, 1, MAX_REPLICAS, "min_replicas")
        if self.holdout is not None and not 0 < self.holdout < 1:
            raise InputError(
                f"{self.holdout}", parameter="holdout", expected="a share above 0 and below 1"
            )


def sweep(
    trace: Trace,
    cluster: Cluster,
    grid: Grid,
    options: SweepOptions | None = None,
    *,
    jobs: int = -1,
    progress: Callable[[int], None] = lambda done: None,
    names: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of the sweep table (:data:`prism_plan.io.sweep.COLUMNS`), in the grid's order.

    Placements are spread over ``jobs`` processes (-1: one a core) by joblib, so that
    ``joblib.parallel_config(backend="dask")`` or ``"ray"`` around the call takes the sweep beyond
    one machine. A run that fails is a row whose ``status`` is the line of the error, in which
    parameters have these ``names`` (:meth:`prism_plan.errors.PrismError.line`). With
    ``options.holdout`` placements are planned on one part of each task's requests and simulated
    with the others.

    Raises
    ------
    InputError
        No run of the sweep could succeed: ``options.holdout`` of a trace that cannot be split, a
        cluster without users, or no time between the requests of a server in
        cluster and grid; or a calibration gives the bandwidth that is swept over.
    """
    import joblib

    options = options or SweepOptions()
    if options.holdout is not None:
        trace.split(options.holdout, grid.seed[0])
    if grid.arrival_interval_s == (None,):
        _require_arrivals(cluster)
    require_users(cluster)
    calibration = options.simulation.calibration
    if calibration and calibration.bandwidth_mbps is not None and any(grid.bandwidth_mbps):
        raise InputError(
            f"{calibration.bandwidth_mbps:g} would replace the bandwidths of the sweep",
            source=calibration.name,
            place="bandwidth_mbps",
            remedy="leave one of the two out",
        )
    work = joblib.Parallel(n_jobs=jobs, return_as="generator")(
        joblib.delayed(_block_rows)(trace, cluster, block, options, names or {})
        for block in grid.blocks()
    )
    done = 0
    for rows in work:
        done += len(rows)
        progress(done)
        yield from rows


def _require_arrivals(cluster: Cluster) -> None:
    for n, server in enumerate(cluster.servers):
        if server.tasks and server.arrival_interval_s is None:
            raise InputError(
                f"server {server.name!r} has tasks but no times",
                place=f"server[{n}].arrival_interval_s",
                expected="mean seconds between its requests",
                remedy="or sweep over arrival_interval_s",
            )


def _block_rows(
    trace: Trace,
    cluster: Cluster,
    block: GridBlock,
    options: SweepOptions,
    names: Mapping[str, str],
) -> list[dict[str, Any]]:
    """The rows of all runs that share one placement."""
    conditions = list(itertools.product(block.bandwidth_mbps, block.arrival_interval_s))
    placement: Placement | None = None
    error: PrismError | None = None
    solve_s = 0.0
    scored = trace
    try:
        planned = trace
        if options.holdout is not None:
            planned, scored = trace.split(options.holdout, block.seed)
        base = vary_cluster(cluster, gpus=block.gpus, memory_fraction=block.memory_fraction)
        instance = Instance.build(planned, base, min_replicas=options.min_replicas)
        begin = time.perf_counter()
        if block.solver == OFFLOAD:
            placement = offload_placement(instance)
        else:
            placement = solve(instance, block.solver, Options(seed=block.seed))
        solve_s = time.perf_counter() - begin
    except PrismError as raised:
        error = raised
    rows = []
    for bandwidth, interval in conditions:
        row = {
            "gpus": block.gpus or sum(len(server.gpus) for server in cluster.servers),
            "servers": len(cluster.servers) * num_copies(cluster, block.gpus),
            "bandwidth_mbps": bandwidth,
            "arrival_interval_s": interval,
            "memory_fraction": block.memory_fraction,
            "solver": block.solver,
            "seed": block.seed,
            "status": OK if error is None else error.line(names),
        }
        if placement is not None:
            try:
                run = _run(scored, cluster, placement, block, bandwidth, interval, options)
                row |= _results(run.to_json()) | {"solve_s": solve_s}
            except PrismError as raised:
                row["status"] = raised.line(names)
        rows.append({name: row.get(name) for name in COLUMNS})
    return rows


def _run(
    trace: Trace,
    cluster: Cluster,
    placement: Placement,
    block: GridBlock,
    bandwidth_mbps: float | None,
    arrival_interval_s: float | None,
    options: SweepOptions,
) -> SimulationRun:
    target = vary_cluster(
        cluster,
        gpus=block.gpus,
        memory_fraction=block.memory_fraction,
        bandwidth_mbps=bandwidth_mbps,
        arrival_interval_s=arrival_interval_s,
    )
    requests = sample_requests(
        trace,
        target,
        requests_per_server=options.requests_per_server,
        burst=options.burst,
        decode_tokens=options.decode_tokens,
        prompt_tokens=options.prompt_tokens,
        seed=block.seed,
    )
    calibration = options.simulation.calibration
    if calibration is not None:
        calibration = vary_calibration(calibration, cluster, num_copies(cluster, block.gpus))
    simulation = dataclasses.replace(options.simulation, seed=block.seed, calibration=calibration)
    result = simulate_placements([(block.solver, placement)], requests, trace, target, simulation)
    if result.interrupted:
        raise KeyboardInterrupt
    if result.partial:
        raise LimitReached(f"the time limit of {simulation.time_limit_s:g} s was reached")
    return result.runs[0]


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
