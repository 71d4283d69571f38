"""Add up the counts of several sources of one task."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from prism_plan.io.location import Location
from prism_plan.model_spec import ModelSpec
from prism_plan.profiling.common.call_counts import Counts, require_every_layer, sum_calls
from prism_plan.profiling.common.extra_layers import mtp_notice
from prism_plan.profiling.common.messages import Notify
from prism_plan.profiling.sources import Source, default_task


@dataclass
class TaskCounts:
    """Calls [L, E] by task, summed over the sources of a label; notices of those that are equal."""

    calls: dict[str, Counts] = field(default_factory=dict)
    parts: dict[str, list[tuple[Source, bytes]]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

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
                raise Location(source.path).error(
                    f"task {task!r} was read already",
                    remedy="label each source with a task of its own, TASK=SOURCE, or sources that "
                    "are to be added up with one task",
                )
            if source.path.resolve() == other.path.resolve():
                raise Location(source.path).error(
                    f"given twice for task {task!r}",
                    "each source of a task once",
                    "leave one of the two out",
                )
            if digest == same:
                self.notices.append(
                    f"task {task!r}: {source.path} has the same counts as {other.path}; they were "
                    "added, which leaves calls per token as they are"
                )
                break
        self.parts[task].append((source, digest))
        known = self.calls.get(task)
        if known is not None:
            calls = sum_calls(np.stack([known, calls]), Location(source.path))
        self.calls[task] = calls

    def require_every_layer(self, model: ModelSpec) -> None:
        """Refuse a task that leaves a MoE layer out; see :func:`.call_counts.require_every_layer`.

        Raises
        ------
        InputError
            Names the layer and the sources.
        """
        for task, calls in self.calls.items():
            sources = ", ".join(str(source.path) for source, _ in self.parts[task])
            require_every_layer(task, calls, model, sources)


def add_up_sources(
    sources: Sequence[Source],
    model: ModelSpec,
    read: Callable[[Path, ModelSpec], tuple[Counts, Iterable[int]]],
    notify: Notify,
) -> dict[str, Counts]:
    """Calls [L, E] of each task, from sources of which ``read`` gives calls [L, E] and MTP layers.

    Raises
    ------
    InputError
        See :meth:`TaskCounts.add`; a task has no calls in some layer.
    """
    added = TaskCounts()
    mtp: set[int] = set()
    for source in sources:
        calls, extra = read(source.path, model)
        added.add(source.task or default_task(source.path), calls, source)
        mtp.update(extra)
    added.require_every_layer(model)
    for text in [*added.notices, mtp_notice(mtp, model)]:
        if text:
            notify(text)
    return added.calls
