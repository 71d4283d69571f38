"""Lines of text files that may be long: recordings and prompts, one JSON value a line."""

from __future__ import annotations

import os
from collections.abc import Iterator

from prism_plan.errors import InputError
from prism_plan.files import refuse_other_encodings


def text_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """(number, text) of each line that is not blank, without its end, counted from 1.

    A byte-order mark is left out, at the start of any line: files that were put together from
    several have it in the middle.

    Raises
    ------
    InputError
        Unreadable, or not UTF-8; names the line.
    """
    try:
        with open(path, "rb") as stream:
            for number, raw in enumerate(stream, start=1):
                if number == 1:
                    refuse_other_encodings(raw, path)
                try:
                    text = raw.decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"byte {error.start} is not UTF-8", source=path, place=f"line {number}"
                    ) from error
                if text.strip():
                    yield number, text.rstrip("\r\n")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(reason, source=path, remedy="give a readable file") from error
