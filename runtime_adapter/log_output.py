"""The lines that a process of the runtime writes to standard error: as text, or as JSON.

Everything goes through the logger ``runtime_adapter`` of Python's :mod:`logging`. A line of text is
``prism-runtime: message``; one of JSON is an object with ``time`` (seconds since 1970), ``level``,
``server`` (null in a process of no server) and ``message``.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Literal, get_args

from prism_plan.cli.internal_errors import write_lines_with
from prism_plan.printable_text import printable
from runtime_adapter import PROGRAM

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["text", "json"]
LEVELS: tuple[Level, ...] = get_args(Level)
FORMATS: tuple[Format, ...] = get_args(Format)

_LOGGER = logging.getLogger("runtime_adapter")


class _LineFormatter(logging.Formatter):
    """One printable line a record, whatever its message contains."""

    def __init__(self, log_format: Format, server: str | None) -> None:
        super().__init__()
        self._json = log_format == "json"
        self._server = server

    def format(self, record: logging.LogRecord) -> str:
        message = printable(" ".join(record.getMessage().split()))
        if not self._json:
            return f"{PROGRAM}: {message}"
        values = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "server": self._server,
            "message": message,
        }
        return json.dumps(values)


class _StandardError(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what is standard error at that moment; where that is closed, lines are lost."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        if self.stream is not None:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """A line that cannot be written is lost, without a traceback."""


def configure(
    level: Level = "info", log_format: Format = "text", server: str | None = None
) -> None:
    """Say which lines this process writes, and how; a later call replaces an earlier one."""
    handler = _StandardError()
    handler.setFormatter(_LineFormatter(log_format, server))
    _LOGGER.handlers[:] = [handler]
    _LOGGER.setLevel(level.upper())
    _LOGGER.propagate = False
    # lines of the boundary of errors, and warnings, are lines of this log
    write_lines_with(log_error if log_format == "json" else None)


def log_debug(message: str) -> None:
    """Write a line for whoever looks for a fault."""
    _log(logging.DEBUG, message)


def log_info(message: str) -> None:
    """Write a line about what happens as it should."""
    _log(logging.INFO, message)


def log_warning(message: str) -> None:
    """Write a line about what the run survives, but somebody should look at."""
    _log(logging.WARNING, message)


def log_error(message: str) -> None:
    """Write a line about what has failed."""
    _log(logging.ERROR, message)


def _log(level: int, message: str) -> None:
    if not _LOGGER.handlers:
        configure()
    _LOGGER.log(level, "%s", message)
