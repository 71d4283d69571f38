"""Prompt files: JSON Lines of ``{"prompt": text, "task": text}``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

from prism_plan.errors import InputError
from prism_plan.files import parse_json
from prism_plan.open_file import OpenFile
from prism_plan.profiling.lines import text_lines

KEYS = ("prompt", "task")


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file."""

    line: int
    prompt: str
    task: str


def read_prompts(source: str | os.PathLike[str] | OpenFile) -> Iterator[Prompt]:
    """The prompts of a file one by one, so that memory does not grow with their number.

    Blank lines and a byte-order mark are passed over. A file that is open already is read from its
    beginning, and may be read again.

    Raises
    ------
    InputError
        A line is not a JSON object with a non-empty ``prompt`` and ``task`` and nothing else;
        names file and line. The file has no prompts, or cannot be read.
    """
    if not isinstance(source, OpenFile):
        with OpenFile(source) as file:
            yield from read_prompts(file)
        return
    source.require_unchanged()
    found = False
    for number, text in text_lines(source):
        found = True
        yield _prompt(text, source.path, number)
    if not found:
        raise InputError(
            "no prompts in it", source=source.path, expected='lines {"prompt": ..., "task": ...}'
        )


def _prompt(text: str, path: object, number: int) -> Prompt:
    place = f"line {number}"
    try:
        values = parse_json(text, "")
    except InputError as error:
        raise InputError(
            f"{error.found}: {text.strip():.40}",
            source=path,
            place=place,
            expected='{"prompt": ..., "task": ...}',
        ) from error
    if not isinstance(values, dict) or sorted(values) != sorted(KEYS):
        shown = ", ".join(map(str, values)) if isinstance(values, dict) else json.dumps(values)
        raise InputError(
            f"{shown:.60}", source=path, place=place, expected='the keys "prompt" and "task"'
        )
    for key in KEYS:
        if not isinstance(values[key], str) or not values[key].strip():
            raise InputError(
                f"{key} is {values[key]!r:.40}",
                source=path,
                place=place,
                expected="a non-empty text",
            )
    return Prompt(number, values["prompt"], values["task"])
