"""Recordings named on the command line: ``SOURCE`` or ``TASK=SOURCE``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from prism_plan.errors import InputError


@dataclass(frozen=True)
class Source:
    """A file or folder to read, and the task it is labelled with, if any."""

    path: Path
    task: str | None = None


def parse_source(text: str) -> Source:
    """``TASK=SOURCE``, or a plain path (an existing path that contains ``=`` is a plain path).

    Raises
    ------
    InputError
        The path does not exist, or the task is empty.
    """
    if _exists(text):
        return Source(Path(text))
    task, equals, path = text.partition("=")
    if not equals:
        raise InputError("no such file or folder", source=text)
    if not task.strip():
        raise InputError("empty task", source=text, expected="TASK=SOURCE or SOURCE")
    if not _exists(path):
        raise InputError("no such file or folder", source=path)
    return Source(Path(path), task)


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(reason, source=path, remedy="give a readable file or folder") from error


def distinct(tasks: Iterable[str]) -> None:
    """Refuse two sources of one task.

    Raises
    ------
    InputError
        Names the task.
    """
    seen: set[str] = set()
    for task in tasks:
        if task in seen:
            raise InputError(
                f"task {task!r} comes from two sources",
                remedy="label each source with a task of its own, TASK=SOURCE",
            )
        seen.add(task)
