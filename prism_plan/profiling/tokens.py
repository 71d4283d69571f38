"""How many tokens stand behind counted calls. One rule for all recordings that only count."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.model import ModelSpec

Counts = npt.NDArray[np.int64]


def require_every_layer(task: str, calls: Counts, model: ModelSpec, source: object = "") -> None:
    """Refuse calls [L, E] of a task that leave a MoE layer out.

    Raises
    ------
    InputError
        Names the layer.
    """
    of_layer = calls.sum(axis=1)
    if of_layer.min() == 0:
        raise InputError(
            f"task {task!r} has no calls in layer {model.moe_layers[int(np.argmin(of_layer))]}",
            source=source,
            expected=f"calls in every MoE layer of {model.name}, {model.layers_text()}",
            remedy="it may be cut short; check that --model is the model that was recorded",
        )


def tokens_of_calls(calls: Counts, model: ModelSpec) -> int:
    """The tokens behind calls [L, E]: those of the fullest layer / K, rounded up."""
    return -(-int(calls.sum(axis=1).max()) // model.top_k)


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
            f"{model.top_k} a token; took {tokens_of_calls(calls, model):,} tokens from the "
            f"fullest layer{remedy}"
        )
