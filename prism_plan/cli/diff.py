"""``prism-plan diff``."""

from __future__ import annotations

from dataclasses import dataclass

import click

from prism_plan.cli.options_dataclass import TableOptions, options_as
from prism_plan.cli.tables import format_option


@dataclass(frozen=True, kw_only=True)
class DiffOptions(TableOptions):
    """The options and arguments of ``prism-plan diff``."""

    a: str
    b: str


@click.command("diff")
@click.argument("a", metavar="A.json")
@click.argument("b", metavar="B.json")
@format_option
@click.option("--json", "as_json", is_flag=True, help="Print every moved expert as JSON.")
@options_as(DiffOptions)
def command(args: DiffOptions) -> None:
    """Show what moves from placement A to placement B: experts and bytes, per server and layer."""
    from prism_plan.cli.console import print_json
    from prism_plan.cli.tables import count_column, print_table, size_column, text_column
    from prism_plan.io.placement import read_placement
    from prism_plan.placement_diff import diff

    result = diff(read_placement(args.a), read_placement(args.b), (args.a, args.b))
    if args.as_json:
        print_json(result.to_json())
        return
    moved = result.loads | result.shifts
    kinds = (
        ("loads", "loads", result.loads),
        ("drops", "drops", result.drops),
        ("between GPUs", "between_gpus", result.shifts),
    )
    columns = [text_column("server", "server", [*result.servers, "total"])]
    for heading, key, mask in kinds:
        of_server = [int(mask[n].sum()) for n in range(len(result.servers))]
        columns.append(count_column(heading, key, [*of_server, int(mask.sum())]))
    if result.reroutes.any():
        rerouted = result.reroutes.sum(axis=1).tolist()
        columns.append(
            count_column("layers elsewhere", "layers_elsewhere", [*rerouted, sum(rerouted)])
        )
    loaded = [result.bytes_of(moved[n]) for n in range(len(result.servers))]
    columns.append(
        size_column("to load", "bytes_to_load", [*loaded, result.bytes_of(moved)], rank=1)
    )
    print_table(columns, title=f"{args.a} → {args.b}", form=args.table_format)
    layers = [
        at
        for at in range(len(result.model.moe_layers))
        if any(mask[:, at].any() for _, _, mask in kinds)
    ]
    if not layers:
        return
    columns = [text_column("layer", "layer", [str(result.model.moe_layers[at]) for at in layers])]
    for heading, key, mask in kinds:
        columns.append(count_column(heading, key, [int(mask[:, at].sum()) for at in layers]))
    size = result.model.expert_bytes_by_layer
    loaded = [size[at] * int(moved[:, at].sum()) for at in layers]
    columns.append(size_column("to load", "bytes_to_load", loaded, rank=1))
    if args.table_format == "csv":  # a second table begins after a blank line
        click.echo()
    print_table(columns, form=args.table_format)
