"""Totals of traces: calls, tokens and requests of each task, counted batch by batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

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


@dataclass(frozen=True, eq=False)
class RequestLengths:
    """The requests of a trace in order of (task, id), int64 [requests] each.

    ``key`` is task << 32 | id, ascending and distinct; ``tokens`` are how many each has.
    """

    key: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]

    @cached_property
    def request(self) -> npt.NDArray[np.int64]:
        """Id of each."""
        return self.key & 0xFFFFFFFF

    @cached_property
    def task(self) -> npt.NDArray[np.int64]:
        """Task code of each."""
        return self.key >> 32

    def first(self, num_tasks: int) -> npt.NDArray[np.int64]:
        """Those of task t are ``first[t]`` to ``first[t + 1]``, int64 [tasks + 1]."""
        return np.searchsorted(self.key, np.arange(num_tasks + 1) << 32).astype(np.int64)


class RequestCounter:
    """Counts the tokens of each request over batches of tokens."""

    def __init__(self) -> None:
        self._keys = [np.zeros(0, np.int64)]
        self._tokens = [np.zeros(0, np.int64)]

    def add(self, task: npt.NDArray[np.int32], request: npt.NDArray[np.int32]) -> None:
        """Count T tokens of these tasks [T] and requests [T]."""
        if not len(task):
            return
        new = np.ones(len(task), bool)
        np.not_equal(request[1:], request[:-1], out=new[1:])
        new[1:] |= task[1:] != task[:-1]
        # most traces hold the tokens of a request side by side, so that few numbers are left
        start = np.flatnonzero(new)
        key = task[start].astype(np.int64) << 32 | request[start]
        tokens = np.empty_like(start)
        np.subtract(start[1:], start[:-1], out=tokens[:-1])
        tokens[-1] = len(task) - start[-1]
        keys, tokens = _merged(key, tokens)
        self._keys.append(keys)
        self._tokens.append(tokens)

    def lengths(self) -> RequestLengths:
        """All requests so far."""
        if len(self._keys) != 1:
            keys, tokens = np.concatenate(self._keys), np.concatenate(self._tokens)
            keys, tokens = _merged(keys, tokens)
            self._keys, self._tokens = [keys], [tokens]
        return RequestLengths(self._keys[0], self._tokens[0])


def _merged(
    keys: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The distinct ``keys``, ascending, and the sums of their ``tokens``."""
    if (keys[1:] <= keys[:-1]).any():
        order = np.argsort(keys, kind="stable")
        keys, tokens = keys[order], tokens[order]
        start = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        keys, tokens = keys[start], np.add.reduceat(tokens, start)
    return keys, tokens


class TraceTotals:
    """Counter of the calls, tokens and requests of each task over batches of tokens.

    ``source`` is the file that errors name.
    """

    def __init__(self, model: ModelSpec, num_tasks: int = 0, *, source: object = "") -> None:
        self.model = model
        self.source = source
        self._counts = np.zeros((0, model.num_layers, model.num_experts), np.int64)
        self.tokens = np.zeros(0, np.int64)
        self._requests = RequestCounter()
        self._scratch = np.zeros(model.num_experts, np.int32)
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
    ) -> tuple[int, int] | None:
        """Count T tokens: their ``experts`` [T, L, K], ``task`` [T] and ``request`` [T].

        Where a selection is invalid (an id of E or more, or one expert twice for one token and
        layer), returns the row and the layer position of the first; the totals are then of no use.
        """
        from prism_plan.compiled_loops import as_constant, count_selections

        if not len(task):
            return None
        tokens = np.bincount(task, minlength=len(self.tokens))
        self.grow(len(tokens))
        found = count_selections(
            as_constant(experts), as_constant(task), self._counts, self._scratch
        )
        if found[0] >= 0:
            return found
        self.tokens += tokens
        self._requests.add(task, request)
        return None

    def request_lengths(self) -> RequestLengths:
        """The requests of all tokens, and how many tokens each has."""
        return self._requests.lengths()

    def requests(self) -> npt.NDArray[np.int64]:
        """Requests of each task, [tasks]."""
        return np.diff(self.request_lengths().first(len(self.tokens)))

    def request_of_two_tasks(self) -> int | None:
        """The lowest request that has tokens of two tasks; ``None`` where each has one task."""
        request = self.request_lengths().request.astype(np.uint32)
        request.sort()
        same = np.flatnonzero(request[1:] == request[:-1])
        return int(request[same[0]]) if len(same) else None
