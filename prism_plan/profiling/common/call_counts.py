"""Calls of experts that a recording counted: sums, checks, and the tokens that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.io.location import Location
from prism_plan.model_spec import ModelSpec
from prism_plan.profiling.common.messages import CHECK_MODEL, Notify
from prism_plan.trace import Trace
from prism_plan.trace_totals import require_sum

#: Calls of the experts of all MoE layers, [L, E].
Counts = npt.NDArray[np.int64]
#: Trace files hold fewer tokens of a task than this: all whole numbers of our files are below it.
TOKENS_BELOW = 2**53


def sum_calls(parts: npt.NDArray[np.integer], at: Location) -> Counts:
    """Calls [L, E] summed over the first axis of ``parts`` [S, L, E], each of at least 0.

    Raises
    ------
    InputError
        A sum is too large; names it.
    """
    approximate = parts.sum(axis=0, dtype=np.float64)
    if approximate.size:
        layer, expert = np.unravel_index(int(approximate.argmax()), approximate.shape)
        what = "calls of one expert in a layer"
        require_sum(parts[:, layer, expert], what, at.source, at.place)
    total: Counts = parts.sum(axis=0, dtype=np.int64)
    return total


def require_every_layer(task: str, calls: Counts, model: ModelSpec, source: object = "") -> None:
    """Refuse calls [L, E] of a task that leave a MoE layer out, or are too many to be summed.

    Raises
    ------
    InputError
        Names the layer, or the sum.
    """
    require_sum(calls, "calls", source, f"task {task!r}")
    per_layer = calls.sum(axis=1)
    if per_layer.min() == 0:
        raise Location(source).error(
            f"task {task!r} has no calls in layer {model.moe_layers[int(np.argmin(per_layer))]}",
            f"calls in every MoE layer of {model.name}, {model.layers_text()}",
            f"it may be truncated; {CHECK_MODEL}",
        )


def tokens_of_calls(task: str, calls: Counts, model: ModelSpec, source: object = "") -> int:
    """The tokens of a task's calls [L, E]: those of the layer with the most calls / K, rounded up.

    Raises
    ------
    InputError
        More than a trace file can hold.
    """
    tokens = -(-int(calls.sum(axis=1).max()) // model.top_k)
    if tokens >= TOKENS_BELOW:
        raise Location(source).error(
            f"task {task!r}: {tokens:,} tokens, a sum too large to count",
            f"fewer than {TOKENS_BELOW:,} (2^53)",
            "check the counts; scale all of a task down by one factor if they are right",
        )
    return tokens


def notify_if_uneven(
    task: str, calls: Counts, model: ModelSpec, notify: Notify, remedy: str = ""
) -> None:
    """Notify where layers disagree on the tokens, or calls [L, E] are no multiple of K."""
    per_layer = calls.sum(axis=1)
    if per_layer.min() != per_layer.max() or per_layer.max() % model.top_k:
        notify(
            f"task {task!r}: layers have {per_layer.min():,} to {per_layer.max():,} calls, not all "
            f"{model.top_k} a token; took {tokens_of_calls(task, calls, model):,} tokens from the "
            f"fullest layer{remedy}"
        )


def trace_from_counts(
    engine: str,
    model: ModelSpec,
    counts: Mapping[str, Counts],
    provenance: Mapping[str, Any],
    notify: Notify,
) -> Trace:
    """A counts-only trace from the calls [L, E] of each task, in all layers.

    Raises
    ------
    InputError
        An expert has more calls than there are tokens.
    """
    tokens = []
    for task, calls in counts.items():
        notify_if_uneven(task, calls, model, notify)
        num_tokens = tokens_of_calls(task, calls, model)
        if calls.max() > num_tokens:
            layer, expert = np.unravel_index(int(calls.argmax()), calls.shape)
            raise Location(engine, f"layer {model.moe_layers[layer]} expert {expert}").error(
                f"task {task!r}: {calls.max()} calls of {num_tokens} tokens",
                "at most one call a token",
                CHECK_MODEL,
            )
        tokens.append(num_tokens)
    return Trace(
        model=model,
        tasks=tuple(counts),
        counts=np.stack(list(counts.values())),
        tokens=np.array(tokens, np.int64),
        provenance={"source": engine, **provenance},
        name=engine,
    )
