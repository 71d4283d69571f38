"""Recordings to read, given as ``SOURCE`` or ``TASK=SOURCE``, and the tasks that they are of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from prism_plan.errors import InputError
from prism_plan.io.location import Location
from prism_plan.io.open_file import unreadable


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
        raise Location(text).error("no such file or folder")
    if not task.strip():
        raise Location(text).error("empty task", "TASK=SOURCE or SOURCE")
    if not _exists(path):
        raise Location(path).error("no such file or folder")
    return Source(Path(path), task)


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError as error:
        raise unreadable(error, path, "give a readable file or folder") from error


def require_distinct(tasks: Iterable[str]) -> None:
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


def paths_by_task(sources: Sequence[Source]) -> dict[str, list[Path]]:
    """The paths of each task, in order of appearance.

    A source without a label is a task of its own, named by its file's stem or its folder; sources
    of one label are parts of one task.

    Raises
    ------
    InputError
        Two sources without labels have one name, or there are no sources.
    """
    if not sources:
        raise InputError("no sources", expected="at least one recording")
    seen: set[Path] = set()
    for source in sources:
        if source.path.resolve() in seen:
            raise Location(source.path).error(
                "given twice",
                "each recording once, or its requests count twice",
                "leave one of the two out",
            )
        seen.add(source.path.resolve())
    labels = {source.task for source in sources if source.task is not None}
    unlabelled = [default_task(source.path) for source in sources if source.task is None]
    require_distinct([*unlabelled, *labels])
    paths: dict[str, list[Path]] = {}
    for source in sources:
        paths.setdefault(source.task or default_task(source.path), []).append(source.path)
    return paths


def default_task(path: Path) -> str:
    """The task of a recording that names none: the file's stem or the folder's name."""
    resolved = path.resolve()
    if path.is_dir():
        return resolved.name
    return Path(resolved.stem).stem if resolved.suffix == ".gz" else resolved.stem
