"""Prompt files: JSON Lines of ``{"prompt": text, "task": text}``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from prism_plan.errors import InputError
from prism_plan.io.json_lines import text_lines
from prism_plan.io.open_file import OpenFile
from prism_plan.io.pydantic_base import FormatModel, NotBlank, validate_line

EXAMPLE = '{"prompt": ..., "task": ...}'


class PromptLine(FormatModel):
    """A prompt, and the task that its tokens count for."""

    prompt: NotBlank
    task: NotBlank


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
        line = validate_line(PromptLine, text, number, source.path, EXAMPLE)
        yield Prompt(number, line.prompt, line.task)
    if not found:
        raise InputError("no prompts in it", source=source.path, expected=f"lines {EXAMPLE}")
