"""Read tables of calls per task, layer and expert: CSV with columns task, layer, expert, count.

``layer_id`` and ``expert_id`` are other names of two of them: SGLang's first recorder (of early
2025) wrote a table ``layer_id,expert_id,count`` a rank, of decoder layers. Those of all ranks
together are the recording. Tables may be compressed with gzip.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.input_limits import (
    MAX_COLUMNS,
    MAX_NAMES,
    require_at_most,
    require_name,
    require_task_pairs,
)
from prism_plan.io.bad_rows import BadRows
from prism_plan.io.call_table import CallTable, check_sums
from prism_plan.io.gzip_text import read_maybe_gzipped_text
from prism_plan.io.location import Location
from prism_plan.model_spec import ModelSpec
from prism_plan.profiling.common.call_counts import Counts, notify_if_uneven, tokens_of_calls
from prism_plan.profiling.common.messages import Notify
from prism_plan.profiling.common.task_counts import TaskCounts
from prism_plan.profiling.sources import Source
from prism_plan.trace import Trace

COLUMNS = ("task", "layer", "expert", "count")
#: Other names of columns.
OTHER_NAMES = {"layer_id": "layer", "expert_id": "expert"}


def read_counts(
    sources: Sequence[Source],
    model: ModelSpec,
    *,
    tokens: Mapping[str, int] | None = None,
    skip_bad: bool = False,
    notify: Notify = lambda message: None,
) -> Trace:
    """One counts-only trace from CSV files.

    The column ``task`` may be missing where the source has a label, which replaces it; tables of
    one label are added up. Spaces around names and values are ignored, and blank lines. With
    ``skip_bad`` rows that do not parse or are of no layer or expert of the model are left out. The
    tokens of a task are its calls in a layer divided by K; where layers disagree (counts
    reconstructed from rounded frequencies) the layer with the most calls decides, unless ``tokens``
    gives the true number. ``notify`` is called with what was left out or looks wrong.

    Raises
    ------
    InputError
        A column is missing, a value is not a whole number, NaN or negative, a layer or expert is
        not of the model, a key is duplicated, a task has no calls in a layer, a sum is too large,
        a task without a label comes from two sources.
    """
    added = TaskCounts()
    bad = BadRows(skip_bad)
    for source in sources:
        for task, calls in zip(*_read_csv(source, model, bad), strict=True):
            added.add(task, calls, source)
    bad.report(notify)
    tasks = list(added.calls)
    added.require_every_layer(model)
    require_task_pairs(len(tasks), model.num_layers, model.num_experts)
    true_tokens = dict(tokens or {})
    for task in true_tokens:
        if task not in tasks:
            expected = ", ".join(tasks)
            raise InputError(f"unknown task {task!r}", parameter="tokens", expected=expected)
    files = ", ".join(str(source.path) for source in sources)
    num_tokens = np.array(
        [
            true_tokens.get(task) or tokens_of_calls(task, calls, model, files)
            for task, calls in added.calls.items()
        ],
        np.int64,
    )
    for number, (task, calls) in zip(num_tokens, added.calls.items(), strict=True):
        most = int(calls.max())
        if most > number:
            raise Location(files).error(
                f"task {task!r}: {most} calls of one expert in a layer, {number} tokens",
                "at most one call a token",
                "check the counts and ``tokens``",
            )
    counts = np.stack(list(added.calls.values()))
    check_sums(model, tasks, num_tokens, counts, files)
    for text in added.notices:
        notify(text)
    for task, calls in added.calls.items():
        if task not in true_tokens:
            remedy = f" (the true number can be given: tokens of {task!r})"
            notify_if_uneven(task, calls, model, notify, remedy)
    return Trace(
        model=model,
        tasks=tuple(tasks),
        counts=counts,
        tokens=num_tokens,
        provenance={
            "source": "counts",
            "files": [source.path.name for source in sources],
            **bad.provenance(),
        },
        name="counts",
    )


#: Rows that are collected before they are added to the table of calls.
_CHUNK_ROWS = 65_536
#: A line of text with its end, of whatever kind.
_LINE = re.compile(r"[^\r\n]*+(?:\r\n|\r|\n)|[^\r\n]++")


def _read_csv(source: Source, model: ModelSpec, bad: BadRows) -> tuple[list[str], Counts]:
    """Tasks, and their calls [tasks, L, E]."""
    path = source.path
    text = (found[0] for found in _LINE.finditer(read_maybe_gzipped_text(path)))
    reader = csv.reader(text, strict=True, skipinitialspace=True)
    code_of: dict[str, int] = {}
    rows: list[tuple[int, int, int, int, int]] = []
    calls = CallTable(model, path)

    def add_rows() -> None:
        require_at_most(len(code_of), MAX_NAMES, "tasks", source=path)
        columns = np.array(rows, np.int64).T
        rows.clear()
        if bad.skip:
            columns = columns[:, _rows_of_model(columns, list(code_of), calls, bad, path)]
        if columns.size:
            task_code, layers, experts, counts, lines = columns
            calls.add(list(code_of), None, task_code, layers, experts, counts, lines)
            bad.count_good(path, len(lines))

    try:
        lines = ([cell.strip() for cell in cells] for cells in reader)
        lines = (cells for cells in lines if cells not in ([], [""]))  # blank lines
        header = next(lines, [])
        indices = _columns(header, source, Location(path, f"line {max(reader.line_num, 1)}"))
        for cells in lines:
            at = Location(path, f"line {reader.line_num}")
            try:
                task, layer, expert, count = _row(cells, header, indices, source.task, at)
            except InputError as error:
                bad.skip_or_raise(path, error)
                continue
            if task not in code_of:
                require_name(task, source=path, place=at.place)
                code_of[task] = len(code_of)
            rows.append((code_of[task], layer, expert, _count(count, at), reader.line_num))
            if len(rows) == _CHUNK_ROWS:
                add_rows()
    except csv.Error as error:
        raise Location(path, f"line {reader.line_num}").error(f"not CSV: {error}") from None
    if rows:
        add_rows()
    bad.require_good()
    if not calls.rows:
        raise Location(path).error("no rows in it")
    names = list(code_of)
    return names, calls.counts(len(names))


def _columns(header: Sequence[str], source: Source, at: Location) -> list[int]:
    """Index of each column of a table, in the order of :data:`COLUMNS`."""
    require_at_most(len(header), MAX_COLUMNS, "columns", source=source.path, place="line 1")
    required = COLUMNS if source.task is None else COLUMNS[1:]
    names = [OTHER_NAMES.get(name, name) for name in header]
    for column in required:
        if names.count(column) != 1:
            unlabelled = column == "task" and not names.count(column)
            raise at.error(
                f"columns {', '.join(map(_visible, header)) or '(none)'}",
                f"{', '.join(required)}, each once (or layer_id, expert_id)",
                "label it with its task, TASK=SOURCE" if unlabelled else "",
            )
    return [names.index(column) for column in required]


def _row(
    cells: Sequence[str],
    header: Sequence[str],
    indices: Sequence[int],
    label: str | None,
    at: Location,
) -> tuple[str, int, int, str]:
    """Task, layer, expert, and the text of the count of a row."""
    if len(cells) != len(header):
        raise at.error(f"{len(cells)} values", f"{len(header)}", "the file may be truncated")
    values = [cells[i] for i in indices]
    task = label if label is not None else values.pop(0)
    if not task.strip():
        raise at.error("empty task")
    layer, expert = (
        _integer(value, column, at) for value, column in zip(values[:2], COLUMNS[1:3], strict=True)
    )
    if not _is_digits(values[2]):
        _count(values[2], at)
    return task, layer, expert, values[2]


def _rows_of_model(
    columns: npt.NDArray[np.int64],
    tasks: Sequence[str],
    calls: CallTable,
    bad: BadRows,
    path: Path,
) -> npt.NDArray[np.bool_]:
    """Which rows are of a layer and an expert of the model, bool [rows]; others are left out."""
    model = calls.model
    good: npt.NDArray[np.bool_] = np.isin(columns[1], model.moe_layers) & (
        columns[2] < model.num_experts
    )
    for row in columns.T[~good]:
        task, layer, expert, count, line = row[:, None]
        try:
            calls.add(tasks, None, task, layer, expert, count, line)
        except InputError as error:
            bad.skip_or_raise(path, error)
    return good


def _visible(name: str) -> str:
    """A column's name, with escapes for characters that cannot be seen."""
    return name if name.isascii() and name.isprintable() else ascii(name)


def _is_digits(text: str) -> bool:
    # int() would also take 1_0, +6 and digits of other scripts
    return text.isascii() and text.isdigit()


def _count(text: str, at: Location) -> int:
    """A count; one that is too large is no bad row, for without it the sum would be wrong."""
    return _integer(text, "count", at)


def _integer(text: str, column: str, at: Location) -> int:
    value = int(text) if _is_digits(text) and len(text) < 20 else -1
    if not 0 <= value < 2**53:
        expected = "a whole number of at least 0 and below 2^53"
        raise at.within(f"column {column!r}").error(f"{text!r:.60}", expected)
    return value
