"""Collect the requests of a recording as batches of a token-level trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from prism_plan.input_limits import MAX_NAMES, require_at_most, require_name
from prism_plan.io.location import Location
from prism_plan.model_spec import ModelSpec
from prism_plan.profiling.common.extra_layers import mtp_notice
from prism_plan.profiling.common.repeated_rows import RepeatedRows
from prism_plan.trace import TokenBatch


@dataclass
class RequestBatches:
    """Batches of one request each, the codes of their tasks, and what notices are about."""

    model: ModelSpec
    tasks: dict[str, int] = field(default_factory=dict)
    batches: list[TokenBatch] = field(default_factory=list)
    mtp_layers: set[int] = field(default_factory=set)
    without_start: int = 0

    def __post_init__(self) -> None:
        self.repeated = RepeatedRows(self.model)

    def append(
        self,
        task: str,
        position: npt.NDArray[np.int32],
        phase: npt.NDArray[np.int8],
        experts: npt.NDArray[np.uint16],
        at: Location,
    ) -> None:
        """Append a request of T tokens; ``experts`` [T, L, K].

        Raises
        ------
        InputError
            The name of the task is not allowed, or there are too many tasks.
        """
        if task not in self.tasks:
            require_name(task, source=at.source, place=at.place)
            num_tasks = len(self.tasks) + 1
            require_at_most(num_tasks, MAX_NAMES, "tasks", source=at.source, place=at.place)
            self.tasks[task] = len(self.tasks)
        self.batches.append(
            TokenBatch(
                request=np.full(len(experts), len(self.batches), np.int32),
                position=position,
                phase=phase,
                task=np.full(len(experts), self.tasks[task], np.int32),
                experts=experts,
            )
        )

    def layer_notices(self) -> Iterator[str]:
        """Notices of layers that were left out and of repeated rows."""
        yield from filter(None, (mtp_notice(self.mtp_layers, self.model), self.repeated.notice()))
