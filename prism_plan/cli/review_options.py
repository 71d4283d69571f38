"""Options of reviews that may move experts, of the simulator and of the runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

OPTIONS = (
    click.option(
        "--migrate",
        type=click.Choice(["never", "prism", "partial"]),
        default="never",
        show_default=True,
        help="Policy of the reviews that may move experts.",
    ),
    click.option(
        "--migrate-every", default=300.0, show_default=True, metavar="S", help="Between reviews."
    ),
    click.option(
        "--statistics",
        type=click.Choice(["window", "cumulative"]),
        default="window",
        show_default=True,
        help="Reviews go by recent calls, or by all since the last move.",
    ),
    click.option(
        "--half-life", type=float, metavar="S", help="Of the window; default: --migrate-every."
    ),
    click.option(
        "--horizon",
        type=float,
        metavar="S",
        help="A move must pay within; default: --migrate-every.",
    ),
    click.option(
        "--migration-cost",
        type=click.Choice(["sum", "max"]),
        default="sum",
        show_default=True,
        help="Of loads: all added up, or the busiest GPU's.",
    ),
    click.option(
        "--migrate-solver",
        default="prism",
        show_default=True,
        metavar="NAME",
        help="Plans what policy prism may adopt.",
    ),
)


def review_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add them to a command, in their order."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command
