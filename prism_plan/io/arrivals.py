"""Arrivals at fixed times: JSON Lines of ``{"server": "edge-0", "at_s": 1.5}``.

A line may have a ``task`` (otherwise it is drawn by the server's shares) and a ``request``, the id
of a request of the trace (otherwise it is drawn from the task's).
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

from pydantic import Field

from prism_plan.errors import InputError
from prism_plan.input_limits import MAX_ARRIVALS, require_at_most
from prism_plan.io.pydantic_base import FormatModel, NotBlank, validate_line
from prism_plan.io.text_files import iterate_lines, read_text
from prism_plan.simulate.arrival_trace import MAX_S, Arrival, ArrivalTrace

EXAMPLE = '{"server": …, "at_s": …}'


class ArrivalLine(FormatModel):
    """One request: where and when."""

    server: NotBlank
    at_s: Annotated[float, Field(ge=0, le=MAX_S)] = Field(description="Seconds from the start.")
    task: NotBlank | None = None
    request: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        default=None, description="Id of a request of the trace."
    )


def read_arrivals(path: str | os.PathLike[str]) -> ArrivalTrace:
    """Read and check a file of arrivals; blank lines are skipped.

    Raises
    ------
    InputError
        Names the file, the line, the value and what was expected. Servers, tasks and ids are
        looked up later, where cluster and trace are known.
    """
    return parse_arrivals(read_text(path), source=path)


def parse_arrivals(text: str, source: object = "") -> ArrivalTrace:
    """Arrivals from the text of a file; see :func:`read_arrivals`."""
    arrivals = []
    for number, line in enumerate(iterate_lines(text), start=1):
        if line.strip():
            found = validate_line(ArrivalLine, line, number, source, EXAMPLE)
            server, task = sys.intern(found.server), found.task and sys.intern(found.task)
            arrivals.append(Arrival(server, found.at_s, task, found.request, number))
            require_at_most(len(arrivals), MAX_ARRIVALS, "arrivals", source=source)
    if not arrivals:
        raise InputError("no arrivals", source=source, expected=f"lines {EXAMPLE}")
    return ArrivalTrace(tuple(arrivals), source=str(source))
