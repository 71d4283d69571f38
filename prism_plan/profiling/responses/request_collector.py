"""Collect the requests of responses into batches of a trace, with the positions of their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.io.bad_rows import BadRows
from prism_plan.io.location import Location
from prism_plan.profiling.common.messages import Notify
from prism_plan.profiling.common.request_batches import RequestBatches
from prism_plan.profiling.responses.routed_experts import Array, parse_routed_experts
from prism_plan.profiling.sources import Source
from prism_plan.trace import DECODE_PHASE, PREFILL_PHASE, UNKNOWN_PHASE, Trace, trace_from_batches

#: So many equal rows at the start of a request are no text: the engine profiled itself at start-up.
PROFILING_ROWS = 512
_NOT_TOGETHER = "the response and its routing do not belong together"


@dataclass(frozen=True)
class TokenCounts:
    """The numbers of prompt and of generated tokens that came with an array; None is unknown."""

    prompt: int | None = None
    generated: int | None = None

    @property
    def total(self) -> int | None:
        """All tokens, where both numbers are known."""
        if self.prompt is None or self.generated is None:
            return None
        return self.prompt + self.generated


@dataclass
class RequestCollector(RequestBatches):
    """Collects requests, each with all its tokens.

    With P prompt tokens and C generated ones (C counts the last, which is never fed), the array
    ends at position P + C - 2: tokens that are missing are the first ones of the prompt, which
    the caller asked the engine to leave out. Where C is not known it starts at position 0. Tokens
    below position P are prefill, the others decode; where P is not known the phase is unknown.
    A row of padding has the position of its token, unless there are more rows than tokens.
    """

    profiling_rows: int = 0
    padding_rows: int = 0
    only_padding: int = 0
    without_generated: int = 0
    duplicate_prompts: int = 0
    without_routing: int = 0
    unread: set[str] = field(default_factory=set)

    def add(
        self, task: str, array: Array, counts: TokenCounts, at: Location, *, response: bool = True
    ) -> None:
        """Add a request's array [T, decoder layers, K].

        An array that came with no ``response`` may begin with rows of the engine's start-up, see
        :func:`_start_up_rows`.

        Raises
        ------
        InputError
            See :func:`parse_routed_experts`; or the number of tokens contradicts P and C.
        """
        # Start-up rows need not be valid selections, so they are removed first.
        skipped = _start_up_rows(array, counts, response)
        experts, routed, extra = parse_routed_experts(
            array[skipped:] if skipped else array, self.model, at
        )
        padding = len(routed) - len(experts)
        only_padding = bool(padding) and not len(experts)
        row, num_rows = _rows_of_request(routed, counts)
        first = 0 if only_padding else _first_position(num_rows, counts, skipped, at)
        # a request that is refused must not be counted, so counting begins here
        self.profiling_rows += skipped
        self.mtp_layers.update(extra)
        self.padding_rows += padding
        self.only_padding += only_padding
        if not len(experts):
            return
        self.without_start += bool(first and not skipped)
        self.repeated.add(experts, at, first=first)
        position = (first + row).astype(np.int32)
        phase = np.full(len(experts), UNKNOWN_PHASE, np.int8)
        if counts.prompt is not None:
            phase = np.where(position < counts.prompt, PREFILL_PHASE, DECODE_PHASE).astype(np.int8)
        self.append(task, position, phase, experts, at)

    def trace(
        self,
        engine: str,
        sources: Sequence[Source],
        provenance: Mapping[str, Any],
        bad: BadRows,
        notify: Notify,
    ) -> Trace:
        """The token-level trace of all requests; notifies of what was left out.

        Raises
        ------
        InputError
            No request has any token, or all rows are bad.
        """
        bad.require_good()
        for text in self._notices(sources[0].path):
            notify(text)
        bad.report(notify)
        left_out = {"padding_rows_left_out": self.padding_rows, "repeated_rows": self.repeated.rows}
        return trace_from_batches(
            self.model,
            self.tasks,
            self.batches,
            provenance={
                "source": engine,
                **provenance,
                **{key: number for key, number in left_out.items() if number},
                **bad.provenance(),
            },
            name=engine,
        )

    def _notices(self, source: object) -> list[str]:
        """What was left out or looks wrong.

        Raises
        ------
        InputError
            No request has any token.
        """
        left_out = (
            (self.profiling_rows, "dropped {:,} identical rows of start-up profiling"),
            (self.padding_rows, "left out {:,} rows of padding (-1 in every layer)"),
            (self.only_padding, "left out {:,} requests that are padding alone"),
            (self.without_routing, "left out {:,} responses without routed experts (aborted?)"),
        )
        notices = [text.format(number) for number, text in left_out if number]
        if not self.batches:
            rows = self.profiling_rows or self.padding_rows
            raise Location(source).error(
                "no token has routed experts" + (f": {', '.join(notices)}" if rows else ""),
                "responses with routed experts",
                "record requests that the engine really routes"
                if rows
                else "start the engine with --enable-return-routed-experts, and ask for them",
            )
        kept = (
            (self.without_start, "requests were recorded without the start of the prompt"),
            (self.without_generated, "requests were recorded without their generated tokens"),
            (
                self.duplicate_prompts,
                "choices hold the rows of prompt_routed_experts too, which were read once",
            ),
        )
        notices += [f"{number:,} {text}" for number, text in kept if number]
        if self.unread:
            keys = ", ".join(map(repr, sorted(self.unread)))
            notices.append(f"did not read {keys:.200}, which may be routing")
        return [*notices, *self.layer_notices()]


def _start_up_rows(array: Array, counts: TokenCounts, response: bool) -> int:
    """How many rows at the start are not the request's but of the engine's start-up profiling.

    They are many and equal. In the response to a request they can only be rows that are more
    than the request has tokens. Elsewhere they are, unless the numbers of tokens are known
    and account for all rows. Rows of zeros were not recorded: those of a response are never
    dropped, nor is an array that has no others.
    """
    if array.ndim != 3 or not len(array):
        return 0
    other = (array != array[0]).any(axis=(1, 2))
    equal = int(np.argmax(other)) if other.any() else len(array)
    if equal < PROFILING_ROWS:
        return 0
    if not array[0].any() and (response or equal == len(array)):
        return 0
    if counts.total is not None:
        return equal if len(array) > counts.total else 0
    return 0 if response else equal


def _first_position(num_rows: int, counts: TokenCounts, skipped: int, at: Location) -> int:
    """The position of the first row of a request."""
    prompt, generated = counts.prompt, counts.generated
    if prompt is not None and generated is not None:
        if num_rows > prompt + generated:
            raise at.error(
                f"{num_rows} tokens",
                f"at most {prompt} of the prompt and {generated} generated",
                f"{_NOT_TOGETHER}, or ``model`` is not the model that was recorded",
            )
        first = max(prompt + generated - 1 - num_rows, 0)
        if first > prompt and not skipped:  # at most the whole prompt can have been left out
            expected = f"at least the {generated - 1} generated that were fed"
            raise at.error(f"{num_rows} tokens", expected, _NOT_TOGETHER)
        return first
    if prompt is not None and num_rows < prompt and not skipped:
        raise at.error(
            f"{num_rows} tokens",
            f"at least the {prompt} of the prompt",
            "give completion_tokens too if the first ones were left out on purpose",
        )
    return 0


def _rows_of_request(
    routed: npt.NDArray[np.bool_], counts: TokenCounts
) -> tuple[npt.NDArray[np.int64], int]:
    """Which row of the request each routed row is, and how many rows the request has.

    Padding has the place of a token. Where that makes more rows than tokens, padding is removed:
    first that at the end, then that at the start, then any.
    """
    at = np.flatnonzero(routed)
    if counts.total is None or len(at) in (0, len(routed)):
        return at, len(routed)
    surplus = len(routed) - counts.total + 1 if len(routed) > counts.total else 0
    end = len(routed) - min(surplus, len(routed) - 1 - int(at[-1]))
    start = min(surplus - (len(routed) - end), int(at[0]))
    if end - start > counts.total:
        return np.arange(len(at)), len(at)
    return at - start, end - start
