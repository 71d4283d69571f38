"""Requests to a served checkpoint: JSON Lines of ``{"prompt": text}`` and optional keys."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from prism_plan.input_limits import require_at_most
from prism_plan.io.pydantic_base import (
    Amount,
    Expected,
    FormatModel,
    NotBlank,
    Positive,
    validate_line,
)
from prism_plan.io.text_files import iterate_lines, read_text

#: Requests are numbered over all servers, as the route ``spread`` needs it.
MAX_REQUESTS = 1 << 20
#: Seconds from the start to the last arrival: three years.
MAX_AT_S = 1e8

Whole = Annotated[int, Field(gt=-(2**63), lt=2**63)]


class RequestLine(FormatModel):
    """A prompt, and what to do with it."""

    prompt: NotBlank
    task: str = ""
    id: Annotated[str | Whole | None, Expected("a text or a whole number")] = None
    at_s: Annotated[Amount, Field(le=MAX_AT_S)] = Field(
        default=0.0, description="Its arrival, in seconds from the start."
    )
    max_new_tokens: Positive | None = None


@dataclass(frozen=True)
class Request:
    """One line of a file of requests; ``at_s`` is when it arrives, since the run began."""

    line: int
    prompt: str
    task: str = ""
    id: str | int | None = None
    at_s: float = 0.0
    max_new_tokens: int | None = None


def read_requests(path: str | os.PathLike[str]) -> list[Request]:
    """Requests in the order of their arrival; a file may be empty.

    Raises
    ------
    InputError
        The file cannot be read, or a line is no JSON object with a ``prompt`` and, where given,
        ``task``, ``id``, ``at_s`` and ``max_new_tokens``; names the line.
    """
    found = []
    for number, text in enumerate(iterate_lines(read_text(path)), start=1):
        if text.strip():
            found.append(request_from_line(text, path, number))
            require_at_most(len(found), MAX_REQUESTS, "requests", source=path)
    return sorted(found, key=lambda request: request.at_s)


def request_from_line(text: str, source: object, number: int) -> Request:
    """The request of one line; see :func:`read_requests`."""
    line = validate_line(RequestLine, text, number, source, '{"prompt": ...}')
    return Request(number, **dict(line))
