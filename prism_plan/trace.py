"""Activation traces: which experts the tokens of each task were sent to.

A trace is either token-level (every selection of every token, read in batches, so that a large one
never has to fit in memory) or counts-only (calls per task, layer and expert).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.limits import require_task_pairs
from prism_plan.model import ModelSpec

#: Names of the phase codes, in code order.
PHASES = ("prefill", "decode", "unknown")
PREFILL_PHASE, DECODE_PHASE, UNKNOWN_PHASE = range(len(PHASES))

#: Calls or tokens of a trace together are at most this. Far below what 64 bits hold, so that the
#: sum of two such numbers does not wrap round to a negative one.
MAX_SUM = 2**62

Kind = Literal["tokens", "counts"]


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Some tokens of a trace, in columns of T rows.

    Shapes: ``request``, ``position`` int32 [T]; ``phase`` int8 [T], codes into :data:`PHASES`;
    ``task`` int32 [T], codes into the trace's ``tasks``; ``experts`` uint16 [T, L, K];
    ``weights`` float16 [T, L, K] or ``None``.
    """

    request: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    phase: npt.NDArray[np.int8]
    task: npt.NDArray[np.int32]
    experts: npt.NDArray[np.uint16]
    weights: npt.NDArray[np.float16] | None = None

    def __len__(self) -> int:
        return len(self.request)

    def rows(self, keep: npt.NDArray[Any] | slice) -> TokenBatch:
        """Only the rows that ``keep`` (a mask, indices or a slice) names."""
        return TokenBatch(
            self.request[keep],
            self.position[keep],
            self.phase[keep],
            self.task[keep],
            self.experts[keep],
            None if self.weights is None else self.weights[keep],
        )


def concatenate(batches: Sequence[TokenBatch]) -> TokenBatch:
    """One batch of all rows, in order; gate weights only where all batches have them."""
    weights = [batch.weights for batch in batches if batch.weights is not None]
    return TokenBatch(
        request=np.concatenate([batch.request for batch in batches]),
        position=np.concatenate([batch.position for batch in batches]),
        phase=np.concatenate([batch.phase for batch in batches]),
        task=np.concatenate([batch.task for batch in batches]),
        experts=np.concatenate([batch.experts for batch in batches]),
        weights=np.concatenate(weights) if len(weights) == len(batches) else None,
    )


BatchSource = Callable[[], Iterator[TokenBatch]]


@dataclass(frozen=True, eq=False)
class Trace:
    """A trace and its totals.

    Shapes: ``counts`` int64 [tasks, L, E], calls; ``tokens`` int64 [tasks]; ``requests`` int64
    [tasks] or ``None`` where the trace is counts-only. ``batches`` gives the tokens anew each
    time it is called, and is ``None`` for a counts-only trace. Arrays are read-only.

    Raises
    ------
    InputError
        Calls or tokens are too many to be summed.
    """

    model: ModelSpec
    tasks: tuple[str, ...]
    counts: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    requests: npt.NDArray[np.int64] | None = None
    batches: BatchSource | None = None
    has_weights: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    sha256: str = ""

    def __post_init__(self) -> None:
        shape = (len(self.tasks), self.model.num_layers, self.model.num_experts)
        if self.counts.shape != shape:
            raise ValueError(f"counts have shape {self.counts.shape}, expected {shape}")
        require_sum(self.counts, "calls", self.name)
        require_sum(self.tokens, "tokens", self.name)
        for array in (self.counts, self.tokens, self.requests):
            if array is not None:
                array.setflags(write=False)

    @property
    def kind(self) -> Kind:
        """``"tokens"`` or ``"counts"``."""
        return "counts" if self.batches is None else "tokens"

    def calls_per_token(self) -> npt.NDArray[np.float64]:
        """p_t[l, e] of DESIGN section 1, [tasks, L, E]; zero for a task without tokens."""
        tokens = np.maximum(self.tokens, 1).astype(np.float64)
        return self.counts / tokens[:, None, None]

    def mean_tokens(self) -> npt.NDArray[np.float64]:
        """m_t, mean tokens of a request of each task, [tasks]; one where it is not known."""
        if self.requests is None:
            return np.ones(len(self.tasks))
        return self.tokens / np.maximum(self.requests, 1)

    def split(self, holdout: float, seed: int) -> tuple[Trace, Trace]:
        """Split each task's requests at random into a part to plan on and a part to score on.

        ``holdout`` is the share of requests that is kept back; each part gets at least one.

        Raises
        ------
        InputError
            The trace is counts-only, or a task has fewer than two requests.
        """
        if not 0 < holdout < 1:
            raise InputError(
                f"{holdout}", parameter="holdout", expected="a share above 0 and below 1"
            )
        if self.batches is None:
            raise InputError(
                "a counts-only trace has no requests to split",
                source=self.name or "trace",
                expected="a token-level trace for ``holdout``",
                remedy="leave ``holdout`` out, or profile token by token",
            )
        pairs = _requests_by_task(self.batches())
        first = np.searchsorted(pairs >> 32, np.arange(len(self.tasks) + 1))
        rng = np.random.default_rng(seed)
        held = [np.zeros(0, np.int64)]
        for code, task in enumerate(self.tasks):
            ids = pairs[first[code] : first[code + 1]] & 0xFFFFFFFF
            if not self.tokens[code]:
                continue
            if len(ids) < 2:
                raise InputError(
                    f"task {task!r} has {len(ids)} request",
                    source=self.name or "trace",
                    expected="at least 2 requests of each task for ``holdout``",
                    remedy="profile more requests of it, or leave ``holdout`` out",
                )
            number = min(max(round(holdout * len(ids)), 1), len(ids) - 1)
            held.append(rng.permutation(ids)[:number])
        keep = np.sort(np.concatenate(held)).astype(np.int32)
        return self._where(keep, invert=True), self._where(keep, invert=False)

    def _where(self, requests: npt.NDArray[np.int32], *, invert: bool) -> Trace:
        source = self.batches
        assert source is not None

        def batches() -> Iterator[TokenBatch]:
            for batch in source():
                kept = batch.rows(np.isin(batch.request, requests, invert=invert))
                if len(kept):
                    yield kept

        totals = Totals(self.model, len(self.tasks))
        for batch in batches():
            totals.add(batch)
        return dataclasses.replace(
            self,
            counts=totals.counts,
            tokens=totals.tokens,
            requests=totals.requests(),
            batches=batches,
        )


