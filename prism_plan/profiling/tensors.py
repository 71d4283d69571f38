"""What the readers of engine recordings share: arrays, responses, tasks and tokens of counts.

Two engines return the experts of one request with its response, as an array
[tokens, decoder layers, K] of logical ids in which a dense layer is a column of zeros:
vLLM (``routed_experts``, .npy) and SGLang (``meta_info.routed_experts``, raw int32).
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.files import parse_json
from prism_plan.limits import MAX_NAMES, require_at_most, require_name
from prism_plan.model import ModelSpec
from prism_plan.open_file import OpenFile
from prism_plan.profiling.sources import Source, distinct
from prism_plan.profiling.tokens import require_every_layer, tell_if_uneven, tokens_of_calls
from prism_plan.trace import PHASES, UNKNOWN_PHASE, TokenBatch, Trace, check_experts

Notify = Callable[[str], None]

PREFILL, DECODE = PHASES.index("prefill"), PHASES.index("decode")
#: So many equal rows at the start of a request are no text: the engine profiled itself at start-up.
PROFILING_ROWS = 512
CUT_SHORT = "the file may be cut short; record or copy it again"
CHECK_MODEL = "check that --model is the model that was recorded"


# ------------------------------------------------------------------------------------------- tasks


def files_of_tasks(sources: Sequence[Source]) -> dict[str, list[Path]]:
    """The paths of each task, in order of appearance.

    A source without a label is a task of its own, named by its file's stem or its folder; sources
    of one label are parts of one task.

    Raises
    ------
    InputError
        Two sources without labels have one name, or there are no sources.
    """
    if not sources:
        raise InputError("no sources", expected="at least one recording")
    labels = {source.task for source in sources}
    unnamed = [default_task(source.path) for source in sources if source.task is None]
    distinct([*unnamed, *(label for label in labels if label is not None)])
    files: dict[str, list[Path]] = {}
    for source in sources:
        files.setdefault(source.task or default_task(source.path), []).append(source.path)
    return files


def default_task(path: Path) -> str:
    """The task of a recording that names none: the file's stem or the folder's name."""
    whole = path.resolve()
    return whole.name if path.is_dir() else whole.stem


# ------------------------------------------------------------------------------------------ counts


def counts_trace(
    engine: str,
    model: ModelSpec,
    counts: Mapping[str, npt.NDArray[np.int64]],
    provenance: Mapping[str, Any],
    notify: Notify,
) -> Trace:
    """A counts-only trace from the calls [L, E] of each task.

    Raises
    ------
    InputError
        A task has no calls in some layer, or an expert more calls than there are tokens.
    """
    tokens = []
    for task, calls in counts.items():
        require_every_layer(task, calls, model)
        tell_if_uneven(task, calls, model, notify)
        number = tokens_of_calls(calls, model)
        if calls.max() > number:
            layer, expert = np.unravel_index(int(calls.argmax()), calls.shape)
            raise InputError(
                f"task {task!r}: {calls.max()} calls of {number} tokens",
                source=engine,
                place=f"layer {model.moe_layers[layer]} expert {expert}",
                expected="at most one call a token",
                remedy=CHECK_MODEL,
            )
        tokens.append(number)
    return Trace(
        model=model,
        tasks=tuple(counts),
        counts=np.stack(list(counts.values())),
        tokens=np.array(tokens, np.int64),
        provenance={"source": engine, **provenance},
        name=engine,
    )


# ------------------------------------------------------------------------------------------ arrays

_NPY_HEADER = re.compile(
    r"\{'descr': '([|<>])([A-Za-z])(\d{1,4})?', 'fortran_order': (True|False), "
    r"'shape': \(((?:\d{1,18}, ?)*(?:\d{1,18})?)\), ?\}\s*"
)
#: More make NumPy raise, and no recording has more than three.
_MAX_DIMENSIONS = 8
_WHOLE_KINDS = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")


def parse_npy(data: bytes, source: object, place: str = "") -> npt.NDArray[Any]:
    """The whole numbers in the bytes of a .npy file. Nothing in it is evaluated or unpickled.

    Raises
    ------
    InputError
        Not .npy, cut short, or not whole numbers (Python objects included).
    """

    def refuse(found: str, expected: str, remedy: str = CUT_SHORT) -> InputError:
        return InputError(found, source=source, place=place, expected=expected, remedy=remedy)

    if data[:6] != b"\x93NUMPY" or len(data) < 12:
        raise refuse("not a .npy array", "NumPy's .npy format")
    start, width = (10, 2) if data[6] == 1 else (12, 4)
    end = start + int.from_bytes(data[start - width : start], "little")
    header = data[start:end].decode("latin-1")
    match = _NPY_HEADER.fullmatch(header)
    if match is None:
        kind = re.search(r"'descr': (.{1,40}?), 'fortran", header)
        found = f"an array of {kind.group(1)}" if kind else "the .npy header does not parse"
        raise refuse(found, "an array of whole numbers")
    order, letter, size, fortran, dims = match.groups()
    if f"{letter}{size}" not in _WHOLE_KINDS:
        raise refuse(
            f"an array of type {order}{letter}{size or ''}",
            "whole numbers (uint8, uint16 or int32)",
            "arrays of objects or fractions are no expert ids",
        )
    shape = tuple(int(word) for word in dims.replace(" ", "").split(",") if word)
    # also of an array without elements NumPy multiplies the dimensions
    if len(shape) > _MAX_DIMENSIONS or math.prod(filter(None, shape)) >= 2**40:
        raise refuse(f"an array of shape {shape!s:.60}", "[tokens, layers, top-k]")
    needed = math.prod(shape) * int(size)
    if len(data) - end != needed:
        raise refuse(f"{len(data) - end} bytes of data", f"{needed} for shape {shape}")
    flat = np.frombuffer(data, np.dtype(f"{order}{letter}{size}"), offset=end)
    return flat.reshape(shape, order="F" if fortran == "True" else "C")


def decode_base64(text: str, source: object, place: str) -> bytes:
    """The bytes of base64 ``text``.

    Raises
    ------
    InputError
        It is not base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(
            f"{text[:20]!r} is not base64: {error}",
            source=source,
            place=place,
            remedy=CUT_SHORT,
        ) from error


