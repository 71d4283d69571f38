"""Reading trace files: one file, opened once, checked in one pass over its rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.input_limits import (
    MAX_NAMES,
    MAX_SELECTIONS,
    MAX_TOKENS,
    require_at_most,
    require_task_pairs,
)
from prism_plan.io.call_table import CallTable, check_sums
from prism_plan.io.model_spec import spec_from_json
from prism_plan.io.open_file import OpenFile
from prism_plan.io.text_files import file_name_text
from prism_plan.io.token_batches import KeptTokens, TokenSource, token_batches
from prism_plan.io.trace_columns import StringCodes, column_values
from prism_plan.io.trace_file import TraceFile
from prism_plan.io.trace_schema import (
    BATCH_ROWS,
    REMEDY,
    counts_schema,
    require_columns,
)
from prism_plan.model_spec import ModelSpec
from prism_plan.trace import TokenBatch, Trace
from prism_plan.trace_totals import RequestLengths, TraceTotals


def read_trace(
    path: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
    *,
    keep_tokens: bool = False,
) -> Trace:
    """Open a trace file, check all of it in one pass over its rows, and total it.

    The tokens themselves stay in the file: memory does not grow with its length, but for eight
    bytes a token and sixteen a request. Each pass over ``trace.batches()`` decodes the file again,
    unless ``keep_tokens`` keeps them in memory, one or two bytes a selection, which it does up to
    :data:`~prism_plan.input_limits.MAX_KEPT_BYTES`; gate weights are then left out, which planning
    and simulating do not use. ``progress`` is called with (rows read, all rows).

    Raises
    ------
    InputError
        Not Parquet, truncated, not one of our traces, a newer version, a wrong column, an expert
        or layer that the model does not have, a negative count, a duplicate row, a size beyond the
        bounds of :mod:`prism_plan.input_limits`; the file is written to while it is read.
    """
    return read_open_trace(OpenFile(path), progress, keep_tokens=keep_tokens)


def read_open_trace(
    file: OpenFile,
    progress: Callable[[int, int], None] | None = None,
    *,
    keep_tokens: bool = False,
) -> Trace:
    """The trace in a file that is open already; see :func:`read_trace`.

    The trace keeps the file as long as it needs it.
    """
    found = TraceFile(file)
    header = found.header
    model = spec_from_json(header.get("model"), file.path, place="model")
    provenance = header.get("provenance")
    if not isinstance(provenance, Mapping):
        raise InputError(
            f"{provenance!r:.60}", source=file.path, place="provenance", expected="object"
        )
    common: dict[str, Any] = {
        "model": model,
        "provenance": dict(provenance),
        "name": file_name_text(file.path),
        "sha256": found.sha256(),
    }
    if header["kind"] == "counts":
        return _read_counts(found, common)
    told = progress or (lambda done, total: None)
    return _read_tokens(found, model, common, told, keep_tokens=keep_tokens)


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON header of a trace file, its format, version and kind checked.

    Raises
    ------
    InputError
        See :func:`read_trace`.
    """
    with OpenFile(path) as file:
        return TraceFile(file).header


# ------------------------------------------------------------------------------------------ tokens


def _read_tokens(
    file: TraceFile,
    model: ModelSpec,
    common: Mapping[str, Any],
    progress: Callable[[int, int], None],
    *,
    keep_tokens: bool,
) -> Trace:
    path = file.path
    total = _require_rows(file, model)
    words = StringCodes(path)
    totals = TraceTotals(model, source=path)
    kept = KeptTokens.of(model, total) if keep_tokens else None
    keys = np.empty(total, np.int64)
    row = 0
    for batch in token_batches(file, model, words):
        totals.grow(len(words.code_of))
        if bad := totals.add(batch.experts, batch.task, batch.request):
            raise batch.selection_error(model, *bad, first_row=row).within(path)
        _require_not_negative(path, batch, row)
        _require_weights(path, batch, row)
        keys[row : row + len(batch)] = batch.request.astype(np.int64) << 32 | batch.position
        if kept is not None:
            kept.add(batch)
        row += len(batch)
        progress(row, total)
    if row == 0:
        raise InputError("the trace has no rows", source=path, remedy=REMEDY)
    _require_distinct_tokens(path, keys[:row])
    del keys
    twice = totals.request_of_two_tasks()
    if twice is not None:
        raise _two_tasks_error(file, model, twice)
    totals.grow(len(words.code_of))
    used = np.flatnonzero(totals.tokens)  # a dictionary may hold words that no row has
    tasks = tuple(np.array(words.words, object)[used])
    new_code = np.cumsum(totals.tokens > 0) - 1
    if kept is not None:
        kept.renumber_tasks(new_code)
    lengths = totals.request_lengths()
    has_weights = "weights" in file.schema.names and not keep_tokens
    return Trace(
        **common,
        tasks=tasks,
        counts=totals.counts[used],
        tokens=totals.tokens[used],
        requests=totals.requests()[used],
        batches=TokenSource(
            file, model, tasks, weights=has_weights, keep_tokens=keep_tokens, kept=kept
        ),
        has_weights=has_weights,
        lengths=RequestLengths(new_code[lengths.task] << 32 | lengths.request, lengths.tokens),
    )


