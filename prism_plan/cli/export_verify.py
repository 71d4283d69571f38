"""``prism-plan export-verify``."""

from __future__ import annotations

from dataclasses import dataclass

import click

from prism_plan.cli.options_dataclass import CommandOptions, options_as


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(CommandOptions):
    """The arguments of ``prism-plan export-verify``."""

    output: str
    log: str


@click.command("export-verify")
@click.argument("output", metavar="OUT")
@click.argument("log", metavar="LOG")
@options_as(VerifyOptions)
def command(args: VerifyOptions) -> int:
    """Say whether llama.cpp put every layer and tensor where an export says.

    OUT is the script of `export --engine llamacpp`, with OUT.export.json beside it; LOG is what
    llama-server -v has written. Exit code 3 where something is elsewhere.
    """
    from prism_plan.cli.console import log_info, print_line
    from prism_plan.errors import InputError
    from prism_plan.export.llamacpp import read_placing
    from prism_plan.export.llamacpp_log import differs_from_export, verify_log
    from prism_plan.io.export import SIDECAR, read_export
    from prism_plan.io.text_files import read_text

    sidecar = read_export(args.output + SIDECAR)
    if sidecar.engine != "llamacpp":
        raise InputError(
            f"{sidecar.engine}", source=args.output, expected="an export to llamacpp, which logs it"
        )
    placing = read_placing(read_text(args.output), args.output)
    layers = sidecar.num_hidden_layers
    problems = differs_from_export(placing, sidecar)
    problems += verify_log(read_text(args.log).splitlines(), placing, layers, args.log)
    for problem in problems[:20]:
        log_info(f"{args.log}: {problem}")
    if len(problems) > 20:
        log_info(f"{args.log}: and {len(problems) - 20} more")
    verdict = "elsewhere" if problems else "as planned"
    print_line(
        f"{args.log}: {verdict}: {layers} layers, {len(placing.overrides)} with experts away"
    )
    return 3 if problems else 0
