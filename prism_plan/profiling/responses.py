"""Files of responses: JSON Lines, a JSON array or object, or the events of streamed responses.

Which of them a file is is told by its first line: that of an event stream has a field of
Server-Sent Events (``data: {...}``), that of JSON Lines is JSON by itself. A line may be a list of
responses. Any of them may be compressed with gzip.
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
from prism_plan.io.open_file import OpenFile
from prism_plan.profiling.event_stream import is_event, streamed


def responses(path: Path, bad: BadRows) -> Iterator[tuple[str, Any]]:
    """(place, value) of each response in a file, put together where it was streamed.

    Raises
    ------
    InputError
        Unreadable; or a row is not UTF-8 or not JSON and bad rows are not to be left out.
    """
    with OpenFile(path) as file:
        _, first = next(text_lines(file, lambda error: None), (0, ""))
        if is_event(first):
            yield from streamed(file, bad)
            return
        whole = _document(file, first)
        found = [("", whole)] if whole is not None else json_lines(file, bad)
        for place, value in found:
            if isinstance(value, list):
                for index, item in enumerate(value):
                    yield f"{place} item {index}".strip(), item
            else:
                yield place or "response", value


def _document(file: OpenFile, first: str) -> Any:
    """The list or object that a whole file is, if its first line is not JSON by itself."""
    try:
        parse_json(first, file.path)
    except InputError:
        pass
    else:
        return None
    try:
        value = parse_json(read_maybe_gzipped_text(file), file.path)
    except InputError:
        return None  # the reader of lines names what is wrong
    return value if isinstance(value, list | dict) else None