def routed_experts(
    array: npt.NDArray[Any], model: ModelSpec, source: object, place: str
) -> npt.NDArray[np.uint16]:
    """The selections uint16 [T, L, K] of a request's array [T, decoder layers, K].

    Columns of dense layers must be zeros and are dropped. An array of exactly the MoE layers is
    taken as one from which they were dropped already.

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

    least = model.moe_layers[-1] + 1
    wanted = f"[tokens, {least} or more layers, {model.top_k}] for {model.name}"
    if array.ndim != 3 or array.dtype.kind not in "iu":
        raise refuse(f"{array.dtype} of shape {list(array.shape)}", f"whole numbers {wanted}")
    layers = array.shape[1]
    if array.shape[2] != model.top_k:
        raise refuse(f"{array.shape[2]} experts a token", f"{model.top_k}, top-k of {model.name}")
    if layers < least and layers != model.num_layers:
        raise refuse(f"{layers} layers", wanted)
    if layers >= least:
        dense = np.setdiff1d(np.arange(layers), model.moe_layers)
        for layer in dense:
            stray = array[:, layer].any(axis=1)
            if stray.any():
                token = int(np.argmax(stray))
                raise refuse(
                    f"experts {array[token, layer].tolist()}",
                    f"zeros, for {model.name} has its MoE layers at {model.layers_text()}",
                    f"token {token} layer {layer}",
                )
        array = array[:, list(model.moe_layers)]
    if array.size and (array.min() < 0 or array.max() >= model.num_experts):
        bad = (array < 0) | (array >= model.num_experts)
        first = np.unravel_index(int(np.argmax(bad)), array.shape)
        raise refuse(
            f"expert {array[first]}",
            f"ids 0..{model.num_experts - 1} of {model.name}",
            f"token {first[0]} layer {model.moe_layers[first[1]]}",
        )
    experts = np.ascontiguousarray(array, np.uint16)
    twice = check_experts(experts, model.num_experts)
    if twice is not None:
        row, at = twice
        ids = experts[row, at].tolist()
        where = f"token {row} layer {model.moe_layers[at]}"
        if not any(ids):
            raise refuse(
                "nothing was recorded (all ids are 0)",
                f"{model.top_k} different experts in each MoE layer, {model.layers_text()}",
                where,
            )
        raise refuse(
            f"experts {ids} name one expert twice", f"{model.top_k} different experts", where
        )
    return experts


def equal_rows_at_start(experts: npt.NDArray[np.uint16]) -> int:
    """How many rows of [T, L, K] at the start are equal to the first."""
    if not len(experts):
        return 0
    other = (experts != experts[0]).any(axis=(1, 2))
    return int(np.argmax(other)) if other.any() else len(experts)


# --------------------------------------------------------------------------------------- responses


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, value) of each line of a JSONL file that is not blank.

    Raises
    ------
    InputError
        Unreadable, not UTF-8 or not JSON; names the line.
    """
    with OpenFile(path) as file:
        for number, line in file.lines():
            if not line.strip():
                continue
            place = f"line {number}"
            try:
                yield place, parse_json(line.rstrip(b"\r\n").decode("utf-8"), "")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"byte {error.start} is not UTF-8", source=path, place=place
                ) from error
            except InputError as error:
                if error.source:
                    raise
                column = error.place.partition("column ")[2]
                raise InputError(
                    error.found,
                    source=path,
                    place=f"{place} column {column}" if column else place,
                    expected=error.expected or "one JSON object a line",
                    remedy=error.remedy,
                ) from error


