"""The command ``prism-runtime move``."""

from __future__ import annotations

from dataclasses import dataclass

import click

from prism_plan.cli.options_dataclass import options_as
from runtime_adapter.cli.options import (
    SecretOptions,
    address,
    log_options,
    require_seconds,
    secret_options,
    store_option,
)
from runtime_adapter.log_output import log_info


@dataclass(frozen=True, kw_only=True)
class MoveOptions(SecretOptions):
    """The options of ``move``."""

    store: str
    placement: str
    rendezvous_timeout_s: float


@click.command("move")
@store_option
@click.option("--placement", required=True, metavar="NEW.json", help="Target placement.")
@click.option(
    "--join",
    "rendezvous_timeout_s",
    default=10.0,
    show_default=True,
    metavar="S",
    help="Seconds to wait for the store.",
)
@secret_options
@log_options
@options_as(MoveOptions)
def command(args: MoveOptions) -> None:
    """Move the experts of a run to another placement, while it serves.

    Requests that start once they have moved execute where the new placement says; those that run
    go on as they began.
    The run was started with --movable or --migrate. Waits until the move is done, refused or
    abandoned: exit code 0, 2 or 3, 5.
    """
    from prism_plan.io.placement import placement_to_json, read_placement
    from runtime_adapter.control.move_command import request_move
    from runtime_adapter.control.store.client import StoreAddress

    args.configure_log()
    require_seconds(args.rendezvous_timeout_s, "rendezvous_timeout_s")
    placement = read_placement(args.placement)
    host, port = address(args.store)
    code, text = request_move(
        StoreAddress(host, port, args.secret()),
        placement_to_json(placement),
        args.rendezvous_timeout_s,
        log_info,
    )
    log_info(f"{args.placement}: {text}")
    if code:
        raise click.exceptions.Exit(code)
