"""``prism-plan diff``."""

from __future__ import annotations

import click


@click.command("diff")
@click.argument("a", metavar="A.json")
@click.argument("b", metavar="B.json")
@click.option("--json", "as_json", is_flag=True, help="Print every moved expert as JSON.")
def command(a: str, b: str, as_json: bool) -> None:
    """Show what moves from placement A to placement B: experts and bytes, per server and layer."""
    from prism_plan.cli.console import byte_size, print_json, print_table
    from prism_plan.moves import diff
    from prism_plan.placement_file import read_placement

    result = diff(read_placement(a), read_placement(b), (a, b))
    if as_json:
        print_json(result.to_json())
        return
    moved = result.loads | result.shifts
    table = [
        [
            name,
            f"{int(result.loads[n].sum()):,}",
            f"{int(result.drops[n].sum()):,}",
            f"{int(result.shifts[n].sum()):,}",
            byte_size(result.bytes_of(moved[n])),
        ]
        for n, name in enumerate(result.servers)
    ]
    kinds = (result.loads, result.drops, result.shifts)
    table.append(
        ["total", *(f"{int(mask.sum()):,}" for mask in kinds), byte_size(result.bytes_of(moved))]
    )
    columns = ["loads", "drops", "between GPUs", "bytes to load"]
    print_table(["server", *columns], table, title=f"{a} → {b}")
    of_layer = [
        [str(layer), *(f"{int(mask[:, at].sum()):,}" for mask in kinds),
         byte_size(result.model.expert_bytes_by_layer[at] * int(moved[:, at].sum()))]
        for at, layer in enumerate(result.model.moe_layers)
        if any(mask[:, at].any() for mask in kinds)
    ]  # fmt: skip
    if of_layer:
        print_table(["layer", *columns], of_layer)
