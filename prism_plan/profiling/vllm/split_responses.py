"""Join the rows of the prompt and of generated tokens, which vLLM returns apart.

Since about 0.21 the rows of the prompt are the response's ``prompt_routed_experts``, and each
choice's ``routed_experts`` has only those of its generated tokens. A choice may still hold rows of
the prompt: they are read once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prism_plan.errors import InputError
from prism_plan.io.location import Location
from prism_plan.profiling.responses.request_collector import TokenCounts
from prism_plan.profiling.responses.routed_experts import Array


@dataclass(frozen=True)
class JoinedRows:
    """The rows of one choice's prompt and generated tokens [T, decoder layers, K], each token once.

    ``counts`` are the numbers of prompt and generated tokens that fit ``rows``, which end at
    position prompt + generated - 2; generated may differ from what the response said.
    ``duplicate_prompt``: the choice's ``routed_experts`` repeated rows of the prompt, which are
    left out. ``without_generated``: several tokens were generated, but there are rows of the prompt
    only.
    """

    rows: Array
    counts: TokenCounts
    duplicate_prompt: bool = False
    without_generated: bool = False


def join_rows(
    prompt_rows: Array, rows: Array | None, counts: TokenCounts, at: Location
) -> JoinedRows:
    """Rows of the prompt [A, decoder layers, K] and of a choice [B, decoder layers, K] as one.

    Where the number of generated tokens is known, the rows of a choice that are more than were fed
    belong to the prompt's end; else a choice that begins with the prompt's rows holds the prompt.

    Raises
    ------
    InputError
        The parts have different shapes, contradict the numbers of tokens, or each other.
    """

    def refuse(found: str, expected: str) -> InputError:
        return at.error(found, expected, "the response and its routing do not belong together")

    prompt, generated, known = counts.prompt, counts.generated, len(prompt_rows)
    if prompt is not None and known > prompt:
        raise refuse(f"{known} rows in 'prompt_routed_experts'", f"at most {prompt} of the prompt")
    length = known if prompt is None else prompt
    if rows is None or not len(rows):
        without = (generated or 0) > 1
        return JoinedRows(prompt_rows, TokenCounts(length, 1), without_generated=without)
    if prompt_rows.shape[1:] != rows.shape[1:]:
        raise refuse(
            f"'prompt_routed_experts' of shape {list(prompt_rows.shape)}",
            f"rows as in 'routed_experts', {list(rows.shape)}",
        )
    # NumPy makes floats of unsigned and signed integers together
    before, after = prompt_rows.astype(np.int64), rows.astype(np.int64)
    apart = JoinedRows(np.concatenate([before, after]), TokenCounts(length, len(after) + 1))
    if generated is None:
        if len(after) >= known and np.array_equal(after[:known], before):
            return JoinedRows(after, TokenCounts(length, len(after) - known + 1), True)
        return apart
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
        if 0 < shared <= length and _equal_at_end(before, after[:shared]):
            joined = np.concatenate([before[: max(known - shared, 0)], after])
            return JoinedRows(joined, TokenCounts(length, generated + last), True)
    if extra > 1:
        raise refuse(
            f"'routed_experts' begins with {extra} rows that are not those of the prompt",
            f"{fed} rows of {generated} generated tokens, or the end of 'prompt_routed_experts' "
            "before them",
        )
    return apart


def _equal_at_end(a: Array, b: Array) -> bool:
    """Whether the shorter of two arrays is the end of the longer one."""
    both = min(len(a), len(b))
    return np.array_equal(a[len(a) - both :], b[len(b) - both :])