def require_sum(
    numbers: npt.NDArray[np.integer], what: str, source: object, place: str = ""
) -> None:
    """Refuse ``numbers`` of at least 0 whose sum is above :data:`MAX_SUM`.

    Raises
    ------
    InputError
        Names the sum.
    """
    # in floating point, which does not wrap round
    if numbers.size and float(numbers.sum(dtype=np.float64)) > MAX_SUM:
        total = sum(numbers.ravel().tolist())
        raise InputError(
            f"{total:,} {what} together, a sum too large to count",
            source=source,
            place=place,
            expected=f"at most {MAX_SUM:,} (2^62)",
            remedy="check the counts; scale all of a task down by one factor if they are right",
        )


def _requests_by_task(batches: Iterable[TokenBatch]) -> npt.NDArray[np.int64]:
    """The different (task << 32 | request) of all tokens, ascending, int64 [requests]."""
    found = [np.zeros(0, np.int64)]
    for batch in batches:
        found.append(np.unique(batch.task.astype(np.int64) << 32 | batch.request))
    return _distinct(found)


def _distinct(parts: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """The different numbers of all ``parts``, ascending; the list is emptied to save memory."""
    joined = np.concatenate(parts)
    parts.clear()
    joined.sort()
    new = np.ones(len(joined), bool)
    np.not_equal(joined[1:], joined[:-1], out=new[1:])
    return joined if new.all() else joined[new]


class Totals:
    """Running totals over token batches: calls, tokens and requests of each task.

    ``source`` is the file that errors name.
    """

    def __init__(self, model: ModelSpec, num_tasks: int = 0, *, source: object = "") -> None:
        self.model = model
        self.source = source
        self._counts = np.zeros((0, model.num_layers, model.num_experts), np.int64)
        self.tokens = np.zeros(0, np.int64)
        self._requests: list[npt.NDArray[np.int64]] = []
        self.grow(num_tasks)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Calls, int64 [tasks, L, E]."""
        return self._counts[: len(self.tokens)]

    def grow(self, num_tasks: int) -> None:
        """Make room for tasks that appear while reading, for some more than there are.

        Raises
        ------
        InputError
            There are too many; see :func:`require_task_pairs`.
        """
        more = num_tasks - len(self.tokens)
        if more <= 0:
            return
        require_task_pairs(
            num_tasks, self.model.num_layers, self.model.num_experts, source=self.source
        )
        if num_tasks > len(self._counts):
            room = max(num_tasks, 2 * len(self._counts)) if len(self._counts) else num_tasks
            grown = np.zeros((room, *self._counts.shape[1:]), np.int64)
            grown[: len(self._counts)] = self._counts
            self._counts = grown
        self.tokens = np.pad(self.tokens, (0, more))

    def add(self, batch: TokenBatch) -> None:
        """Count a batch of T tokens."""
        if not len(batch):
            return
        self.grow(int(batch.task.max()) + 1)
        count_calls(batch.experts, batch.task, self.counts)
        self.tokens += np.bincount(batch.task, minlength=len(self.tokens))
        pairs = batch.task.astype(np.int64) << 32 | batch.request.astype(np.int64)
        self._requests.append(np.unique(pairs))

    def _pairs(self) -> npt.NDArray[np.int64]:
        """The different (task << 32 | request), ascending, int64 [requests]."""
        if len(self._requests) != 1:
            self._requests = [_distinct(self._requests or [np.zeros(0, np.int64)])]
        return self._requests[0]

    def requests(self) -> npt.NDArray[np.int64]:
        """Requests of each task, [tasks]."""
        first = np.searchsorted(self._pairs(), np.arange(len(self.tokens) + 1) << 32)
        return np.diff(first).astype(np.int64)

    def request_of_two_tasks(self) -> int | None:
        """The lowest request that has tokens of two tasks; ``None`` where each has one task."""
        request = self._pairs().astype(np.uint32)  # the lower half of each number
        request.sort()
        same = np.flatnonzero(request[1:] == request[:-1])
        return int(request[same[0]]) if len(same) else None


def count_calls(
    experts: npt.NDArray[np.uint16],
    task: npt.NDArray[np.int32],
    counts: npt.NDArray[np.int64],
) -> None:
    """Add the calls of ``experts`` [T, L, K] of tokens of ``task`` [T] to ``counts`` [·, L, E]."""
    from prism_plan.kernels import count_selections

    count_selections(experts, task, counts)


def check_experts(experts: npt.NDArray[np.uint16], num_experts: int) -> tuple[int, int] | None:
    """Row and layer position of the first bad selection in [T, L, K], or ``None``.

    Bad is an id of ``num_experts`` or more, or one expert twice for one token and layer.
    """
    from prism_plan.kernels import first_bad_selection

    row, layer = first_bad_selection(experts, num_experts)
    return None if row < 0 else (row, layer)


def trace_from_batches(
    model: ModelSpec,
    tasks: Iterable[str],
    batches: Iterable[TokenBatch],
    *,
    provenance: Mapping[str, Any] | None = None,
    name: str = "",
) -> Trace:
    """A token-level trace that is held in memory.

    Raises
    ------
    InputError
        A selection is not an expert of the model, or one token names an expert twice.
    """
    kept = tuple(batches)
    names = tuple(tasks)
    totals = Totals(model, len(names))
    for batch in kept:
        if batch.experts.shape[1:] != (model.num_layers, model.top_k):
            raise InputError(
                f"experts of shape {batch.experts.shape}",
                source=name,
                expected=f"[tokens, {model.num_layers}, {model.top_k}]",
            )
        bad = check_experts(batch.experts, model.num_experts)
        if bad is not None:
            raise bad_selection(model, batch, bad).within(name)
        totals.add(batch)
    return Trace(
        model=model,
        tasks=names,
        counts=totals.counts,
        tokens=totals.tokens,
        requests=totals.requests(),
        batches=lambda: iter(kept),
        has_weights=bool(kept) and all(batch.weights is not None for batch in kept),
        provenance=dict(provenance or {}),
        name=name,
    )


def bad_selection(
    model: ModelSpec, batch: TokenBatch, place: tuple[int, int], first_row: int = 0
) -> InputError:
    """The error that names the selection found by :func:`check_experts`."""
    row, layer = place
    ids = batch.experts[row, layer].tolist()
    over = [e for e in ids if e >= model.num_experts]
    where = f"row {first_row + row} (request {batch.request[row]}, position {batch.position[row]})"
    return InputError(
        f"expert {over[0]}" if over else f"experts {ids} name one expert twice",
        place=f"{where} layer {model.moe_layers[layer]}",
        expected=(
            f"ids 0..{model.num_experts - 1} of {model.name}"
            if over
            else f"{model.top_k} different experts"
        ),
        remedy="check that ``model`` is the model that was recorded" if over else "",
    )
