"""Prompt files: JSON Lines of ``{"prompt": text, "task": text}``."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

from prism_plan.errors import InputError
from prism_plan.files import parse_json
from prism_plan.profiling.lines import text_lines

KEYS = ("prompt", "task")


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file."""

    line: int
    prompt: str
    task: str


def read_prompts(path: str | os.PathLike[str]) -> Iterator[Prompt]:
    """The prompts of a file one by one, so that memory does not grow with their number.

    Blank lines and a byte-order mark are passed over.

    Raises
    ------
    InputError
        A line is not a JSON object with a non-empty ``prompt`` and ``task`` and nothing else;
        names file and line. The file has no prompts, or cannot be read.
    """
    found = False
    for number, text in text_lines(path):
        found = True
        yield _prompt(text, path, number)
    if not found:
        raise InputError(
            "no prompts in it", source=path, expected='lines {"prompt": ..., "task": ...}'
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


def digest(path: str | os.PathLike[str]) -> str:
    """Identity of a prompt file's content."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
