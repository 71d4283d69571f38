"""The command ``prism-runtime store``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from prism_plan.cli.options_dataclass import options_as
from prism_plan.errors import InputError
from runtime_adapter.cli.options import SecretOptions, log_options, secret_options

if TYPE_CHECKING:
    from runtime_adapter.control.store.client import StoreAddress


@dataclass(frozen=True, kw_only=True)
class StoreOptions(SecretOptions):
    """The options of ``store``."""

    listen: str
    placements_dir: str | None
    trace: str | None
    keep: bool
    with_parent: int | None


@click.command("store")
@click.option(
    "--listen",
    required=True,
    metavar="HOST:PORT",
    help="Address of this machine that all servers reach; port 0: any that is free.",
)
@secret_options
@click.option("--placements-dir", metavar="DIR", help="Write placement-K.json after every move.")
@click.option(
    "--trace",
    metavar="T.parquet",
    help="Recorded requests, by which reviews plan where layers execute.",
)
@click.option(
    "--keep/--once",
    default=False,
    show_default=True,
    help="When all servers have left, wait for the next run, or end.",
)
@click.option(
    "--with-parent", type=int, metavar="PID", help="End with this process, which has started it."
)
@log_options
@options_as(StoreOptions)
def command(args: StoreOptions) -> None:
    """Keep the members and the log of a run, and schedule its moves.

    A process that needs no GPU and no checkpoint, on any machine that all servers reach; they are
    given its address as --store. Starts its own parts again if they die. When it is started again
    itself, the servers join again, and the run goes on. Ends with exit code 0 when all servers have
    left.
    """
    import os
    import signal
    import sys

    from prism_plan.io.file_writing import require_writable_folder
    from prism_plan.io.trace_reader import read_trace
    from runtime_adapter.control.store.supervisor import StoreConfig, run_store

    args.configure_log()
    host, port = _listen_address(args.listen)
    secret = args.secret()
    if args.with_parent is not None and args.with_parent != os.getppid():
        raise InputError(
            f"{args.with_parent}",
            parameter="with_parent",
            expected=f"the process that started this one, {os.getppid()}",
        )
    if args.with_parent is None:  # which has said so, and ends this process when it likes
        args.require_secret_for(host)
    else:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if args.placements_dir is not None:
        require_writable_folder(args.placements_dir)
    if args.trace is not None:
        read_trace(args.trace)  # the scheduler's process does so too; here it is told at once
    run_store(
        StoreConfig(
            host=host,
            port=port,
            secret=secret,
            placements_dir=args.placements_dir,
            trace=args.trace,
            keep=args.keep,
            parent_pid=args.with_parent,
            log_level=args.log_level,
            log_format=args.log_format,
        ),
        schedule,
    )


def schedule(address: StoreAddress, placements_dir: str | None, trace: str | None) -> None:
    """The scheduler's process; the others do not load its solvers."""
    from runtime_adapter.control.scheduler import run_scheduler

    run_scheduler(address, placements_dir, trace)


def _listen_address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise InputError(
            f"{text!r:.60}", parameter="listen", expected="HOST:PORT, a port from 0 to 65535"
        )
    return host.strip("[]"), int(port)
