"""Reading trace files: one file, opened once, checked in one pass over its rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.input_limits import (
    MAX_BATCH_SELECTIONS,
    MAX_NAMES,
    MAX_SELECTIONS,
    MAX_TOKENS,
    require_at_most,
    require_task_pairs,
)
from prism_plan.io.call_table import CallTable, check_sums
from prism_plan.io.model_spec import spec_from_json
from prism_plan.io.open_file import OpenFile
from prism_plan.io.parquet import batches, key_value_metadata, num_rows, open_parquet
from prism_plan.io.text_files import file_name_text
from prism_plan.io.trace_columns import StringCodes, column_values, require_no_nulls
from prism_plan.io.trace_schema import (
    BATCH_ROWS,
    REMEDY,
    counts_schema,
    parse_header,
    require_columns,
    token_schema,
)
from prism_plan.model_spec import ModelSpec
from prism_plan.trace import PHASES, TokenBatch, Trace
from prism_plan.trace_totals import TraceTotals


class TraceFile:
    """A trace file that is open: its header, its columns, its rows and its digest.

    All of them, and every pass over the rows, are read through the one descriptor of ``file``, so
    that they are of one file even where another takes its name meanwhile.

    Parameters
    ----------
    file
        The open file; the trace file keeps it as long as it needs it.

    Attributes
    ----------
    header
        The JSON object of the metadata: format, version, kind, model, provenance.
    schema
        Its columns, a ``pyarrow.Schema``.
    num_rows
        Rows of all row groups.

    Raises
    ------
    InputError
        Not Parquet, truncated, not one of our traces, or of a newer version.
    """

    def __init__(self, file: OpenFile) -> None:
        self.path = file.path
        self._file = file
        with open_parquet(file, remedy=REMEDY) as parquet:
            self.header = parse_header(key_value_metadata(parquet), file.path)
            self.schema = parquet.schema_arrow
            self.num_rows = num_rows(parquet)

    def sha256(self) -> str:
        """Hex digest of the bytes of the file."""
        return self._file.sha256()

    def record_batches(self, rows: int) -> Iterator[Any]:
        """Record batches of at most so many ``rows``, of which none holds an empty value.

        Raises
        ------
        InputError
            The file is damaged, holds an empty value, or is written to while it is read.
        """
        self._file.require_unchanged()
        row = 0
        with open_parquet(self._file, remedy=REMEDY) as parquet:
            for batch in batches(parquet, rows, source=self.path):
                require_no_nulls(self.path, batch, row)
                yield batch
                row += len(batch)
        self._file.require_unchanged()

    def close(self) -> None:
        """Close the file; nothing more can be read from it."""
        self._file.close()


def read_trace(
    path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None
) -> Trace:
    """Open a trace file, check all of it in one pass over its rows, and total it.

    The tokens themselves stay in the file: memory does not grow with its length, but for eight
    bytes a token and as many a request. ``progress`` is called with (rows read, all rows).

    Raises
    ------
    InputError
        Not Parquet, truncated, not one of our traces, a newer version, a wrong column, an expert
        or layer that the model does not have, a negative count, a duplicate row, a size beyond the
        bounds of :mod:`prism_plan.input_limits`; the file is written to while it is read.
    """
    return read_open_trace(OpenFile(path), progress)


def read_open_trace(file: OpenFile, progress: Callable[[int, int], None] | None = None) -> Trace:
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
    return _read_tokens(found, model, common, progress or (lambda done, total: None))


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


def _batch_rows(model: ModelSpec) -> int:
    """Rows that are read at a time: fewer of a model with very many selections a token."""
    width = model.num_layers * model.top_k
    return max(1, min(BATCH_ROWS, MAX_BATCH_SELECTIONS // width))


def _token_batches(file: TraceFile, model: ModelSpec, tasks: StringCodes) -> Iterator[TokenBatch]:
    """Token batches of a file; checks columns, empty values and phases, not the expert ids."""
    shape = (-1, model.num_layers, model.top_k)
    has_weights = "weights" in file.schema.names
    require_columns(file.path, file.schema, token_schema(model, has_weights))
    phases = StringCodes(file.path)
    phase_codes = np.zeros(0, np.int8)
    for rows in file.record_batches(_batch_rows(model)):
        phase = phases.codes(rows.column("phase"))
        if len(phases.code_of) != len(phase_codes):
            phase_codes = _phase_codes(file.path, phases)
        weights = column_values(rows.column("weights").flatten()) if has_weights else None
        yield TokenBatch(
            request=column_values(rows.column("request")),
            position=column_values(rows.column("position")),
            phase=phase_codes[phase],
            task=tasks.codes(rows.column("task")),
            experts=column_values(rows.column("experts").flatten()).reshape(shape),
            weights=None if weights is None else weights.reshape(shape),
        )


def _phase_codes(path: object, phases: StringCodes) -> npt.NDArray[np.int8]:
    """Codes into :data:`~prism_plan.trace.PHASES` of the words of a file's phases, int8 [words]."""
    for word in phases.words:
        if word not in PHASES:
            raise InputError(
                f"phase {word!r:.60}", source=path, expected=f"one of {', '.join(PHASES)}"
            )
    return np.array([PHASES.index(word) for word in phases.words], np.int8)


def _read_tokens(
    file: TraceFile,
    model: ModelSpec,
    common: Mapping[str, Any],
    progress: Callable[[int, int], None],
) -> Trace:
    path = file.path
    total = _require_rows(file, model)
    words = StringCodes(path)
    totals = TraceTotals(model, source=path)
    keys = np.empty(total, np.int64)
    row = 0
    has_weights = False
    for batch in _token_batches(file, model, words):
        if error := batch.invalid_selection(model, row):
            raise error.within(path)
        _require_not_negative(path, batch, row)
        if batch.weights is not None:
            has_weights = True
            if not (np.isfinite(batch.weights) & (batch.weights >= 0)).all():
                raise InputError(
                    "a gate weight is negative, NaN or infinite",
                    source=path,
                    place=f"rows {row}..{row + len(batch) - 1}",
                    expected="finite numbers of at least 0",
                )
        totals.grow(len(words.code_of))
        totals.add(batch.experts, batch.task, batch.request)
        keys[row : row + len(batch)] = batch.request.astype(np.int64) << 32 | batch.position
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
    return Trace(
        **common,
        tasks=tasks,
        counts=totals.counts[used],
        tokens=totals.tokens[used],
        requests=totals.requests()[used],
        batches=lambda: _token_batches(file, model, StringCodes(path, tasks)),
        has_weights=has_weights,
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
    for batch in _token_batches(file, model, words):
        seen.update(dict.fromkeys(batch.task[batch.request == request].tolist()))
    first, second = (words.words[code] for code in list(seen)[:2])
    return InputError(
        f"request {request} has tasks {first!r} and {second!r}",
        source=file.path,
        expected="one task for each request, numbers unique in the file",
    )


def _require_not_negative(path: object, batch: TokenBatch, first_row: int) -> None:
    for name, column in (("request", batch.request), ("position", batch.position)):
        if (column < 0).any():
            row = int(np.argmax(column < 0))
            raise InputError(
                f"{int(column[row])}",
                source=path,
                place=f"row {first_row + row} column {name!r}",
                expected="a number of at least 0",
            )


def _require_distinct_tokens(path: object, keys: npt.NDArray[np.int64]) -> None:
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
