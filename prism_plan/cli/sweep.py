"""``prism-plan simulate --sweep``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from prism_plan.cli.options_dataclass import option_names

if TYPE_CHECKING:
    from prism_plan.cli.simulate_options import SimulateOptions


def run_sweep(args: SimulateOptions) -> int:
    """Simulate a grid and write its table; returns the exit code."""
    import dataclasses

    from prism_plan.cli.console import load_trace, log_info, progress, write_output
    from prism_plan.cli.inputs import (
        error_source,
        load_cluster,
        log_assumed_simulation_figures,
        parse_solver_names,
        require_writable_output,
    )
    from prism_plan.errors import InputError, PrismError
    from prism_plan.evaluate.sweep import SweepOptions, sweep
    from prism_plan.evaluate.sweep_backends import require_backend
    from prism_plan.evaluate.sweep_grid import Grid, parse_grid, vary_cluster
    from prism_plan.io.sweep import OK, dump_sweep, sweep_kind
    from prism_plan.placement import OFFLOAD

    require_backend(args.backend, args.scheduler)
    output = args.output
    if output is None:
        raise InputError("no table to write", parameter="grid", expected="-o R.parquet or -o R.csv")
    kind = "csv" if output == "-" else sweep_kind(output)
    require_writable_output(output, args.trace, args.cluster, args.calibration)
    texts = list(args.grid)
    solvers = (parse_solver_names(args.solvers) or []) + [OFFLOAD] * args.offload
    if solvers:
        texts.append(f"solver={','.join(solvers)}")
    grid: Grid = parse_grid(texts)
    if "seed=" not in "".join(texts).replace(" ", ""):
        grid = dataclasses.replace(grid, seed=(args.seed,))
    options = SweepOptions(
        requests_per_server=20 if args.requests_per_server is None else args.requests_per_server,
        burst=args.burst,
        decode_tokens=args.decode_tokens,
        prompt_tokens=args.prompt_tokens,
        holdout=args.holdout,
        min_replicas=args.min_replicas,
        simulation=args.simulation_options(),
    )
    cluster, _ = load_cluster(args.cluster)
    trace = load_trace(args.trace, keep_tokens=True)
    args.refuse_unused(trace)
    rows: list[dict[str, Any]] = []
    interrupted = False
    ended: PrismError | None = None
    with progress(grid.runs, "runs") as update, error_source(args.cluster):
        try:
            for row in sweep(
                trace, cluster, grid, options, jobs=args.jobs,
                backend=args.backend, scheduler=args.scheduler,
                progress=lambda done: update("simulating", done),
                names=option_names(click.get_current_context()),
            ):  # fmt: skip
                rows.append(row)
        except KeyboardInterrupt:
            interrupted = True
        except PrismError as error:
            if not rows:
                raise
            ended = error  # workers were lost: the rows that are done are not
    if interrupted and not rows:
        raise KeyboardInterrupt
    write_output(output, dump_sweep(rows, kind, source=output))
    if None not in grid.bandwidth_mbps:
        cluster = vary_cluster(cluster, bandwidth_mbps=grid.bandwidth_mbps[0])
    offload = [solver == OFFLOAD for solver in grid.solver]
    log_assumed_simulation_figures(args.cluster, cluster, options.simulation, offload)
    failed = [row for row in rows if row["status"] != OK]
    name = "standard output" if output == "-" else output
    log_info(
        f"{name}: {len(rows)} of {grid.runs} runs"
        + (" (interrupted)" if interrupted or ended else "")
    )
    for line in sorted({row["status"] for row in failed})[:5]:
        number = sum(row["status"] == line for row in failed)
        log_info(f"{number} of {len(rows)} runs failed: {line}")
    if ended is not None:
        raise ended
    if interrupted:
        return 130
    return 2 if rows and len(failed) == len(rows) else 0
