"""Responses of vLLM that keep the prompt's rows apart from those of generated tokens.

Since about 0.21 the rows of the prompt are the response's ``prompt_routed_experts``, and each
choice's ``routed_experts`` has only those of its generated tokens. A choice may still hold rows of
the prompt: they are read once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Joined:
    """The rows of one request [T, decoder layers, K], and its numbers of tokens.

    ``prompt`` and ``generated`` are such that the rows end at position prompt + generated - 2.
    ``twice`` tells that both parts held rows of the prompt, ``cut`` that generated tokens have no
    rows.
    """

    rows: Array
    prompt: int
    generated: int
    twice: bool = False
    cut: bool = False


def join(
    prompt_rows: Array,
    rows: Array | None,
    prompt: int | None,
    generated: int | None,
    source: object,
    place: str,
) -> Joined:
    """Rows of the prompt [A, decoder layers, K] and of a choice [B, decoder layers, K] as one.

    Where the number of ``generated`` tokens is known, the rows of a choice that are more than
    were fed belong to the prompt's end; else a choice that begins with the prompt's rows holds the
    prompt.

    Raises
    ------
    InputError
        The parts have different shapes, contradict the numbers of tokens, or each other.
    """

    def refuse(found: str, expected: str) -> InputError:
        return InputError(
            found,
            source=source,
            place=place,
            expected=expected,
            remedy="the response and its routing do not belong together",
        )

    known = len(prompt_rows)
    if prompt is not None and known > prompt:
        raise refuse(f"{known} rows in 'prompt_routed_experts'", f"at most {prompt} of the prompt")
    length = known if prompt is None else prompt
    if rows is None or not len(rows):
        return Joined(prompt_rows, length, 1, cut=(generated or 0) > 1)
    if prompt_rows.shape[1:] != rows.shape[1:]:
        raise refuse(
            f"'prompt_routed_experts' of shape {list(prompt_rows.shape)}",
            f"rows as in 'routed_experts', {list(rows.shape)}",
        )
    # unsigned and signed integers together would become fractions
    before, after = prompt_rows.astype(np.int64), rows.astype(np.int64)
    if generated is None:
        if len(after) >= known and np.array_equal(after[:known], before):
            return Joined(after, length, len(after) - known + 1, twice=True)
        return Joined(np.concatenate([before, after]), length, len(after) + 1)
    fed = max(generated - 1, 0)
    extra = len(after) - fed
    if extra < 0:
        raise refuse(
            f"{len(after)} rows of generated tokens",
            f"at least the {fed} of {generated} generated tokens that were fed",
        )
    # the last token is not fed, but some versions give it a row
    for last in (0, 1):
        shared = extra - last
        if 0 < shared <= length and _ends_alike(before, after[:shared]):
            missing = before[: max(known - shared, 0)]
            return Joined(np.concatenate([missing, after]), length, generated + last, twice=True)
    if extra > 1:
        raise refuse(
            f"'routed_experts' begins with {extra} rows that are not those of the prompt",
            f"{fed} rows of {generated} generated tokens, or the end of 'prompt_routed_experts' "
            "before them",
        )
    return Joined(np.concatenate([before, after]), length, len(after) + 1)


def _ends_alike(a: Array, b: Array) -> bool:
    """Whether the shorter of two arrays is the end of the longer one."""
    both = min(len(a), len(b))
    return np.array_equal(a[len(a) - both :], b[len(b) - both :])
