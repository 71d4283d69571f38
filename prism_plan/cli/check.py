"""``prism-plan check``."""

from __future__ import annotations

import click

from prism_plan.errors import PrismError


@click.command("check")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--cluster",
    metavar="C.toml",
    help="Check placements against this cluster: servers, GPUs, slots.",
)
@click.option(
    "--trace",
    metavar="T.parquet",
    help="With --cluster: its memory too, and recompute remote shares.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    files: tuple[str, ...],
    cluster: str | None,
    trace: str | None,
    as_json: bool,
) -> None:
    """Check files: valid? If not, where and why.

    All that the commands read and write: traces, clusters, placements, comparisons, simulations,
    migrations, sweeps, calibrations, phases.

    Exit code 2 if a file is malformed, 3 if a well-formed placement breaks a constraint.
    """
    from prism_plan.check import check_file
    from prism_plan.cli.console import load_trace, note, print_json, print_line
    from prism_plan.cli.inputs import load_cluster

    if trace is not None and cluster is None:
        raise click.UsageError("--trace needs --cluster", ctx=ctx)
    against_cluster = None if cluster is None else (cluster, *load_cluster(cluster))
    against_trace = None if trace is None else (trace, load_trace(trace))
    code = 0
    found = []
    for path in files:
        try:
            report = check_file(path, cluster=against_cluster, trace=against_trace)
        except PrismError as error:
            code = 2 if 2 in (code, error.exit_code) else error.exit_code
            note(str(error))
            found.append({"file": path, "valid": False, "problems": [str(error)]})
            continue
        found.append(report.to_json())
        if report.problems and code == 0:
            code = 3
        for problem in report.problems[:10]:
            note(f"{path}: {problem}")
        if len(report.problems) > 10:
            note(f"{path}: and {len(report.problems) - 10} more problems (--json lists all)")
        if not as_json:
            verdict = "INVALID" if report.problems else "ok"
            print_line(f"{path}: {verdict}: {report.kind}: {report.summary}")
            for text in report.notes:
                print_line(f"{path}: note: {text}")
    if as_json:
        print_json(found)
    ctx.exit(code)
