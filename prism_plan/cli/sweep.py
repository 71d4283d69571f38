"""``prism-plan simulate --sweep``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from prism_plan.cli.command_options import option_names

if TYPE_CHECKING:
    from prism_plan.cli.simulate import SimulateOptions


def run_sweep(given: SimulateOptions) -> int:
    """Simulate a grid and write its table; returns the exit code."""
    import dataclasses

    from prism_plan.cli.console import deliver, load_trace, note, progress
    from prism_plan.cli.inputs import blaming, load_cluster, solver_names, writable
    from prism_plan.cli.simulate import note_simulated
    from prism_plan.errors import InputError
    from prism_plan.evaluate.sweep import SweepOptions, sweep
    from prism_plan.evaluate.sweep_grid import Grid, parse_grid, vary_cluster
    from prism_plan.io.sweep import OK, dump_sweep, sweep_kind
    from prism_plan.placement import OFFLOAD

    output = given.output
    if output is None:
        raise InputError("no table to write", parameter="grid", expected="-o R.parquet or -o R.csv")
    kind = "csv" if output == "-" else sweep_kind(output)
    writable(output, given.trace, given.cluster, given.calibration)
    texts = list(given.grid)
    asked = (solver_names(given.solvers) or []) + [OFFLOAD] * given.offload
    if asked:
        texts.append(f"solver={','.join(asked)}")
    grid: Grid = parse_grid(texts)
    if "seed=" not in "".join(texts).replace(" ", ""):
        grid = dataclasses.replace(grid, seed=(given.seed,))
    options = SweepOptions(
        requests_per_server=20 if given.requests_per_server is None else given.requests_per_server,
        burst=given.burst,
        decode_tokens=given.decode_tokens,
        prompt_tokens=given.prompt_tokens,
        holdout=given.holdout,
        min_replicas=given.min_replicas,
        simulation=given.simulation_options(),
    )
    cluster, _ = load_cluster(given.cluster)
    trace = load_trace(given.trace)
    rows: list[dict[str, Any]] = []
    interrupted = False
    with progress(grid.runs, "runs") as update, blaming(given.cluster):
        try:
            for row in sweep(
                trace, cluster, grid, options, jobs=given.jobs,
                progress=lambda done: update("simulating", done),
                names=option_names(click.get_current_context()),
            ):  # fmt: skip
                rows.append(row)
        except KeyboardInterrupt:
            interrupted = True
    if interrupted and not rows:
        raise KeyboardInterrupt
    deliver(output, dump_sweep(rows, kind, source=output))
    if None not in grid.bandwidth_mbps:
        cluster = vary_cluster(cluster, bandwidth_mbps=grid.bandwidth_mbps[0])
    offload = [solver == OFFLOAD for solver in grid.solver]
    note_simulated(given.cluster, cluster, options.simulation, offload)
    failed = [row for row in rows if row["status"] != OK]
    name = "standard output" if output == "-" else output
    note(f"{name}: {len(rows)} of {grid.runs} runs" + (" (interrupted)" if interrupted else ""))
    for line in sorted({row["status"] for row in failed})[:5]:
        number = sum(row["status"] == line for row in failed)
        note(f"{number} of {len(rows)} runs failed: {line}")
    if interrupted:
        return 130
    return 2 if rows and len(failed) == len(rows) else 0
