"""Read files of responses: JSON Lines, a JSON array or object, or streamed responses as events.

The first line decides: that of an event stream has a field of Server-Sent Events
(``data: {...}``), that of JSON Lines is JSON by itself. A line may be a list of responses. Any of
them may be compressed with gzip.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prism_plan.errors import InputError
from prism_plan.io.bad_rows import BadRows
from prism_plan.io.gzip_text import read_maybe_gzipped_text
from prism_plan.io.json import parse_json
from prism_plan.io.json_lines import json_lines, text_lines
from prism_plan.io.location import Location
from prism_plan.io.open_file import OpenFile
from prism_plan.profiling.responses.event_stream import is_event, merge_streams


def read_responses(path: Path, bad: BadRows) -> Iterator[tuple[Location, Any]]:
    """Yield each response of a file, as parsed JSON, and where it stands.

    The file, possibly gzipped, is one JSON object or list, one JSON value a line, or an event
    stream. Items of a list are responses of their own. Chunks of a streamed response are merged; it
    stands where its first chunk does. Bad rows are counted in ``bad`` and left out where it says
    so.

    Raises
    ------
    InputError
        The file cannot be read; or, unless bad rows are left out, a row is not UTF-8 or not JSON,
        or in a stream is no event, no chunk of a response, or contradicts an earlier chunk.
    """
    with OpenFile(path) as file:
        _, first = next(text_lines(file, lambda error: None), (0, ""))
        if is_event(first):
            yield from merge_streams(file, bad)
            return
        document = _document(file, first)
        values = [("", document)] if document is not None else json_lines(file, bad)
        for place, value in values:
            at = Location(path, place)
            if isinstance(value, list):
                yield from ((at.within(f"item {n}"), item) for n, item in enumerate(value))
            else:
                yield at if place else Location(path, "response"), value


def _document(file: OpenFile, first: str) -> Any:
    """The JSON list or object that the file is as a whole, if its first line is not JSON."""
    try:
        parse_json(first, file.path)
    except InputError:
        pass
    else:
        return None
    try:
        value = parse_json(read_maybe_gzipped_text(file), file.path)
    except InputError:
        return None  # reading line by line gives the error
    return value if isinstance(value, list | dict) else None
