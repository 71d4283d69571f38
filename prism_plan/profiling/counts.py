"""Tables of calls per task, layer and expert: CSV with columns task, layer, expert, count."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.files import read_text
from prism_plan.limits import (
    MAX_COLUMNS,
    MAX_NAMES,
    require_at_most,
    require_name,
    require_task_pairs,
)
from prism_plan.model import ModelSpec
from prism_plan.profiling.sources import Source
from prism_plan.profiling.tokens import require_every_layer, tell_if_uneven, tokens_of_calls
from prism_plan.trace import Trace
from prism_plan.trace_counts import CallTable, check_sums

COLUMNS = ("task", "layer", "expert", "count")


def read_counts(
    sources: Sequence[Source],
    model: ModelSpec,
    *,
    tokens: Mapping[str, int] | None = None,
    notify: Callable[[str], None] = lambda message: None,
) -> Trace:
    """One counts-only trace from CSV files.

    The column ``task`` may be missing where the source carries a label (which otherwise replaces
    it). Spaces around names and values are passed over, and blank lines. The tokens of a task are
    its calls in a layer divided by K. Where layers disagree (counts reconstructed from rounded
    frequencies), the layer with the most calls decides and ``notify`` is told; ``tokens`` gives
    the true number.

    Raises
    ------
    InputError
        A column is missing, a value is not a whole number, NaN or negative, a layer or expert is
        not of the model, a key stands twice, a task has no calls in some layer, a sum is too large.
    """
    seen: dict[str, None] = {}
    parts: list[npt.NDArray[np.int64]] = []
    for source in sources:
        names, counts = _read_csv(source, model)
        for name in names:
            if name in seen:
                raise InputError(
                    f"task {name!r} was read already",
                    source=source.path,
                    remedy="label each source with a task of its own, TASK=SOURCE",
                )
        seen.update(dict.fromkeys(names))
        parts.append(counts)
    tasks = list(seen)
    require_task_pairs(len(tasks), model.num_layers, model.num_experts)
    counts = np.concatenate(parts)
    known = dict(tokens or {})
    for name in known:
        if name not in tasks:
            raise InputError(
                f"unknown task {name!r}", parameter="tokens", expected=", ".join(tasks)
            )
    files = ", ".join(str(source.path) for source in sources)
    number = np.array(
        [known.get(t) or tokens_of_calls(t, counts[i], model, files) for i, t in enumerate(tasks)],
        np.int64,
    )
    for index, name in enumerate(tasks):
        over = int(counts[index].max())
        if over > number[index]:
            raise InputError(
                f"task {name!r}: {over} calls of one expert in a layer, {number[index]} tokens",
                source=files,
                expected="at most one call a token",
                remedy="check the counts and ``tokens``",
            )
    check_sums(model, tasks, number, counts, files)
    for index, name in enumerate(tasks):
        if name not in known:
            remedy = f" (the true number can be given: tokens of {name!r})"
            tell_if_uneven(name, counts[index], model, notify, remedy)
    return Trace(
        model=model,
        tasks=tuple(tasks),
        counts=counts,
        tokens=number,
        provenance={"source": "counts", "files": [source.path.name for source in sources]},
        name="counts",
    )


#: Rows that are held as Python's numbers before they enter the table of calls.
_CHUNK_ROWS = 65_536
#: A line of text with its end, of whatever kind.
_LINE = re.compile(r"[^\r\n]*+(?:\r\n|\r|\n)|[^\r\n]++")


def _read_csv(source: Source, model: ModelSpec) -> tuple[list[str], npt.NDArray[np.int64]]:
    path = source.path
    text = (found[0] for found in _LINE.finditer(read_text(path)))
    reader = csv.reader(text, strict=True, skipinitialspace=True)
    wanted = COLUMNS if source.task is None else COLUMNS[1:]
    code_of: dict[str, int] = {}
    rows: list[tuple[int, int, int, int, int]] = []
    calls = CallTable(model, path)

    def add() -> None:
        require_at_most(len(code_of), MAX_NAMES, "tasks", source=path)
        task_code, layers, experts, counts, lines = np.array(rows, np.int64).T
        calls.add(list(code_of), None, task_code, layers, experts, counts, lines)
        rows.clear()

    try:
        lines = ([cell.strip() for cell in cells] for cells in reader)
        lines = (cells for cells in lines if cells not in ([], [""]))  # blank lines
        header = next(lines, [])
        require_at_most(len(header), MAX_COLUMNS, "columns", source=path, place="line 1")
        for column in wanted:
            if header.count(column) != 1:
                raise InputError(
                    f"columns {', '.join(map(_shown, header)) or '(none)'}",
                    source=path,
                    place=f"line {max(reader.line_num, 1)}",
                    expected=f"{', '.join(wanted)}, each once",
                )
        at = [header.index(column) for column in wanted]
        for cells in lines:
            place = f"line {reader.line_num}"
            if len(cells) != len(header):
                raise InputError(
                    f"{len(cells)} values",
                    source=path,
                    place=place,
                    expected=f"{len(header)}",
                    remedy="the file may be cut short",
                )
            values = [cells[i] for i in at]
            task = source.task if source.task is not None else values.pop(0)
            if not task.strip():
                raise InputError("empty task", source=path, place=place)
            if task not in code_of:
                require_name(task, source=path, place=place)
                code_of[task] = len(code_of)
            layer, expert, count = (
                _whole(v, path, f"{place} column {c!r}")
                for v, c in zip(values, COLUMNS[1:], strict=True)
            )
            rows.append((code_of[task], layer, expert, count, reader.line_num))
            if len(rows) == _CHUNK_ROWS:
                add()
    except csv.Error as error:
        raise InputError(
            f"not CSV: {error}", source=path, place=f"line {reader.line_num}"
        ) from None
    if rows:
        add()
    if not calls.rows:
        raise InputError("no rows in it", source=path)
    names = list(code_of)
    table = calls.counts(len(names))
    for name, of_task in zip(names, table, strict=True):
        require_every_layer(name, of_task, model, path)
    return names, table


def _shown(name: str) -> str:
    """A column's name as it is, or with what cannot be seen in it."""
    return name if name.isascii() and name.isprintable() else ascii(name)


def _whole(text: str, path: Any, place: str) -> int:
    # int() would also take 1_0, +6 and digits of other scripts
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
    if not 0 <= value < 2**53:
        raise InputError(
            f"{text!r:.60}",
            source=path,
            place=place,
            expected="a whole number of at least 0 and below 2^53",
        )
    return value