def whole_number(values: Mapping[str, Any], key: str, source: object, place: str) -> int | None:
    """A count of tokens in a response, or ``None`` where it is not given.

    Raises
    ------
    InputError
        It is no whole number of at least 0.
    """
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise InputError(
            f"{value!r:.60}",
            source=source,
            place=f"{place} {key!r}",
            expected="a whole number of at least 0",
        )
    return value


def json_object(value: Any, source: object, place: str) -> Mapping[str, Any]:
    """``value`` if it is a JSON object.

    Raises
    ------
    InputError
        It is none.
    """
    if not isinstance(value, dict):
        raise InputError(f"{value!r:.60}", source=source, place=place, expected="a JSON object")
    return value


def task_of_line(line: Mapping[str, Any], label: str | None, source: Path, place: str) -> str:
    """The source's label, else the line's own ``task``, else the file's stem.

    Raises
    ------
    InputError
        The line's task is no text.
    """
    if label is not None:
        return label
    task = line.get("task", default_task(source))
    if not isinstance(task, str) or not task:
        raise InputError(
            f"{task!r:.60}", source=source, place=f"{place} 'task'", expected="a non-empty text"
        )
    return task


@dataclass
class Requests:
    """Collects requests, each with all its tokens, into batches of a token-level trace.

    With P prompt tokens and C generated ones (C counts the last, which is never fed), the array
    ends at position P + C - 2: tokens that are missing are the first ones of the prompt, which
    the caller asked the engine to leave out. Where C is not known it starts at position 0. Tokens
    below position P are prefill, the others decode; where P is not known the phase is unknown.
    """

    model: ModelSpec
    tasks: dict[str, int] = field(default_factory=dict)
    batches: list[TokenBatch] = field(default_factory=list)
    profiling_rows: int = 0
    without_start: int = 0
    missing: int = 0

    def add(
        self,
        task: str,
        array: npt.NDArray[Any],
        prompt: int | None,
        generated: int | None,
        source: object,
        place: str,
    ) -> None:
        """Add a request's array [T, decoder layers, K].

        Raises
        ------
        InputError
            See :func:`routed_experts`; or the number of tokens contradicts P and C.
        """
        # Start-up rows need not be valid selections, so they go first.
        skipped = equal_rows_at_start(array) if array.ndim == 3 else 0
        if skipped < PROFILING_ROWS:
            skipped = 0
        self.profiling_rows += skipped
        experts = routed_experts(array[skipped:] if skipped else array, self.model, source, place)
        tokens = len(experts)
        first = 0
        if prompt is not None and generated is not None:
            if tokens > prompt + generated:
                raise InputError(
                    f"{tokens} tokens",
                    source=source,
                    place=place,
                    expected=f"at most {prompt} of the prompt and {generated} generated",
                    remedy="the response and its routing do not belong together, or --model is "
                    "not the model that was recorded",
                )
            first = max(prompt + generated - 1 - tokens, 0)
            if first > prompt and not skipped:  # at most the whole prompt can have been left out
                raise InputError(
                    f"{tokens} tokens",
                    source=source,
                    place=place,
                    expected=f"at least the {generated - 1} generated that were fed",
                    remedy="the response and its routing do not belong together",
                )
        elif prompt is not None and tokens < prompt and not skipped:
            raise InputError(
                f"{tokens} tokens",
                source=source,
                place=place,
                expected=f"at least the {prompt} of the prompt",
                remedy="give completion_tokens too if the first ones were left out on purpose",
            )
        if not tokens:
            return
        if first and not skipped:
            self.without_start += 1
        position = np.arange(first, first + tokens, dtype=np.int32)
        phase = np.full(tokens, UNKNOWN_PHASE, np.int8)
        if prompt is not None:
            phase = np.where(position < prompt, PREFILL, DECODE).astype(np.int8)
        if task not in self.tasks:
            require_name(task, source=source, place=place)
            require_at_most(len(self.tasks) + 1, MAX_NAMES, "tasks", source=source, place=place)
            self.tasks[task] = len(self.tasks)
        self.batches.append(
            TokenBatch(
                request=np.full(tokens, len(self.batches), np.int32),
                position=position,
                phase=phase,
                task=np.full(tokens, self.tasks[task], np.int32),
                experts=experts,
            )
        )

    def tell(self, source: object, notify: Notify) -> None:
        """Say what was left out, and refuse to go on with nothing.

        Raises
        ------
        InputError
            No request has any token.
        """
        if not self.batches:
            raise InputError(
                "no token has routed experts",
                source=source,
                expected="responses with routed experts",
                remedy="start the engine with --enable-return-routed-experts, and ask for them",
            )
        if self.profiling_rows:
            notify(f"dropped {self.profiling_rows:,} identical rows of start-up profiling")
        if self.missing:
            notify(f"left out {self.missing:,} responses without routed experts (aborted?)")
        if self.without_start:
            notify(f"{self.without_start:,} requests were recorded without the start of the prompt")
