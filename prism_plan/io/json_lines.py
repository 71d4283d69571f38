"""Text files read line by line, such as recordings and prompts: one JSON value a line."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prism_plan.errors import InputError
from prism_plan.io.bad_rows import BadRows
from prism_plan.io.gzip_text import decompressed
from prism_plan.io.json import parse_json
from prism_plan.io.open_file import OpenFile
from prism_plan.io.text_files import require_not_utf16


def _refuse(error: InputError) -> None:
    raise error


def text_lines(
    source: str | os.PathLike[str] | OpenFile, refuse: Callable[[InputError], None] = _refuse
) -> Iterator[tuple[int, str]]:
    """(number, text) of each line that is not blank, without its end, counted from 1.

    A byte-order mark is left out, at the start of any line: files that were put together from
    several have it in the middle. Files compressed with gzip are unpacked. A file that is open
    already stays open. ``refuse`` is called with the error of a line that is not UTF-8, which is
    skipped unless it raises.

    Raises
    ------
    InputError
        Unreadable, a line that is too long, or not UTF-8; names the line.
    """
    if not isinstance(source, OpenFile):
        with OpenFile(source) as file:
            yield from text_lines(file, refuse)
        return
    for number, raw in source.lines(decompressed(source)):
        if number == 1:
            require_not_utf16(raw, source.path)
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            refuse(
                InputError(
                    f"byte {error.start} is not UTF-8", source=source.path, place=f"line {number}"
                )
            )
            continue
        if text.strip():
            yield number, text.rstrip("\r\n")


def json_lines(source: Path | OpenFile, bad: BadRows) -> Iterator[tuple[str, Any]]:
    """(place, value) of each line of a JSONL file that is not blank.

    Raises
    ------
    InputError
        Unreadable; or a line is not UTF-8 or not JSON and bad rows are not to be left out.
    """
    path = Path(source.path) if isinstance(source, OpenFile) else source
    for number, text in text_lines(source, lambda error: bad.skip_or_raise(path, error)):
        place = f"line {number}"
        try:
            value = parse_line(text, path, place)
        except InputError as error:
            bad.skip_or_raise(path, error)
            continue
        yield place, value


def parse_line(text: str, path: Path, place: str) -> Any:
    """Parse the JSON value of a line.

    Raises
    ------
    InputError
        Names the line and the column.
    """
    try:
        return parse_json(text, "")
    except InputError as error:
        column = error.place.partition("column ")[2]
        raise InputError(
            error.found,
            source=path,
            place=f"{place} column {column}" if column else place,
            expected=error.expected or "one JSON object a line",
            remedy=error.remedy,
        ) from error
