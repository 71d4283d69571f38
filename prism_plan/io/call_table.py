"""Calls by task, layer and expert from rows of a table, checked as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.input_limits import MAX_TASK_PAIRS, require_task_pairs
from prism_plan.model_spec import ModelSpec
from prism_plan.trace_totals import require_sum


class CallTable:
    """Counts [tasks, L, E] that are filled from batches of rows.

    Memory is taken for the tasks that occur, not for the rows: 9 bytes a (task, layer, expert).
    """

    def __init__(self, model: ModelSpec, source: object) -> None:
        self.model = model
        self.source = source
        self.rows = 0
        self._counts = np.zeros(0, np.int64)
        self._seen = np.zeros(0, bool)

    def _make_room(self, tasks: int) -> None:
        needed = tasks * self.model.num_pairs
        if needed <= len(self._counts):
            return
        require_task_pairs(tasks, self.model.num_layers, self.model.num_experts, source=self.source)
        room = min(max(needed, 2 * len(self._counts)), max(needed, MAX_TASK_PAIRS))
        for name in ("_counts", "_seen"):
            old = getattr(self, name)
            grown = np.zeros(room, old.dtype)
            grown[: len(old)] = old
            setattr(self, name, grown)

    def add(
        self,
        tasks: Sequence[str],
        tokens: npt.NDArray[np.int64] | None,
        task: npt.NDArray[Any],
        layer: npt.NDArray[Any],
        expert: npt.NDArray[Any],
        count: npt.NDArray[Any],
        lines: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Add rows of (task code, decoder layer, expert, count), each of shape [rows].

        Raises
        ------
        InputError
            A layer or expert that the model does not have, a negative count, a count above the
            task's ``tokens``, one (task, layer, expert) twice, too many tasks; names the row, or
            the line where ``lines`` [rows] gives them.
        """
        model = self.model

        def refuse(bad: npt.NDArray[np.bool_], what: str, column: Any, expected: str) -> None:
            if bad.any():
                at = int(np.argmax(bad))
                where = f"row {self.rows + at}" if lines is None else f"line {lines[at]}"
                raise InputError(
                    f"{what} {column[at]}",
                    source=self.source,
                    place=f"{where} (task {tasks[task[at]]!r})",
                    expected=expected,
                )

        refuse(
            ~np.isin(layer, model.moe_layers),
            "layer",
            layer,
            f"a MoE layer of {model.name}, {model.layers_text()}",
        )
        refuse(
            (expert < 0) | (expert >= model.num_experts),
            "expert",
            expert,
            f"ids 0..{model.num_experts - 1} of {model.name}",
        )
        refuse(count < 0, "count", count, "a whole number of at least 0")
        if tokens is not None:
            refuse(
                count > tokens[task],
                "count",
                count,
                "at most the tokens of the task, for a token calls an expert once a layer",
            )
        self._make_room(len(tasks))
        position = np.searchsorted(np.asarray(model.moe_layers), layer)
        key = (task.astype(np.int64) * model.num_layers + position) * model.num_experts + expert
        order = np.argsort(key, kind="stable")
        twice = self._seen[key]
        twice[order[1:]] |= key[order[1:]] == key[order[:-1]]
        refuse(
            twice,
            "second row for layer, expert",
            np.stack([layer, expert], axis=1),
            "each task, layer and expert once",
        )
        self._seen[key] = True
        self._counts[key] = count
        self.rows += len(key)

    def counts(self, tasks: int) -> npt.NDArray[np.int64]:
        """The counts of the first ``tasks`` task codes, int64 [tasks, L, E]; not copied.

        Raises
        ------
        InputError
            There are too many tasks.
        """
        self._make_room(tasks)
        flat = self._counts[: tasks * self.model.num_pairs]
        return flat.reshape(tasks, self.model.num_layers, self.model.num_experts)


def check_sums(
    model: ModelSpec,
    tasks: Sequence[str],
    tokens: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    source: object,
) -> None:
    """Refuse counts [tasks, L, E] with more calls in a layer than ``tokens`` [tasks] can make.

    Raises
    ------
    InputError
        Names task, layer, calls and what would be possible; or the sum of all if it is too large.
    """
    require_sum(counts, "calls", source)
    calls = counts.sum(axis=2, dtype=np.float64)
    over = np.argwhere(calls > tokens[:, None] * float(model.top_k))
    if len(over):
        t, layer = (int(i) for i in over[0])
        raise InputError(
            f"{calls[t, layer]:,.0f} calls",
            source=source,
            place=f"task {tasks[t]!r} layer {model.moe_layers[layer]}",
            expected=f"at most {tokens[t]:,} tokens times top-{model.top_k}",
            remedy="check the counts, the tokens and ``model``",
        )
