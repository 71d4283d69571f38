"""The command ``prism-runtime status``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from prism_plan.cli.options_dataclass import CommandOptions, options_as
from runtime_adapter.cli.options import address, require_seconds, store_option

#: Longest text of a server's last error in the table; JSON has all of it.
_MAX_ERROR = 60


@dataclass(frozen=True, kw_only=True)
class StatusOptions(CommandOptions):
    """The options of ``status``."""

    store: str
    secret_file: str | None
    timeout_s: float
    as_json: bool


@click.command("status")
@store_option
@click.option("--secret-file", metavar="FILE", help="The secret of the run, if it has one.")
@click.option(
    "--timeout",
    "timeout_s",
    default=5.0,
    show_default=True,
    metavar="S",
    help="Seconds to wait for the store.",
)
@click.option("--json", "as_json", is_flag=True, help="Print all that the store says as JSON.")
@options_as(StatusOptions)
def command(args: StatusOptions) -> int:
    """Show the servers of a run: their states, requests, experts and last errors.

    Exit code 0: every server is up and heard, or has left in good order. 1: some server is not, or
    there is no run yet. 5: the store does not answer.
    """
    from runtime_adapter.control.store.client import StoreAddress, StoreClient
    from runtime_adapter.transport.secrets import NO_SECRET, read_secret

    require_seconds(args.timeout_s, "timeout_s")
    secret = NO_SECRET if args.secret_file is None else read_secret(args.secret_file)
    client = StoreClient(StoreAddress(*address(args.store), secret), "status")
    try:
        status = client.status(args.timeout_s)
    finally:
        client.close()
    for member in status["members"]:
        member["shown_state"] = _shown_state(member, status["timeout_s"])
    if args.as_json:
        from prism_plan.cli.console import print_json

        print_json(status)
    else:
        _print_table(status["members"])
        _print_scheduler(status)
    return int(not status["members"] or not all(map(_is_well, status["members"])))


def _shown_state(member: dict[str, Any], timeout_s: float) -> str:
    """The state of a server in the log, or ``silent`` if its worker or driver is not heard."""
    silences = (member["worker_silent_s"], member["driver_silent_s"])
    is_silent = any(silent_s is not None and silent_s > timeout_s for silent_s in silences)
    return "silent" if member["state"] == "up" and is_silent else str(member["state"])


def _is_well(member: dict[str, Any]) -> bool:
    return member["shown_state"] in ("up", "left")


def _print_table(members: Sequence[dict[str, Any]]) -> None:
    from prism_plan.cli.console import print_line
    from prism_plan.cli.tables import count_column, number_column, print_table, text_column

    if not members:
        print_line("no run has been started at this store")
        return
    requests = [member["info"].get("requests", {}) for member in members]
    errors = [str(member["info"].get("error") or "") for member in members]
    print_table(
        [
            text_column("server", "server", [member["name"] for member in members]),
            text_column("state", "state", [member["shown_state"] for member in members]),
            number_column("for s", "since_s", [m["since_s"] for m in members], digits=0, rank=3),
            count_column("starts", "incarnation", [m["incarnation"] for m in members], rank=5),
            count_column("experts", "experts", [m["experts"] for m in members], rank=2),
            *(
                count_column(name, name, [counts.get(name) for counts in requests], rank=1)
                for name in ("running", "done", "failed")
            ),
            text_column(
                "last error",
                "error",
                [
                    error if len(error) <= _MAX_ERROR else f"{error[:_MAX_ERROR]}…"
                    for error in errors
                ],
                rank=4,
            ),
        ]
    )


def _print_scheduler(status: dict[str, Any]) -> None:
    from prism_plan.cli.console import print_line

    scheduler = status["scheduler"]
    silent_s = scheduler["silent_s"]
    heard = "never heard" if silent_s is None else f"heard {silent_s:.1f} s ago"
    plans = ", ".join(map(str, status["open_plans"][:10]))
    migration = scheduler["migration"] or (f"migration {plans} in progress" if plans else "no move")
    print_line(f"scheduler: {heard}; {migration}")
