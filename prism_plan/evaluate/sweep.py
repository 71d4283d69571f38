"""Runs a sweep: many simulations over a grid of clusters, arrivals, solvers and seeds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prism_plan.cluster import Cluster
from prism_plan.errors import InputError
from prism_plan.evaluate.sweep_backends import open_backend
from prism_plan.evaluate.sweep_backends.in_order import num_parts, results_in_order
from prism_plan.evaluate.sweep_cells import (
    Condition,
    SweepWork,
    plan_and_run,
    plan_block,
    run_cells,
)
from prism_plan.evaluate.sweep_grid import Grid, GridBlock
from prism_plan.evaluate.sweep_options import SweepOptions
from prism_plan.token_rates import require_users
from prism_plan.trace import Trace

__all__ = ["SweepOptions", "sweep"]


def sweep(
    trace: Trace,
    cluster: Cluster,
    grid: Grid,
    options: SweepOptions | None = None,
    *,
    jobs: int = -1,
    backend: str = "processes",
    scheduler: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
    names: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of the sweep table (:data:`prism_plan.io.sweep.COLUMNS`), in the grid's order.

    Cells that share cluster, solver and seed have one placement, which is planned once; their runs
    are spread over the workers too. The rows are the same with every ``backend``, but for the
    seconds that planning and simulating took. Cells whose worker is lost are computed again.

    A run that fails is a row whose ``status`` is the line of the error. With ``options.holdout``
    placements are planned on one part of each task's requests and simulated with the others.

    Parameters
    ----------
    trace
        Workers read the tokens of a trace file by its absolute path: on other machines it has to
        be in a file system that all share.
    cluster, grid, options
        What is simulated.
    jobs
        Workers on this machine, at most one a run; -1: one a core, 1: none but this process.
    backend
        ``"processes"``, ``"dask"`` or ``"ray"`` (extras of these names).
    scheduler
        The address of a running Dask or Ray cluster, whose workers then are used.
    progress
        Called with the number of rows that are done.
    names
        What parameters are called in the lines of errors
        (:meth:`prism_plan.errors.PrismError.line`).

    Raises
    ------
    InputError
        No run of the sweep could succeed: ``options.holdout`` of a trace that cannot be split, a
        cluster without users, or no time between the requests of a server in
        cluster and grid; or a calibration gives the bandwidth that is swept over. The back end is
        not installed, its scheduler cannot be reached, or its workers have another prism-plan.
    LimitReached
        The workers of the same cells were lost again and again.
    """
    options = options or SweepOptions()
    _require_runnable(trace, cluster, grid, options)
    workers = open_backend(backend, min(jobs, grid.runs), scheduler)
    try:
        blocks = list(grid.blocks())
        parts = num_parts(workers, len(blocks))
        done = 0
        for rows in results_in_order(
            workers,
            SweepWork(trace, cluster, options, dict(names or {})),
            ((block, _parts(block, parts)) for block in blocks),
            plan_block,
            run_cells,
            plan_and_run,
        ):
            done += len(rows)
            progress(done)
            yield from rows
    finally:
        workers.close()


def _parts(block: GridBlock, parts: int) -> list[Sequence[Condition]]:
    """The conditions of a block, cut into at most so many parts of nearly one size."""
    conditions = list(itertools.product(block.bandwidth_mbps, block.arrival_interval_s))
    parts = min(parts, len(conditions))
    ends = [len(conditions) * at // parts for at in range(parts + 1)]
    return [conditions[start:end] for start, end in itertools.pairwise(ends)]


def _require_runnable(trace: Trace, cluster: Cluster, grid: Grid, options: SweepOptions) -> None:
    """Refuse a sweep of which no run could succeed."""
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


def _require_arrivals(cluster: Cluster) -> None:
    for n, server in enumerate(cluster.servers):
        if server.tasks and server.arrival_interval_s is None:
            raise InputError(
                f"server {server.name!r} has tasks but no times",
                place=f"server[{n}].arrival_interval_s",
                expected="mean seconds between its requests",
                remedy="or sweep over arrival_interval_s",
            )
