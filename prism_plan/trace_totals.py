"""Totals of traces: calls, tokens and requests of each task, counted batch by batch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.input_limits import require_task_pairs
from prism_plan.model_spec import ModelSpec

#: Calls or tokens of a trace together are at most this: far below the limit of int64, so that the
#: sum of two such numbers does not overflow.
MAX_SUM = 2**62


def require_sum(
    numbers: npt.NDArray[np.integer], what: str, source: object, place: str = ""
) -> None:
    """Refuse ``numbers`` of at least 0 whose sum is above :data:`MAX_SUM`.

    Raises
    ------
    InputError
        Names the sum.
    """
    # in floating point, which does not overflow
    if numbers.size and float(numbers.sum(dtype=np.float64)) > MAX_SUM:
        total = sum(numbers.ravel().tolist())
        raise InputError(
            f"{total:,} {what} together, a sum too large to count",
            source=source,
            place=place,
            expected=f"at most {MAX_SUM:,} (2^62)",
            remedy="check the counts; scale all of a task down by one factor if they are right",
        )


def request_keys(
    task: npt.NDArray[np.int32], request: npt.NDArray[np.int32]
) -> npt.NDArray[np.int64]:
    """The distinct (task << 32 | request) of some tokens, ascending, int64."""
    return np.unique(task.astype(np.int64) << 32 | request)


def distinct_keys(parts: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """The distinct numbers of all ``parts``, ascending; the list is emptied to save memory."""
    joined = np.concatenate(parts)
    parts.clear()
    joined.sort()
    new = np.ones(len(joined), bool)
    np.not_equal(joined[1:], joined[:-1], out=new[1:])
    return joined if new.all() else joined[new]


class TraceTotals:
    """Counter of the calls, tokens and requests of each task over batches of tokens.

    ``source`` is the file that errors name.
    """

    def __init__(self, model: ModelSpec, num_tasks: int = 0, *, source: object = "") -> None:
        self.model = model
        self.source = source
        self._counts = np.zeros((0, model.num_layers, model.num_experts), np.int64)
        self.tokens = np.zeros(0, np.int64)
        self._keys = [np.zeros(0, np.int64)]
        self.grow(num_tasks)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Calls of each expert by each task, int64 [tasks, L, E]."""
        return self._counts[: len(self.tokens)]

    def grow(self, num_tasks: int) -> None:
        """Extend the arrays for tasks that appear while reading, by doubling their capacity.

        Raises
        ------
        InputError
            There are too many; see :func:`require_task_pairs`.
        """
        added = num_tasks - len(self.tokens)
        if added <= 0:
            return
        require_task_pairs(
            num_tasks, self.model.num_layers, self.model.num_experts, source=self.source
        )
        if num_tasks > len(self._counts):
            grown = np.zeros(
                (max(num_tasks, 2 * len(self._counts)), *self.counts.shape[1:]), np.int64
            )
            grown[: len(self._counts)] = self._counts
            self._counts = grown
        self.tokens = np.pad(self.tokens, (0, added))

    def add(
        self,
        experts: npt.NDArray[np.uint16],
        task: npt.NDArray[np.int32],
        request: npt.NDArray[np.int32],
    ) -> None:
        """Count T tokens: their ``experts`` [T, L, K], ``task`` [T] and ``request`` [T]."""
        from prism_plan.compiled_loops import count_selections

        if not len(task):
            return
        self.grow(int(task.max()) + 1)
        count_selections(experts, task, self.counts)
        self.tokens += np.bincount(task, minlength=len(self.tokens))
        self._keys.append(request_keys(task, request))

    def _distinct_keys(self) -> npt.NDArray[np.int64]:
        if len(self._keys) != 1:
            self._keys = [distinct_keys(self._keys)]
        return self._keys[0]

    def requests(self) -> npt.NDArray[np.int64]:
        """Requests of each task, [tasks]."""
        first = np.searchsorted(self._distinct_keys(), np.arange(len(self.tokens) + 1) << 32)
        return np.diff(first).astype(np.int64)

    def request_of_two_tasks(self) -> int | None:
        """The lowest request that has tokens of two tasks; ``None`` where each has one task."""
        request = self._distinct_keys().astype(np.uint32)  # the lower half of each number
        request.sort()
        same = np.flatnonzero(request[1:] == request[:-1])
        return int(request[same[0]]) if len(same) else None
