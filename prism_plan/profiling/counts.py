"""Tables of calls per task, layer and expert: CSV with columns task, layer, expert, count.

``layer_id`` and ``expert_id`` are other names of two of them: SGLang's first recorder (of early
2025) wrote a table ``layer_id,expert_id,count`` a rank, of decoder layers. Those of all ranks
together are the recording. Tables may be compressed with gzip.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.io.bad_rows import BadRows
from prism_plan.io.call_table import CallTable, check_sums
from prism_plan.io.gzip_text import read_maybe_gzipped_text
from prism_plan.limits import (
    MAX_COLUMNS,
    MAX_NAMES,
    require_at_most,
    require_name,
    require_task_pairs,
)
from prism_plan.model import ModelSpec
from prism_plan.profiling.added import AddedCounts
from prism_plan.profiling.sources import Source
from prism_plan.profiling.tokens import require_every_layer, tell_if_uneven, tokens_of_calls
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
    notify: Callable[[str], None] = lambda message: None,
) -> Trace:
    """One counts-only trace from CSV files.

    The column ``task`` may be missing where the source carries a label (which otherwise replaces
    it); tables of one label are added up. Spaces around names and values are passed over, and blank
    lines. With ``skip_bad`` rows that do not parse or are of no layer or expert of the model are
    left out, and ``notify`` is told. The tokens of a task are its calls in a layer divided by K.
    Where layers disagree (counts reconstructed from rounded frequencies), the layer with the most
    calls decides and ``notify`` is told; ``tokens`` gives the true number.

    Raises
    ------
    InputError
        A column is missing, a value is not a whole number, NaN or negative, a layer or expert is
        not of the model, a key stands twice, a task has no calls in some layer, a sum is too large,
        a task without a label comes from two sources.
    """
    added = AddedCounts()
    bad = BadRows(skip_bad)
    for source in sources:
        for name, of_task in zip(*_read_csv(source, model, bad), strict=True):
            added.add(name, of_task, source)
    bad.tell(notify)
    tasks = list(added.calls)
    for name, of_task in added.calls.items():
        require_every_layer(name, of_task, model, added.files(name))
    require_task_pairs(len(tasks), model.num_layers, model.num_experts)
    counts = np.stack(list(added.calls.values()))
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
    for text in added.copies:
        notify(text)
    for index, name in enumerate(tasks):
        if name not in known:
            remedy = f" (the true number can be given: tokens of {name!r})"
            tell_if_uneven(name, counts[index], model, notify, remedy)
    return Trace(
        model=model,
        tasks=tuple(tasks),
        counts=counts,
        tokens=number,
        provenance={
            "source": "counts",
            "files": [source.path.name for source in sources],
            **bad.provenance(),
        },
        name="counts",
    )


#: Rows that are held as Python's numbers before they enter the table of calls.
_CHUNK_ROWS = 65_536
#: A line of text with its end, of whatever kind.
_LINE = re.compile(r"[^\r\n]*+(?:\r\n|\r|\n)|[^\r\n]++")


def _read_csv(
    source: Source, model: ModelSpec, bad: BadRows
) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Tasks, and their calls [tasks, L, E]."""
    path = source.path
    text = (found[0] for found in _LINE.finditer(read_maybe_gzipped_text(path)))
    reader = csv.reader(text, strict=True, skipinitialspace=True)
    code_of: dict[str, int] = {}
    rows: list[tuple[int, int, int, int, int]] = []
    calls = CallTable(model, path)

    def add() -> None:
        require_at_most(len(code_of), MAX_NAMES, "tasks", source=path)
        columns = np.array(rows, np.int64).T
        rows.clear()
        if bad.skip:
            columns = columns[:, _of_model(columns, list(code_of), calls, bad, path)]
        if columns.size:
            task_code, layers, experts, counts, lines = columns
            calls.add(list(code_of), None, task_code, layers, experts, counts, lines)
            bad.keep(path, len(lines))

    try:
        lines = ([cell.strip() for cell in cells] for cells in reader)
        lines = (cells for cells in lines if cells not in ([], [""]))  # blank lines
        header = next(lines, [])
        at = _columns(header, source, f"line {max(reader.line_num, 1)}")
        for cells in lines:
            place = f"line {reader.line_num}"
            try:
                task, layer, expert, count = _row(cells, header, at, source, place)
            except InputError as error:
                bad.skip_or_raise(path, error)
                continue
            if task not in code_of:
                require_name(task, source=path, place=place)
                code_of[task] = len(code_of)
            rows.append((code_of[task], layer, expert, _count(count, path, place), reader.line_num))
            if len(rows) == _CHUNK_ROWS:
                add()
    except csv.Error as error:
        raise InputError(
            f"not CSV: {error}", source=path, place=f"line {reader.line_num}"
        ) from None
    if rows:
        add()
    bad.require_good()
    if not calls.rows:
        raise InputError("no rows in it", source=path)
    names = list(code_of)
    return names, calls.counts(len(names))


def _columns(header: Sequence[str], source: Source, place: str) -> list[int]:
    """Where the columns of a table stand, in the order of :data:`COLUMNS`."""
    require_at_most(len(header), MAX_COLUMNS, "columns", source=source.path, place="line 1")
    wanted = COLUMNS if source.task is None else COLUMNS[1:]
    names = [OTHER_NAMES.get(name, name) for name in header]
    for column in wanted:
        if names.count(column) != 1:
            unlabelled = column == "task" and not names.count(column)
            raise InputError(
                f"columns {', '.join(map(_shown, header)) or '(none)'}",
                source=source.path,
                place=place,
                expected=f"{', '.join(wanted)}, each once (or layer_id, expert_id)",
                remedy="label it with its task, TASK=SOURCE" if unlabelled else "",
            )
    return [names.index(column) for column in wanted]


def _row(
    cells: Sequence[str], header: Sequence[str], at: Sequence[int], source: Source, place: str
) -> tuple[str, int, int, str]:
    """Task, layer, expert, and the text of the count of a row."""
    if len(cells) != len(header):
        raise InputError(
            f"{len(cells)} values",
            source=source.path,
            place=place,
            expected=f"{len(header)}",
            remedy="the file may be cut short",
        )
    values = [cells[i] for i in at]
    task = source.task if source.task is not None else values.pop(0)
    if not task.strip():
        raise InputError("empty task", source=source.path, place=place)
    layer, expert = (
        _whole(value, source.path, f"{place} column {column!r}")
        for value, column in zip(values[:2], COLUMNS[1:3], strict=True)
    )
    if not _looks_like_a_number(values[2]):
        _count(values[2], source.path, place)
    return task, layer, expert, values[2]


def _of_model(
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


def _shown(name: str) -> str:
    """A column's name as it is, or with what cannot be seen in it."""
    return name if name.isascii() and name.isprintable() else ascii(name)


def _looks_like_a_number(text: str) -> bool:
    # int() would also take 1_0, +6 and digits of other scripts
    return text.isascii() and text.isdigit()


def _count(text: str, path: Path, place: str) -> int:
    """A count; one that is too large is no bad row, for without it the sum would be wrong."""
    return _whole(text, path, f"{place} column 'count'")


def _whole(text: str, path: Path, place: str) -> int:
    value = int(text) if _looks_like_a_number(text) and len(text) < 20 else -1
    if not 0 <= value < 2**53:
        raise InputError(
            f"{text!r:.60}",
            source=path,
            place=place,
            expected="a whole number of at least 0 and below 2^53",
        )
    return value
