"""How many tokens stand behind counted calls. One rule for all recordings that only count."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.model import ModelSpec
from prism_plan.trace_totals import require_sum

Counts = npt.NDArray[np.int64]
#: Trace files hold fewer tokens of a task than this: all whole numbers of our files are below it.
TOKENS_BELOW = 2**53


def sum_calls(parts: npt.NDArray[np.integer], source: object, place: str = "") -> Counts:
    """Calls [L, E] summed over the first axis of ``parts`` [S, L, E], each of at least 0.

    Raises
    ------
    InputError
        A sum is too large; names it.
    """
    over = parts.sum(axis=0, dtype=np.float64)
    if over.size:
        layer, expert = np.unravel_index(int(over.argmax()), over.shape)
        require_sum(parts[:, layer, expert], "calls of one expert in a layer", source, place)
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
    of_layer = calls.sum(axis=1)
    if of_layer.min() == 0:
        raise InputError(
            f"task {task!r} has no calls in layer {model.moe_layers[int(np.argmin(of_layer))]}",
            source=source,
            expected=f"calls in every MoE layer of {model.name}, {model.layers_text()}",
            remedy="it may be cut short; check that ``model`` is the model that was recorded",
        )


def tokens_of_calls(task: str, calls: Counts, model: ModelSpec, source: object = "") -> int:
    """The tokens behind a task's calls [L, E]: those of the fullest layer / K, rounded up.

    Raises
    ------
    InputError
        More than a trace file can hold.
    """
    tokens = -(-int(calls.sum(axis=1).max()) // model.top_k)
    if tokens >= TOKENS_BELOW:
        raise InputError(
            f"task {task!r}: {tokens:,} tokens, a sum too large to count",
            source=source,
            expected=f"fewer than {TOKENS_BELOW:,} (2^53)",
            remedy="check the counts; scale all of a task down by one factor if they are right",
        )
    return tokens


def tell_if_uneven(
    task: str,
    calls: Counts,
    model: ModelSpec,
    notify: Callable[[str], None],
    remedy: str = "",
) -> None:
    """Notify where layers disagree on the tokens, or calls [L, E] are no multiple of K."""
    of_layer = calls.sum(axis=1)
    if of_layer.min() != of_layer.max() or of_layer.max() % model.top_k:
        notify(
            f"task {task!r}: layers have {of_layer.min():,} to {of_layer.max():,} calls, not all "
            f"{model.top_k} a token; took {tokens_of_calls(task, calls, model):,} tokens from the "
            f"fullest layer{remedy}"
        )