def _require_rows(file: TraceFile, model: ModelSpec) -> int:
    """How many rows a file has; equal ones take no space in it, but all are looked at."""
    total = file.num_rows
    require_at_most(total, MAX_TOKENS, "tokens", source=file.path, remedy="split the trace")
    require_at_most(
        total * model.num_layers * model.top_k,
        MAX_SELECTIONS,
        f"selections ({total:,} tokens × {model.num_layers:,} layers × top-{model.top_k})",
        source=file.path,
        remedy="split the trace",
    )
    return total


def _two_tasks_error(file: TraceFile, model: ModelSpec, request: int) -> InputError:
    """The error of a request whose rows are of two tasks; names them in the order of the rows."""
    words = StringCodes(file.path)
    seen: dict[int, None] = {}
    for batch in token_batches(file, model, words, weights=False):
        seen.update(dict.fromkeys(batch.task[batch.request == request].tolist()))
    first, second = (words.words[code] for code in list(seen)[:2])
    return InputError(
        f"request {request} has tasks {first!r} and {second!r}",
        source=file.path,
        expected="one task for each request, numbers unique in the file",
    )


def _require_not_negative(path: object, batch: TokenBatch, first_row: int) -> None:
    for name, column in (("request", batch.request), ("position", batch.position)):
        if column.min(initial=0) < 0:
            row = int(np.argmax(column < 0))
            raise InputError(
                f"{int(column[row])}",
                source=path,
                place=f"row {first_row + row} column {name!r}",
                expected="a number of at least 0",
            )


def _require_weights(path: object, batch: TokenBatch, first_row: int) -> None:
    if batch.weights is None:
        return
    bits = batch.weights.view(np.uint16)  # numpy compares them twenty times as fast as float16
    if bits.max(initial=0) >= 0x7C00 and ((bits >= 0x7C00) & (bits != 0x8000)).any():
        # from 0x7C00 on: infinity and NaN, then all with a sign, of which 0x8000 is -0
        raise InputError(
            "a gate weight is negative, NaN or infinite",
            source=path,
            place=f"rows {first_row}..{first_row + len(batch) - 1}",
            expected="finite numbers of at least 0",
        )


def _require_distinct_tokens(path: object, keys: npt.NDArray[np.int64]) -> None:
    if (keys[1:] > keys[:-1]).all():  # most traces are in order already: spare the sorting
        return
    keys.sort()
    same = np.flatnonzero(keys[1:] == keys[:-1])
    if len(same):
        key = int(keys[same[0]])
        raise InputError(
            f"request {key >> 32} position {key & 0xFFFFFFFF} is duplicated",
            source=path,
            expected="each token once",
        )


# ------------------------------------------------------------------------------------------ counts


def _read_counts(file: TraceFile, common: Mapping[str, Any]) -> Trace:
    path = file.path
    model: ModelSpec = common["model"]
    tokens = _tokens_by_task(path, file.header.get("tokens"))
    require_task_pairs(len(tokens), model.num_layers, model.num_experts, source=path)
    words = StringCodes(path)
    table = CallTable(model, path)
    names: list[str] = []
    number = np.zeros(0, np.int64)
    require_columns(path, file.schema, counts_schema())
    for rows in file.record_batches(BATCH_ROWS):
        task = words.codes(rows.column("task"))
        if len(words.code_of) != len(names):
            names = words.words
            _require_same_tasks(path, [name for name in names if name not in tokens])
            number = np.array([tokens[name] for name in names], np.int64)
        layer, expert, count = (
            column_values(rows.column(name)) for name in ("layer", "expert", "count")
        )
        table.add(names, number, task, layer, expert, count)
    file.close()
    if table.rows == 0:
        raise InputError("the trace has no rows", source=path, remedy=REMEDY)
    _require_same_tasks(path, set(tokens) - set(names))
    counts = table.counts(len(names))
    check_sums(model, names, number, counts, path)
    return Trace(**common, tasks=tuple(names), counts=counts, tokens=number)


def _tokens_by_task(path: object, tokens: Any) -> Mapping[str, int]:
    """The header's tokens of each task, checked."""
    if not isinstance(tokens, Mapping) or not tokens:
        raise InputError(f"{tokens!r:.60}", source=path, place="tokens", expected="tokens per task")
    require_at_most(len(tokens), MAX_NAMES, "tasks", source=path, place="tokens")
    for task, number in tokens.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 < number < 2**53:
            raise InputError(
                f"{number!r:.60}",
                source=path,
                place=f"tokens.{task:.60}",
                expected="a whole number of at least 1",
            )
    return tokens


def _require_same_tasks(path: object, others: Iterable[str]) -> None:
    for word in sorted(others):
        raise InputError(
            f"task {word!r} is in only one of the rows and the tokens per task", source=path
        )
