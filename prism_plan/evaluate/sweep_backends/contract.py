"""What a back end of sweeps does, and what all of them share."""

from __future__ import annotations

import socket
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

from prism_plan.errors import InputError, LimitReached

#: How often a call is run again whose worker was lost.
MAX_LOSSES = 3
#: Seconds to wait for an answer of a scheduler.
CONNECT_S = 10


class Backend(Protocol):
    """Workers that call functions; a call whose worker is lost is made again elsewhere."""

    def num_workers(self) -> int:
        """How many calls run at once, as far as is known now; at least 1."""

    def share(self, value: Any) -> Any:
        """Make a value known to all workers; what is returned stands for it in arguments."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Hashable:
        """Have a worker call a function of a module; returns a handle of the call.

        Arguments may be handles of calls that are done, and stand for their results.
        """

    def next_done(self) -> Hashable:
        """Wait for a call that is done, and return its handle, each call's once."""

    def result(self, handle: Hashable) -> Any:
        """What a call that is done has returned; the exception that it has raised is raised."""

    def close(self) -> None:
        """End the calls that still run, and the workers that were started here."""


def lost_worker(backend: str) -> LimitReached:
    """The error of a call whose workers were lost again and again."""
    return LimitReached(
        f"{backend}: workers that ran the same cells were lost {MAX_LOSSES + 1} times, perhaps "
        "for lack of memory; use fewer workers, or ``jobs``, or a smaller sweep"
    )


def unreachable(scheduler: str | None, error: BaseException) -> InputError:
    """The error of a scheduler that does not answer, or not any more."""
    text = " ".join(str(error).split()) or type(error).__name__
    return InputError(
        f"{scheduler or 'the local cluster'}: {text:.160}",
        parameter="scheduler",
        expected="the address of a scheduler that runs, with workers",
    )


def require_reachable(scheduler: str, schemes: Sequence[str]) -> None:
    """Refuse an address where nothing listens: the libraries try for minutes, and not quietly.

    Raises
    ------
    InputError
        Nothing listens there, or it is not ``HOST:PORT`` after one of the ``schemes``, if any.
    """
    scheme, separator, rest = scheduler.rpartition("://")
    host, _, port = rest.rpartition(":")
    if (separator and scheme not in schemes) or not host or not port.isdecimal():
        raise InputError(
            f"{scheduler!r:.80}",
            parameter="scheduler",
            expected=f"HOST:PORT, perhaps after {' or '.join(f'{each}://' for each in schemes)}",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise unreachable(scheduler, error) from error


def unlike_worker(error: ModuleNotFoundError) -> InputError:
    """The error of a worker that lacks a module which is installed here."""
    return InputError(
        f"on a worker: {error}",
        parameter="scheduler",
        expected="workers with the Python packages of this machine",
        remedy="install prism-plan for the workers",
    )
