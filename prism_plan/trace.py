"""Activation traces: the experts that the gate selected for the tokens of each task.

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
from prism_plan.model_spec import ModelSpec
from prism_plan.seeds import random_generator
from prism_plan.trace_totals import RequestCounter, RequestLengths, TraceTotals, require_sum

#: Names of the phase codes, in code order.
PHASES = ("prefill", "decode", "unknown")
PREFILL_PHASE, DECODE_PHASE, UNKNOWN_PHASE = range(len(PHASES))

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
        columns = {key: column for key, column in vars(self).items() if column is not None}
        return TokenBatch(**{key: column[keep] for key, column in columns.items()})

    def invalid_selection(self, model: ModelSpec, first_row: int = 0) -> InputError | None:
        """The error that names the first invalid selection, or ``None``.

        ``first_row`` is the number of the batch's first row in its file.
        """
        found = first_invalid_selection(self.experts, model.num_experts)
        return None if found is None else self.selection_error(model, *found, first_row)

    def selection_error(
        self, model: ModelSpec, row: int, layer: int, first_row: int = 0
    ) -> InputError:
        """The error that names the invalid selection of a row and layer position."""
        ids = self.experts[row, layer].tolist()
        over = [e for e in ids if e >= model.num_experts]
        token = f"request {self.request[row]}, position {self.position[row]}"
        return InputError(
            f"expert {over[0]}" if over else f"experts {ids} name one expert twice",
            place=f"row {first_row + row} ({token}) layer {model.moe_layers[layer]}",
            expected=(
                f"ids 0..{model.num_experts - 1} of {model.name}"
                if over
                else f"{model.top_k} different experts"
            ),
            remedy="check that ``model`` is the model that was recorded" if over else "",
        )


def first_invalid_selection(
    experts: npt.NDArray[np.uint16], num_experts: int
) -> tuple[int, int] | None:
    """Row and layer position of the first invalid selection in [T, L, K], or ``None``.

    Invalid is an id of ``num_experts`` or more, or one expert twice for one token and layer.
    """
    from prism_plan.compiled_loops import as_constant, find_invalid_selection

    row, layer = find_invalid_selection(as_constant(experts), np.empty(num_experts, np.int32))
    return None if row < 0 else (row, layer)


def concatenate_batches(batches: Sequence[TokenBatch]) -> TokenBatch:
    """One batch of all rows, in order; gate weights only where all batches have them."""
    columns = {key: [vars(batch)[key] for batch in batches] for key in vars(batches[0])}
    if any(weights is None for weights in columns["weights"]):
        del columns["weights"]
    return TokenBatch(**{key: np.concatenate(parts) for key, parts in columns.items()})


BatchSource = Callable[[], Iterator[TokenBatch]]


@dataclass(frozen=True, eq=False)
class Trace:
    """The experts that the tokens of each task called: totals and, if recorded, every token.

    Shapes: ``counts`` int64 [tasks, L, E], calls; ``tokens`` int64 [tasks]; ``requests`` int64
    [tasks] or ``None`` where the trace is counts-only. ``batches`` starts a new pass over the
    tokens at each call, and is ``None`` for a counts-only trace. ``lengths`` are its requests,
    where they are known without such a pass. Arrays are read-only.

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
    lengths: RequestLengths | None = None

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
        """Calls of each expert per token, p_t[l, e], [tasks, L, E]; zero without tokens."""
        tokens = np.maximum(self.tokens, 1).astype(np.float64)
        return self.counts / tokens[:, None, None]

    def mean_tokens(self) -> npt.NDArray[np.float64]:
        """Mean tokens of a request of each task, m_t, [tasks]; one where it is not known."""
        if self.requests is None:
            return np.ones(len(self.tasks))
        return self.tokens / np.maximum(self.requests, 1)

    def request_lengths(self) -> RequestLengths:
        """The requests of a token-level trace and how many tokens each has.

        Raises
        ------
        ValueError
            The trace is counts-only: it does not record its requests.
        """
        if self.lengths is not None:
            return self.lengths
        if self.batches is None:
            raise ValueError("a counts-only trace does not record its requests")
        counter = RequestCounter()
        for batch in self.batches():
            counter.add(batch.task, batch.request)
        return counter.lengths()

    def split(self, holdout: float, seed: int) -> tuple[Trace, Trace]:
        """Split each task's requests at random into a part to plan on and a part to score on.

        ``holdout`` is the share of requests in the second part; each part gets at least one.

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
        lengths = self.request_lengths()
        all_requests, first = lengths.request, lengths.first(len(self.tasks))
        rng = random_generator(seed)
        held_out = [np.zeros(0, np.int64)]
        for code, task in enumerate(self.tasks):
            ids = all_requests[first[code] : first[code + 1]]
            if not self.tokens[code]:
                continue
            if len(ids) < 2:
                raise InputError(
                    f"task {task!r} has {len(ids)} request",
                    source=self.name or "trace",
                    expected="at least 2 requests of each task for ``holdout``",
                    remedy="profile more requests of it, or leave ``holdout`` out",
                )
            count = min(max(round(holdout * len(ids)), 1), len(ids) - 1)
            held_out.append(rng.permutation(ids)[:count])
        requests = np.sort(np.concatenate(held_out)).astype(np.int32)
        held = _selected(self.batches, requests, invert=False)
        totals = TraceTotals(self.model, len(self.tasks))
        for batch in held():
            totals.add(batch.experts, batch.task, batch.request)
        second = self._part(held, totals.counts, totals.tokens, totals.request_lengths())
        is_first = ~np.isin(all_requests, requests)
        rest = RequestLengths(lengths.key[is_first], lengths.tokens[is_first])
        others = _selected(self.batches, requests, invert=True)
        # all selections are counted already: what is not in one part is in the other
        return self._part(
            others, self.counts - second.counts, self.tokens - second.tokens, rest
        ), second

    def _part(
        self,
        batches: BatchSource,
        counts: npt.NDArray[np.int64],
        tokens: npt.NDArray[np.int64],
        lengths: RequestLengths,
    ) -> Trace:
        return dataclasses.replace(
            self,
            counts=counts,
            tokens=tokens,
            requests=np.diff(lengths.first(len(self.tasks))),
            batches=batches,
            lengths=lengths,
        )


def _selected(source: BatchSource, requests: npt.NDArray[np.int32], *, invert: bool) -> BatchSource:
    """The batches of these requests alone, or with ``invert`` of all others."""

    def batches() -> Iterator[TokenBatch]:
        for batch in source():
            kept = batch.rows(np.isin(batch.request, requests, invert=invert))
            if len(kept):
                yield kept

    return batches


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
    in_memory = tuple(batches)
    task_names = tuple(tasks)
    totals = TraceTotals(model, len(task_names))
    for batch in in_memory:
        if batch.experts.shape[1:] != (model.num_layers, model.top_k):
            raise InputError(
                f"experts of shape {batch.experts.shape}",
                source=name,
                expected=f"[tokens, {model.num_layers}, {model.top_k}]",
            )
        if bad := totals.add(batch.experts, batch.task, batch.request):
            raise batch.selection_error(model, *bad).within(name)
    return Trace(
        model=model,
        tasks=task_names,
        counts=totals.counts,
        tokens=totals.tokens,
        requests=totals.requests(),
        lengths=totals.request_lengths(),
        batches=lambda: iter(in_memory),
        has_weights=bool(in_memory) and all(batch.weights is not None for batch in in_memory),
        provenance=dict(provenance or {}),
        name=name,
    )
