"""Lines of text files that may be long: recordings and prompts, one JSON value a line."""

from __future__ import annotations

import os
from collections.abc import Iterator

from prism_plan.errors import InputError
from prism_plan.files import refuse_other_encodings
from prism_plan.open_file import OpenFile


def text_lines(source: str | os.PathLike[str] | OpenFile) -> Iterator[tuple[int, str]]:
    """(number, text) of each line that is not blank, without its end, counted from 1.

    A byte-order mark is left out, at the start of any line: files that were put together from
    several have it in the middle. A file that is open already stays open.

    Raises
    ------
    InputError
        Unreadable, a line that is too long, or not UTF-8; names the line.
    """
    if not isinstance(source, OpenFile):
        with OpenFile(source) as file:
            yield from text_lines(file)
        return
    for number, raw in source.lines():
        if number == 1:
            refuse_other_encodings(raw, source.path)
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(
                f"byte {error.start} is not UTF-8", source=source.path, place=f"line {number}"
            ) from error
        if text.strip():
            yield number, text.rstrip("\r\n")
