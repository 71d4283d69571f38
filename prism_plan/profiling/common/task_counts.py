"""Counts of several files of one task, added up."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from prism_plan.errors import InputError
from prism_plan.profiling.common.call_counts import Counts, sum_calls
from prism_plan.profiling.sources import Source


@dataclass
class AddedCounts:
    """Calls [L, E] by task; sources of one label are parts of one task and are added up."""

    calls: dict[str, Counts] = field(default_factory=dict)
    parts: dict[str, list[tuple[Source, bytes]]] = field(default_factory=dict)
    copies: list[str] = field(default_factory=list)

    def add(self, task: str, calls: Counts, source: Source) -> None:
        """Add the calls of a task in a source.

        Raises
        ------
        InputError
            The task was read already and not every source of it has its label, a source is given
            twice, or a sum is too large.
        """
        digest = hashlib.sha256(calls.tobytes()).digest()
        for other, same in self.parts.setdefault(task, []):
            if None in (source.task, other.task):
                raise InputError(
                    f"task {task!r} was read already",
                    source=source.path,
                    remedy="label each source with a task of its own, TASK=SOURCE, or sources that "
                    "are to be added up with one task",
                )
            if source.path.resolve() == other.path.resolve():
                raise InputError(
                    f"given twice for task {task!r}",
                    source=source.path,
                    expected="each source of a task once",
                    remedy="leave one of the two out",
                )
            if digest == same:
                self.copies.append(
                    f"task {task!r}: {source.path} has the same counts as {other.path}; they were "
                    "added, which leaves calls per token as they are"
                )
                break
        self.parts[task].append((source, digest))
        known = self.calls.get(task)
        if known is not None:
            calls = sum_calls(np.stack([known, calls]), source.path)
        self.calls[task] = calls

    def files(self, task: str) -> str:
        """The paths of a task's sources, for messages."""
        return ", ".join(str(source.path) for source, _ in self.parts[task])
