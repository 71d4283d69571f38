"""Requests whose routed experts an engine returned with its response.

Two engines do, as an array [tokens, decoder layers, K] of logical ids in which a dense layer is a
column of zeros: vLLM (``routed_experts``, .npy) and SGLang (``meta_info.routed_experts``, raw
int32). Rows of -1 in every layer were not routed (padding) and are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.limits import MAX_NAMES, require_at_most, require_name
from prism_plan.model import ModelSpec
from prism_plan.profiling.layers import decoder_end, mtp_layers, mtp_notice
from prism_plan.profiling.rows import NOTHING, RepeatedRows, padding_rows, runs_of_equal_rows
from prism_plan.profiling.tensors import CHECK_MODEL, DECODE, PREFILL, Notify
from prism_plan.trace import UNKNOWN_PHASE, TokenBatch, first_invalid_selection

#: So many equal rows at the start of a request are no text: the engine profiled itself at start-up.
PROFILING_ROWS = 512
#: With K = 1 an id 0 is a selection like any other; this many in a row, over rows and layers, are
#: not.
MIN_ZEROS = 64

Array = npt.NDArray[Any]
Refuse = Callable[..., InputError]


def routed_experts(
    array: Array, model: ModelSpec, source: object, place: str
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.bool_], list[int]]:
    """Selections uint16 [R, L, K] of a request's array [T, decoder layers, K].

    Also which rows were routed, bool [T], of which R are true: a row of -1 in every layer was
    not. And the multi-token-prediction layers that were left out. Columns of dense layers must be
    zeros or -1 and are dropped. An array of exactly the MoE layers is taken as one from which they
    were dropped already.

    Raises
    ------
    InputError
        Shape, a dense column, an id or a layer that was not recorded contradicts ``model``.
    """

    def refuse(found: str, expected: str, where: str = "", remedy: str = CHECK_MODEL) -> InputError:
        return InputError(
            found,
            source=source,
            place=" ".join(part for part in (place, where) if part),
            expected=expected,
            remedy=remedy,
        )

    array, extra = _moe_columns(array, model, refuse)
    routed = ~padding_rows(array)
    token = np.arange(len(array))
    if not routed.all():
        array, token = array[routed], token[routed]
    if array.size and (array.min() < 0 or array.max() >= model.num_experts):
        bad = (array < 0) | (array >= model.num_experts)
        first = np.unravel_index(int(np.argmax(bad)), array.shape)
        raise refuse(
            f"expert {array[first]}",
            f"ids 0..{model.num_experts - 1} of {model.name}, or -1 in every layer of a row that "
            "was not routed",
            f"token {token[first[0]]} layer {model.moe_layers[first[1]]}",
        )
    experts = np.ascontiguousarray(array, np.uint16)
    twice = first_invalid_selection(experts, model.num_experts)
    if twice is not None:
        row, at = twice
        ids = experts[row, at].tolist()
        where = f"token {token[row]} layer {model.moe_layers[at]}"
        if not any(ids):
            raise _not_recorded(model, refuse, where)
        raise refuse(
            f"experts {ids} name one expert twice", f"{model.top_k} different experts", where
        )
    if model.top_k == 1 and model.num_experts > 1:
        starts, lengths = runs_of_equal_rows(experts)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            if length * model.num_layers >= MIN_ZEROS and not experts[start].any():
                raise _not_recorded(model, refuse, f"token {token[start]}")
    return experts, routed, extra


def _not_recorded(model: ModelSpec, refuse: Refuse, where: str) -> InputError:
    return refuse(
        "nothing was recorded (all ids are 0)",
        f"{model.top_k} different experts in each MoE layer, {model.layers_text()}",
        where,
        "the engine's capture did not run: record the request again, or remove it",
    )


def _moe_columns(array: Array, model: ModelSpec, refuse: Refuse) -> tuple[Array, list[int]]:
    """[T, L, K] of the MoE layers, and the multi-token-prediction layers after them."""
    least = decoder_end(model)
    wanted = f"[tokens, {least} or more layers, {model.top_k}] for {model.name}"
    if array.ndim != 3 or array.dtype.kind not in "iu":
        raise refuse(f"{array.dtype} of shape {list(array.shape)}", f"whole numbers {wanted}")
    layers = array.shape[1]
    if array.shape[2] != model.top_k:
        raise refuse(f"{array.shape[2]} experts a token", f"{model.top_k}, top-k of {model.name}")
    if layers < least:
        if layers != model.num_layers:
            raise refuse(f"{layers} layers", wanted)
        return array, []
    used = _used_rows(array, np.setdiff1d(np.arange(layers), model.moe_layers))
    extra, stray = mtp_layers(used, model)
    for layer in sorted(used):
        if layer < least or layer == stray:
            token = used[layer]
            raise refuse(
                f"experts {array[token, layer].tolist()}",
                f"zeros, for {model.name} has its MoE layers at {model.layers_text()}",
                f"token {token} layer {layer}",
            )
    return array[:, list(model.moe_layers)], extra


def _used_rows(array: Array, layers: npt.NDArray[np.int64]) -> dict[int, int]:
    """{layer: first row} of the ``layers`` that have any experts in [T, decoder layers, K]."""
    used = {}
    for layer in layers.tolist():
        column = array[:, layer]
        stray = column.any(axis=1)
        if array.dtype.kind == "i":
            stray &= (column != NOTHING).any(axis=1)
        if stray.any():
            used[layer] = int(np.argmax(stray))
    return used


def equal_rows_at_start(rows: Array) -> int:
    """How many rows of [T, L, K] at the start are equal to the first."""
    if not len(rows):
        return 0
    other = (rows != rows[0]).any(axis=(1, 2))
    return int(np.argmax(other)) if other.any() else len(rows)


@dataclass
class Requests:
    """Collects requests, each with all its tokens, into batches of a token-level trace.

    With P prompt tokens and C generated ones (C counts the last, which is never fed), the array
    ends at position P + C - 2: tokens that are missing are the first ones of the prompt, which
    the caller asked the engine to leave out. Where C is not known it starts at position 0. Tokens
    below position P are prefill, the others decode; where P is not known the phase is unknown.
    A row of padding has the position of its token, unless there are more rows than tokens.
    """

    model: ModelSpec
    tasks: dict[str, int] = field(default_factory=dict)
    batches: list[TokenBatch] = field(default_factory=list)
    profiling_rows: int = 0
    padding_rows: int = 0
    only_padding: int = 0
    without_start: int = 0
    without_generated: int = 0
    prompts_twice: int = 0
    missing: int = 0
    left_out_layers: set[int] = field(default_factory=set)
    unread: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.repeated = RepeatedRows(self.model)

    def add(
        self,
        task: str,
        array: Array,
        prompt: int | None,
        generated: int | None,
        source: object,
        place: str,
        *,
        response: bool = True,
    ) -> None:
        """Add a request's array [T, decoder layers, K].

        An array that came with no ``response`` may begin with rows of the engine's start-up, as
        :meth:`_start_up_rows` says.

        Raises
        ------
        InputError
            See :func:`routed_experts`; or the number of tokens contradicts P and C.
        """
        # Start-up rows need not be valid selections, so they go first.
        skipped = self._start_up_rows(array, prompt, generated, response)
        experts, routed, extra = routed_experts(
            array[skipped:] if skipped else array, self.model, source, place
        )
        padding = len(routed) - len(experts)
        only_padding = bool(padding) and not len(experts)
        at, rows = _places(routed, prompt, generated)
        first = 0
        if not only_padding:
            first = self._first_position(rows, prompt, generated, skipped, source, place)
        # nothing of a request that is refused is counted
        self.profiling_rows += skipped
        self.left_out_layers.update(extra)
        self.padding_rows += padding
        self.only_padding += only_padding
        if not len(experts):
            return
        if first and not skipped:
            self.without_start += 1
        self.repeated.add(experts, f"{source} {place}".strip(), first=first)
        position = (first + at).astype(np.int32)
        phase = np.full(len(experts), UNKNOWN_PHASE, np.int8)
        if prompt is not None:
            phase = np.where(position < prompt, PREFILL, DECODE).astype(np.int8)
        if task not in self.tasks:
            require_name(task, source=source, place=place)
            require_at_most(len(self.tasks) + 1, MAX_NAMES, "tasks", source=source, place=place)
            self.tasks[task] = len(self.tasks)
        self.batches.append(
            TokenBatch(
                request=np.full(len(experts), len(self.batches), np.int32),
                position=position,
                phase=phase,
                task=np.full(len(experts), self.tasks[task], np.int32),
                experts=experts,
            )
        )

    def _start_up_rows(
        self, array: Array, prompt: int | None, generated: int | None, response: bool
    ) -> int:
        """How many rows at the start are none of the request's but of the engine's start-up.

        They are many and equal. In the response to a request they can only be rows that are more
        than the request has tokens. Elsewhere they are, unless the numbers of tokens are known
        and account for all rows. Rows of zeros were not recorded: those of a response are never
        dropped, nor is an array that has no others.
        """
        if array.ndim != 3:
            return 0
        equal = equal_rows_at_start(array)
        if equal < PROFILING_ROWS:
            return 0
        if not array[0].any() and (response or equal == len(array)):
            return 0
        if prompt is not None and generated is not None:
            return equal if len(array) > prompt + generated else 0
        return 0 if response else equal

    def _first_position(
        self,
        rows: int,
        prompt: int | None,
        generated: int | None,
        skipped: int,
        source: object,
        place: str,
    ) -> int:
        """The position of the first of so many rows."""
        if prompt is not None and generated is not None:
            if rows > prompt + generated:
                raise InputError(
                    f"{rows} tokens",
                    source=source,
                    place=place,
                    expected=f"at most {prompt} of the prompt and {generated} generated",
                    remedy="the response and its routing do not belong together, or "
                    "``model`` is not the model that was recorded",
                )
            first = max(prompt + generated - 1 - rows, 0)
            if first > prompt and not skipped:  # at most the whole prompt can have been left out
                raise InputError(
                    f"{rows} tokens",
                    source=source,
                    place=place,
                    expected=f"at least the {generated - 1} generated that were fed",
                    remedy="the response and its routing do not belong together",
                )
            return first
        if prompt is not None and rows < prompt and not skipped:
            raise InputError(
                f"{rows} tokens",
                source=source,
                place=place,
                expected=f"at least the {prompt} of the prompt",
                remedy="give completion_tokens too if the first ones were left out on purpose",
            )
        return 0

    def tell(self, source: object, notify: Notify) -> None:
        """Say what was left out, and refuse to go on with nothing.

        Raises
        ------
        InputError
            No request has any token.
        """
        left_out = [
            text
            for number, text in (
                (self.profiling_rows, "dropped {:,} identical rows of start-up profiling"),
                (self.padding_rows, "left out {:,} rows of padding (-1 in every layer)"),
                (self.only_padding, "left out {:,} requests that are padding alone"),
                (self.missing, "left out {:,} responses without routed experts (aborted?)"),
            )
            if number
            for text in [text.format(number)]
        ]
        if not self.batches:
            rows = self.profiling_rows or self.padding_rows
            raise InputError(
                "no token has routed experts" + (f": {', '.join(left_out)}" if rows else ""),
                source=source,
                expected="responses with routed experts",
                remedy="record requests that the engine really routes"
                if rows
                else "start the engine with --enable-return-routed-experts, and ask for them",
            )
        later = (
            (self.without_start, "requests were recorded without the start of the prompt"),
            (self.without_generated, "requests were recorded without their generated tokens"),
            (
                self.prompts_twice,
                "choices hold the rows of prompt_routed_experts too, which were read once",
            ),
        )
        notices = [*left_out, *(f"{number:,} {text}" for number, text in later if number)]
        if self.unread:
            keys = ", ".join(map(repr, sorted(self.unread)))
            notices.append(f"did not read {keys:.200}, which may be routing")
        notices.append(mtp_notice(self.left_out_layers, self.model))
        notices.append(self.repeated.notice())
        for text in filter(None, notices):
            notify(text)

    def provenance(self) -> dict[str, int]:
        """How many rows were left out as padding or kept though repeated, where there are any."""
        numbers = {"padding_rows_left_out": self.padding_rows, "repeated_rows": self.repeated.rows}
        return {key: number for key, number in numbers.items() if number}


def _places(
    routed: npt.NDArray[np.bool_], prompt: int | None, generated: int | None
) -> tuple[npt.NDArray[np.int64], int]:
    """Which row of the request each routed row is, and how many rows the request has.

    Padding has the place of a token. Where that makes more rows than tokens it stands for none:
    first that at the end, then that at the start, then any.
    """
    at = np.flatnonzero(routed)
    if prompt is None or generated is None or len(at) in (0, len(routed)):
        return at, len(routed)
    most = prompt + generated
    surplus = len(routed) - most + 1 if len(routed) > most else 0
    end = len(routed) - min(surplus, len(routed) - 1 - int(at[-1]))
    start = min(surplus - (len(routed) - end), int(at[0]))
    if end - start > most:
        return np.arange(len(at)), len(at)
    return at - start, end - start
