"""What the readers of engine recordings share: arrays, responses, tasks and tokens of counts."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.model import ModelSpec
from prism_plan.profiling.common.call_counts import (
    require_every_layer,
    tell_if_uneven,
    tokens_of_calls,
)
from prism_plan.profiling.sources import Source, distinct
from prism_plan.text import shown
from prism_plan.trace import PHASES, Trace

Notify = Callable[[str], None]

PREFILL, DECODE = PHASES.index("prefill"), PHASES.index("decode")
CUT_SHORT = "the file may be cut short; record or copy it again"
CHECK_MODEL = "check that ``model`` is the model that was recorded"


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
    given: set[Path] = set()
    for source in sources:
        if source.path.resolve() in given:
            raise InputError(
                "given twice",
                source=source.path,
                expected="each recording once, or its requests count twice",
                remedy="leave one of the two out",
            )
        given.add(source.path.resolve())
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
    if path.is_dir():
        return whole.name
    return Path(whole.stem).stem if whole.suffix == ".gz" else whole.stem


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
        number = tokens_of_calls(task, calls, model)
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


# --------------------------------------------------------------------------------------- responses


def whole_number(values: Mapping[str, Any], key: str, source: object, place: str) -> int | None:
    """A count of tokens in a response, or ``None`` where it is not given.

    Raises
    ------
    InputError
        It is no whole number that fits into an int32.
    """
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise InputError(
            shown(value),
            source=source,
            place=f"{place} {key!r}",
            expected=f"a whole number from 0 to {2**31 - 1:,}",
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
        raise InputError(shown(value), source=source, place=place, expected="a JSON object")
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
            shown(task), source=source, place=f"{place} 'task'", expected="a non-empty text"
        )
    return task
