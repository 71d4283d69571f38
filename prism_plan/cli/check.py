"""``prism-plan check``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from prism_plan.cli.inputs import ENGINES
from prism_plan.cli.options_dataclass import TableOptions, error_line, options_as
from prism_plan.cli.tables import format_option
from prism_plan.errors import InputError, PrismError

if TYPE_CHECKING:
    from prism_plan.check.report import CheckReport
    from prism_plan.io.export import Engine
    from prism_plan.model_spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class CheckOptions(TableOptions):
    """The options and arguments of ``prism-plan check``."""

    files: tuple[str, ...]
    cluster: str | None
    trace: str | None
    model: str | None
    placement: str | None
    engine: Engine | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine is not None:
            found = "has no effect on files of an engine"
            self.refuse("cluster", "trace", "placement", found=found)
            return
        if self.cluster is None and not any(file.endswith(".toml") for file in self.files):
            for option, value in (("--trace", self.trace), ("--model", self.model)):
                if value is not None:
                    raise click.UsageError(
                        f"{option} needs --cluster, or a cluster to check",
                        ctx=click.get_current_context(),
                    )
        if self.trace is not None and self.model is not None:
            raise click.UsageError(
                "--model with --trace, which says the model", ctx=click.get_current_context()
            )
        if self.placement is None:
            return
        if self.trace is None and self.model is None:
            raise InputError(
                "a placement does not say how large the dense part and a KV cache are",
                parameter="placement",
                expected="``model`` or ``trace`` beside it",
            )
        if not any(file.endswith(".toml") for file in self.files):
            raise InputError(
                f"no cluster to check is among {', '.join(self.files)}",
                parameter="placement",
                expected="a cluster, C.toml, as FILE",
                remedy="check a placement itself as FILE, with ``cluster``",
            )


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
    help="Check clusters with this trace, as solve would; with --cluster: placements against its "
    "memory and rules too, and recompute remote shares.",
)
@click.option(
    "--model",
    metavar="MODEL",
    help="Instead of --trace: a model's sizes, for memory and rules alone; as in profile.",
)
@click.option(
    "--placement",
    metavar="P.json",
    help="With --model or --trace: check clusters for this placement, its experts and its KV "
    "caches where layers execute.",
)
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    help="Take files as this engine's, as export writes them; with --model for its layers.",
)
@format_option
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
@options_as(CheckOptions)
def command(args: CheckOptions) -> int:
    """Check files: valid? If not, where and why.

    All that the commands read and write: traces, clusters, placements, comparisons, simulations,
    migrations, sweeps, calibrations, phases.

    A cluster is refused where every solver would refuse it, or with --placement where that does
    not fit. With --trace or --model the memory of every GPU is printed.

    Exit code 2 if a file is malformed or asks for what makes no sense, 3 if a well-formed
    placement breaks a constraint or no placement can satisfy a cluster.
    """
    from prism_plan.check.report import check_file
    from prism_plan.cli.console import load_trace, log_info, print_json, print_line
    from prism_plan.cli.inputs import load_cluster, read_model_spec
    from prism_plan.io.placement import read_placement

    cluster = None if args.cluster is None else (args.cluster, *load_cluster(args.cluster))
    trace = None if args.trace is None else (args.trace, load_trace(args.trace))
    model = None if args.model is None else (args.model, read_model_spec(args.model))
    placement = None
    if args.placement is not None:
        placement = (args.placement, read_placement(args.placement))
    code = 0
    found: list[dict[str, Any]] = []
    warnings: dict[str, None] = {}  # in order, and each once for all files
    for path in args.files:
        try:
            if args.engine is not None:
                report = _check_engine_file(path, args.engine, model)
            else:
                report = check_file(
                    path, cluster=cluster, trace=trace, model=model, placement=placement
                )
        except PrismError as error:
            code = 2 if 2 in (code, error.exit_code) else error.exit_code
            log_info(error_line(error))
            found.append({"file": path, "valid": False, "problems": [error_line(error)]})
            continue
        found.append(report.to_json())
        if report.problems and code == 0:
            code = 3
        for problem in report.problems[:10]:
            log_info(f"{path}: {problem}")
        if len(report.problems) > 10:
            log_info(f"{path}: and {len(report.problems) - 10} more problems (--json lists all)")
        warnings.update(dict.fromkeys(report.warnings))
        if not args.as_json:
            verdict = "INVALID" if report.problems else "ok"
            aside = args.table_format != "table"  # then standard output holds the tables alone
            print_line(f"{path}: {verdict}: {report.kind}: {report.summary}", err=aside)
            for text in report.notes:
                print_line(f"{path}: note: {text}", err=aside)
            if report.memory:
                _print_memory(path, found[-1]["memory"], args.table_format)
    for text in warnings:
        log_info(text)
    if args.as_json:
        print_json(found)
    return code


def _check_engine_file(
    path: str, engine: Engine, model: tuple[str, ModelSpec] | None
) -> CheckReport:
    from prism_plan.check.report import CheckReport
    from prism_plan.export.engine_checks import check_engine_file

    summary, problems = check_engine_file(path, engine, None if model is None else model[1])
    return CheckReport(path, f"export to {engine}", summary, tuple(problems))


def _print_memory(path: str, rows: Sequence[Mapping[str, Any]], form: str) -> None:
    from prism_plan.cli.tables import count_column, print_table, size_column, text_column

    def of(key: str) -> list[Any]:
        return [row[key] for row in rows]

    names = [row.get("name") for row in rows]

    columns = [
        text_column("server", "server", of("server")),
        text_column("GPU", "gpu", [f"gpu[{number}]" for number in of("gpu")]),
        *([text_column("its name", "name", names, rank=5)] if any(names) else []),
        size_column("usable", "usable_bytes", of("usable_bytes"), rank=1),
        size_column("dense", "dense_bytes", of("dense_bytes")),
        size_column("KV cache", "kv_bytes", of("kv_bytes")),
        size_column("reserve", "reserve_bytes", of("reserve_bytes"), rank=2),
        size_column("for experts", "for_experts_bytes", of("for_experts_bytes"), rank=6),
        count_column("slots", "slots", of("slots"), rank=3),
        count_column("experts", "experts", of("experts")),
        size_column("their bytes", "expert_bytes", of("expert_bytes"), rank=4),
        size_column("free", "free_bytes", of("free_bytes")),
    ]
    print_table(columns, title=f"{path}: memory of every GPU", form=form)
