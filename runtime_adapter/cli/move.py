"""``python -m runtime_adapter move``."""

from __future__ import annotations

from typing import Any

import click

from runtime_adapter.cli.options import note, store_option


@click.command("move")
@store_option
@click.option("--placement", required=True, metavar="NEW.json", help="Where to.")
@click.option("--join", default=10.0, show_default=True, metavar="S", help="For the store.")
def command(**given: Any) -> None:
    """Move the experts of a run to another placement, while it serves.

    The run was started with --movable or --migrate. Waits until the move is done, refused or
    abandoned: exit code 0, 2 or 3, 5.
    """
    import math

    from prism_plan.errors import InputError
    from prism_plan.io.placement import placement_to_json, read_placement
    from runtime_adapter.cli.options import address
    from runtime_adapter.links import Meeting
    from runtime_adapter.move import ask

    if not 0 < given["join"] < math.inf:
        raise InputError(f"{given['join']}", source="--join", expected="seconds above 0")
    placement = read_placement(given["placement"])
    host, port = address(given["store"])
    code, text = ask(
        Meeting(1, -1, host=host, port=port, join_s=given["join"]),
        placement_to_json(placement),
        note,
    )
    note(f"{given['placement']}: {text}")
    if code:
        raise click.exceptions.Exit(code)
