"""Trace files: Parquet, format ``prism-plan/trace`` version 1 (DESIGN section 6)."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.files import atomic_path, parse_json, printable
from prism_plan.limits import (
    MAX_BATCH_SELECTIONS,
    MAX_NAME_LENGTH,
    MAX_NAMES,
    MAX_SELECTIONS,
    MAX_TOKENS,
    require_at_most,
    require_name,
    require_task_pairs,
)
from prism_plan.model import ModelSpec
from prism_plan.open_file import OpenFile
from prism_plan.parquet_input import batches, key_value_metadata, num_rows, open_parquet
from prism_plan.trace import (
    PHASES,
    TokenBatch,
    Totals,
    Trace,
    bad_selection,
    check_experts,
    concatenate,
)
from prism_plan.trace_counts import CallTable, check_sums

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = "prism-plan/trace"
VERSION = 1
METADATA_KEY = b"prism_plan"
#: Where Arrow stores a schema in a Parquet file, as base64 text of its serialized form.
ARROW_SCHEMA_KEY = b"ARROW:schema"
#: Rows read or written at a time: 16,384 tokens of V2-Lite are 5 MB of expert ids.
BATCH_ROWS = 16_384
REMEDY = "make traces with prism-plan profile"


# ---------------------------------------------------------------------------------------- writing


class TraceWriter:
    """Writes a token-level trace row group by row group; the file appears when it is complete.

    Use as a context manager. Expert ids are dictionary-encoded (log2 E bits each) and compressed
    with zstd: less than one byte a selection below 256 experts (1.01 for 256), with gate weights
    two more.

    Raises
    ------
    OutputError
        The file cannot be written; an earlier one at ``path`` is left as it was.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: ModelSpec,
        *,
        weights: bool = False,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.weights = weights
        self.provenance = dict(provenance or {})
        self._path = path
        self._writer: Any = None
        self._tasks: dict[str, int] = {}
        self._held: list[TokenBatch] = []
        self._rows = 0

    def __enter__(self) -> TraceWriter:
        import pyarrow.parquet as pq

        encoding = {"weights.list.element": "BYTE_STREAM_SPLIT"} if self.weights else None
        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self._path))
            # pyarrow removes a path that it fails to write, be it a device; a stream it leaves
            stream = stack.enter_context(open(temporary, "wb"))
            self._writer = pq.ParquetWriter(
                stream,
                token_schema(self.model, self.weights),
                compression="zstd",
                use_dictionary=["request", "phase", "task", "experts.list.element"],
                column_encoding=encoding,
                write_page_checksum=True,
                store_schema=False,  # _finish does, when the header is known
            )
            stack.push(self._finish)
            self._stack = stack.pop_all()
        return self

    def _finish(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
                header = _header("tokens", self.model, self.provenance)
                schema = token_schema(self.model, self.weights)
                self._writer.add_key_value_metadata(_file_metadata(schema, header))
            with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
                self._writer.close()
        finally:
            self._writer.is_open = False  # or it would close once more when it is collected

    def write(self, batch: TokenBatch, tasks: Sequence[str]) -> None:
        """Append a batch of T tokens whose task codes index ``tasks``.

        Raises
        ------
        InputError
            A selection is out of range or repeated.
        """
        bad = check_experts(batch.experts, self.model.num_experts)
        if bad is not None:
            raise bad_selection(self.model, batch, bad)
        numbers = (self._tasks.setdefault(task, len(self._tasks)) for task in tasks)
        codes = np.fromiter(numbers, np.int32, len(tasks))
        self._held.append(dataclasses.replace(batch, task=codes[batch.task]))
        self._rows += len(batch)
        if self._rows >= BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        """Write what is held as row groups; small ones would cost space and time."""
        import pyarrow as pa

        held, self._held, self._rows = self._held, [], 0
        if not held:
            return
        batch = concatenate(held) if len(held) > 1 else held[0]
        parts = max(1, len(batch) // BATCH_ROWS)
        bounds = [len(batch) * part // parts for part in range(parts + 1)]
        for start, end in itertools.pairwise(bounds):
            part = batch.rows(slice(start, end))
            schema = token_schema(self.model, self.weights)
            columns: list[Any] = [
                pa.array(part.request),
                pa.array(part.position),
                _dictionary(part.phase, PHASES),
                _dictionary(part.task, list(self._tasks)),
                _fixed_lists(part.experts, schema.field("experts").type),
            ]
            if self.weights:
                assert part.weights is not None
                columns.append(_fixed_lists(part.weights, schema.field("weights").type))
            self._writer.write_table(pa.Table.from_arrays(columns, schema=schema))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)


def write_trace(path: str | os.PathLike[str], trace: Trace) -> None:
    """Write a trace of either kind.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    if trace.batches is None:
        _write_counts(path, trace)
        return
    with TraceWriter(
        path, trace.model, weights=trace.has_weights, provenance=trace.provenance
    ) as writer:
        for batch in trace.batches():
            writer.write(batch, trace.tasks)


def _write_counts(path: str | os.PathLike[str], trace: Trace) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    shape = trace.counts.shape
    task, layer, expert = (index.ravel() for index in np.indices(shape))
    table = pa.Table.from_arrays(
        [
            _dictionary(task.astype(np.int32), trace.tasks),
            pa.array(np.asarray(trace.model.moe_layers, np.int32)[layer]),
            pa.array(expert.astype(np.int32)),
            pa.array(trace.counts.ravel()),
        ],
        schema=counts_schema(),
    )
    tokens = dict(zip(trace.tasks, trace.tokens.tolist(), strict=True))
    header = _header("counts", trace.model, trace.provenance, tokens=tokens)
    table = table.replace_schema_metadata({METADATA_KEY: header})
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        pq.write_table(table, stream, compression="zstd", write_page_checksum=True)


def token_schema(model: ModelSpec, weights: bool) -> pa.Schema:
    """Columns of a token-level trace of this model."""
    import pyarrow as pa

    width = model.num_layers * model.top_k

    def lists(kind: Any) -> Any:
        return pa.list_(pa.field("element", kind, nullable=False), width)

    fields = [
        pa.field("request", pa.int32(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("phase", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("task", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("experts", lists(pa.uint16()), nullable=False),
    ]
    if weights:
        fields.append(pa.field("weights", lists(pa.float16()), nullable=False))
    return pa.schema(fields)


def counts_schema() -> pa.Schema:
    """Columns of a counts-only trace."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("task", pa.dictionary(pa.int32(), pa.string()), nullable=False),
            pa.field("layer", pa.int32(), nullable=False),
            pa.field("expert", pa.int32(), nullable=False),
            pa.field("count", pa.int64(), nullable=False),
        ]
    )


def _header(kind: str, model: ModelSpec, provenance: Mapping[str, Any], **more: Any) -> bytes:
    header = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "model": model.to_json(),
        "provenance": dict(provenance),
        **more,
    }
    return json.dumps(header).encode()


def _file_metadata(schema: pa.Schema, header: bytes) -> dict[bytes, bytes]:
    """Key-value metadata of a file that is closed: ours, and the columns' Arrow types.

    Arrow shows the metadata of the schema that it stores itself, and hides others where there is
    one: the header stands in both, so that every way to read Parquet finds it.
    """
    stored = schema.with_metadata({METADATA_KEY: header}).serialize().to_pybytes()
    return {METADATA_KEY: header, ARROW_SCHEMA_KEY: base64.b64encode(stored)}


def _dictionary(codes: npt.NDArray[Any], words: Sequence[str]) -> Any:
    import pyarrow as pa

    return pa.DictionaryArray.from_arrays(
        pa.array(codes.astype(np.int32)), pa.array(list(words), pa.string())
    )


def _fixed_lists(values: npt.NDArray[Any], kind: Any) -> Any:
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=kind)


# ---------------------------------------------------------------------------------------- reading


def read_trace(
    path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None
) -> Trace:
    """Open a trace file, check all of it in one pass over its rows, and total it.

    The tokens themselves stay in the file: memory does not grow with its length, but for eight
    bytes a token and as many a request. The file is opened once: its digest, the check and all
    later passes read through one descriptor, so that they are of one file even where another takes
    its name meanwhile. ``progress`` is told (rows read, rows).

    Raises
    ------
    InputError
        Not Parquet, cut short, not one of our traces, a newer version, a wrong column, an expert
        or layer that the model does not have, a negative count, a duplicate row, a size beyond the
        bounds of :mod:`prism_plan.limits`; the file is written to while it is read.
    """
    return read_open_trace(OpenFile(path), progress)


def read_open_trace(file: OpenFile, progress: Callable[[int, int], None] | None = None) -> Trace:
    """The trace in a file that is open already; see :func:`read_trace`.

    The trace keeps the file as long as it needs it.
    """
    header = _header_of(file)
    model = ModelSpec.from_json(header.get("model"), source=file.path)
    provenance = header.get("provenance")
    if not isinstance(provenance, Mapping):
        raise InputError(
            f"{provenance!r:.60}", source=file.path, place="provenance", expected="object"
        )
    common: dict[str, Any] = {
        "model": model,
        "provenance": dict(provenance),
        "name": printable(file.path),
        "sha256": file.sha256(),
    }
    if header["kind"] == "counts":
        return _read_counts(file, header, common)
    return _read_tokens(file, model, common, progress or (lambda done, total: None))


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON header of a trace file, its format, version and kind checked.

    Raises
    ------
    InputError
        See :func:`read_trace`.
    """
    with OpenFile(path) as file:
        return _header_of(file)


def _header_of(file: OpenFile) -> dict[str, Any]:
    path = file.path
    with open_parquet(file, remedy=REMEDY) as parquet:
        metadata = key_value_metadata(parquet)
    if METADATA_KEY not in metadata:
        raise InputError(
            "Parquet, but not a prism-plan trace (no 'prism_plan' metadata)",
            source=path,
            remedy=REMEDY,
        )
    try:
        text = metadata[METADATA_KEY].decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError("metadata 'prism_plan' is not UTF-8", source=path) from error
    header = parse_json(text, f"{path}: metadata 'prism_plan'")
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else header
        raise InputError(
            f"{found!r:.60}", source=path, place="format", expected=repr(FORMAT), remedy=REMEDY
        )
    if header.get("version") != VERSION or isinstance(header.get("version"), bool):
        raise InputError(
            f"{header.get('version')!r:.60}",
            source=path,
            place="version",
            expected=str(VERSION),
            remedy="a newer file needs a newer prism-plan",
        )
    if header.get("kind") not in ("tokens", "counts"):
        raise InputError(
            f"{header.get('kind')!r:.60}", source=path, place="kind", expected="tokens or counts"
        )
    return header


def _require_columns(path: object, found: pa.Schema, wanted: pa.Schema) -> None:
    for column in wanted:
        if column.name not in found.names:
            raise InputError(
                f"column {column.name!r} is missing",
                source=path,
                expected=f"columns {', '.join(wanted.names)}",
            )
        kind = found.field(column.name).type
        if not _same_type(kind, column.type):
            raise InputError(
                f"type {_type_text(kind)}",
                source=path,
                place=f"column {column.name!r}",
                expected=_type_text(column.type),
            )
    for name in found.names:
        if name not in wanted.names:
            raise InputError(
                f"unknown column {name!r}",
                source=path,
                expected=f"columns {', '.join(wanted.names)}",
            )


def _type_text(kind: pa.DataType) -> str:
    """A column type in words."""
    import pyarrow.types as kinds

    if kinds.is_fixed_size_list(kind):
        return f"lists of {kind.list_size} {kind.value_type}"
    if kinds.is_dictionary(kind):
        return f"dictionary of {kind.value_type}"
    return str(kind)


def _same_type(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Equal but for the index width of a dictionary and the names inside a list."""
    import pyarrow.types as kinds

    if kinds.is_dictionary(wanted):
        return bool(kinds.is_dictionary(found) and found.value_type == wanted.value_type)
    if kinds.is_fixed_size_list(wanted):
        return bool(
            kinds.is_fixed_size_list(found)
            and found.list_size == wanted.list_size
            and found.value_type == wanted.value_type
        )
    return bool(found == wanted)


def _no_nulls(path: object, batch: Any, first_row: int) -> None:
    for name in batch.schema.names:
        column = batch.column(name)
        inner = [column.flatten()] if "list" in str(column.type) else []
        if any(part.null_count for part in [column, *inner]):
            raise InputError(
                f"column {name!r} has an empty value",
                source=path,
                place=f"rows {first_row}..{first_row + len(batch) - 1}",
                expected="a value in every row",
            )


def _values(column: Any) -> npt.NDArray[Any]:
    """The numbers of a column without nulls, not copied.

    Unlike ``column.to_numpy()`` this does not make pyarrow import pandas, which takes longer than
    most traces.
    """
    values: npt.NDArray[Any] = np.from_dlpack(column)
    return values


class _Words:
    """Codes for the words of a dictionary column, in the order of the file's dictionaries."""

    def __init__(self, path: object, words: Sequence[str] = ()) -> None:
        self.path = path
        self.code_of = {word: code for code, word in enumerate(words)}
        self._dictionary: Any = None
        self._mapping = np.zeros(1, np.int32)

    @property
    def words(self) -> list[str]:
        """All words so far, by code."""
        return list(self.code_of)

    def codes(self, column: Any) -> npt.NDArray[np.int32]:
        """Codes int32 [rows] of a column, whose new words are added.

        Raises
        ------
        InputError
            An empty word, a name too long, more words than tasks may be, or a damaged column.
        """
        local = column.dictionary
        if self._dictionary is None or not local.equals(self._dictionary):
            self._mapping = self._learn(local)
            self._dictionary = local
        indices = _values(column.indices).astype(np.int64)
        if len(indices):
            low, high = indices.min(), indices.max()
            if not 0 <= low <= high < len(local):
                raise InputError(
                    f"code {high} in a dictionary of {len(local)} words",
                    source=self.path,
                    remedy="the file is damaged; write it again",
                )
        codes: npt.NDArray[np.int32] = self._mapping[indices]
        return codes

    def _learn(self, dictionary: Any) -> npt.NDArray[np.int32]:
        """The codes of the words of one dictionary: unused ones too, so that tasks keep order."""
        what = "words in a column of tasks or phases"
        require_at_most(len(dictionary), MAX_NAMES, what, source=self.path)
        if dictionary.nbytes > MAX_NAMES * (MAX_NAME_LENGTH + 8):
            raise InputError(f"{dictionary.nbytes:,} bytes of names of tasks", source=self.path)
        mapping = np.zeros(max(len(dictionary), 1), np.int32)
        for index, word in enumerate(dictionary.to_pylist()):
            if not word or not word.strip():
                raise InputError("empty task or phase", source=self.path, expected="a word")
            require_name(word, source=self.path, place="task")
            mapping[index] = self.code_of.setdefault(word, len(self.code_of))
        require_at_most(len(self.code_of), MAX_NAMES, what, source=self.path)
        return mapping


def _batch_rows(model: ModelSpec) -> int:
    """Rows that are read at a time: fewer of a model with very many selections a token."""
    width = model.num_layers * model.top_k
    return max(1, min(BATCH_ROWS, MAX_BATCH_SELECTIONS // width))


def _token_batches(file: OpenFile, model: ModelSpec, tasks: _Words) -> Iterator[TokenBatch]:
    """Token batches of a file whose header was read; checks types, nulls, phases and ids."""
    path = file.path
    shape = (-1, model.num_layers, model.top_k)
    file.require_unchanged()
    with open_parquet(file, remedy=REMEDY) as parquet:
        names = parquet.schema_arrow.names
        has_weights = "weights" in names
        _require_columns(path, parquet.schema_arrow, token_schema(model, has_weights))
        row = 0
        phases = _Words(path)
        phase_codes = np.zeros(0, np.int8)
        for rows in batches(parquet, _batch_rows(model), source=path):
            _no_nulls(path, rows, row)
            phase = phases.codes(rows.column("phase"))
            if len(phases.code_of) != len(phase_codes):
                phase_codes = _phase_codes(path, phases)
            batch = TokenBatch(
                request=_values(rows.column("request")),
                position=_values(rows.column("position")),
                phase=phase_codes[phase],
                task=tasks.codes(rows.column("task")),
                experts=_values(rows.column("experts").flatten()).reshape(shape),
                weights=(
                    _values(rows.column("weights").flatten()).reshape(shape)
                    if has_weights
                    else None
                ),
            )
            yield batch
            row += len(batch)
    file.require_unchanged()


def _phase_codes(path: object, phases: _Words) -> npt.NDArray[np.int8]:
    """Codes into :data:`~prism_plan.trace.PHASES` of the words of a file's phases, int8 [words]."""
    for word in phases.words:
        if word not in PHASES:
            raise InputError(
                f"phase {word!r:.60}", source=path, expected=f"one of {', '.join(PHASES)}"
            )
    return np.array([PHASES.index(word) for word in phases.words], np.int8)


def _read_tokens(
    file: OpenFile,
    model: ModelSpec,
    common: Mapping[str, Any],
    progress: Callable[[int, int], None],
) -> Trace:
    path = file.path
    total = _require_rows(file, model)
    words = _Words(path)
    totals = Totals(model, source=path)
    keys = np.empty(total, np.int64)
    row = 0
    has_weights = False
    for batch in _token_batches(file, model, words):
        bad = check_experts(batch.experts, model.num_experts)
        if bad is not None:
            raise bad_selection(model, batch, bad, row).within(path)
        _no_negatives(path, batch, row)
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
        totals.add(batch)
        keys[row : row + len(batch)] = batch.request.astype(np.int64) << 32 | batch.position
        row += len(batch)
        progress(row, total)
    if row == 0:
        raise InputError("the trace has no rows", source=path, remedy=REMEDY)
    _no_duplicates(path, keys[:row])
    del keys
    twice = totals.request_of_two_tasks()
    if twice is not None:
        raise _two_tasks(file, model, twice)
    totals.grow(len(words.code_of))
    used = np.flatnonzero(totals.tokens)  # a dictionary may hold words that no row has
    tasks = tuple(np.array(words.words, object)[used])
    return Trace(
        **common,
        tasks=tasks,
        counts=totals.counts[used],
        tokens=totals.tokens[used],
        requests=totals.requests()[used],
        batches=lambda: _token_batches(file, model, _Words(path, tasks)),
        has_weights=has_weights,
    )


def _require_rows(file: OpenFile, model: ModelSpec) -> int:
    """How many rows a file has; equal ones take no space in it, but all are looked at."""
    with open_parquet(file, remedy=REMEDY) as parquet:
        total = num_rows(parquet)
    require_at_most(total, MAX_TOKENS, "tokens", source=file.path, remedy="split the trace")
    require_at_most(
        total * model.num_layers * model.top_k,
        MAX_SELECTIONS,
        f"selections ({total:,} tokens × {model.num_layers:,} layers × top-{model.top_k})",
        source=file.path,
        remedy="split the trace",
    )
    return total


def _two_tasks(file: OpenFile, model: ModelSpec, request: int) -> InputError:
    """The error of a request whose rows are of two tasks; names them in the order of the rows."""
    words = _Words(file.path)
    seen: dict[int, None] = {}
    for batch in _token_batches(file, model, words):
        seen.update(dict.fromkeys(batch.task[batch.request == request].tolist()))
    first, second = (words.words[code] for code in list(seen)[:2])
    return InputError(
        f"request {request} has tasks {first!r} and {second!r}",
        source=file.path,
        expected="one task for each request, numbers unique in the file",
    )


def _no_negatives(path: object, batch: TokenBatch, first_row: int) -> None:
    for name, column in (("request", batch.request), ("position", batch.position)):
        if (column < 0).any():
            row = int(np.argmax(column < 0))
            raise InputError(
                f"{int(column[row])}",
                source=path,
                place=f"row {first_row + row} column {name!r}",
                expected="a number of at least 0",
            )


def _no_duplicates(path: object, keys: npt.NDArray[np.int64]) -> None:
    keys.sort()
    same = np.flatnonzero(keys[1:] == keys[:-1])
    if len(same):
        key = int(keys[same[0]])
        raise InputError(
            f"request {key >> 32} position {key & 0xFFFFFFFF} stands twice",
            source=path,
            expected="each token once",
        )


def _read_counts(file: OpenFile, header: Mapping[str, Any], common: Mapping[str, Any]) -> Trace:
    path = file.path
    model: ModelSpec = common["model"]
    tokens = _tokens_by_task(path, header.get("tokens"))
    require_task_pairs(len(tokens), model.num_layers, model.num_experts, source=path)
    words = _Words(path)
    table = CallTable(model, path)
    names: list[str] = []
    number = np.zeros(0, np.int64)
    with open_parquet(file, remedy=REMEDY) as parquet:
        _require_columns(path, parquet.schema_arrow, counts_schema())
        for rows in batches(parquet, BATCH_ROWS, source=path):
            _no_nulls(path, rows, table.rows)
            task = words.codes(rows.column("task"))
            if len(words.code_of) != len(names):
                names = words.words
                _same_tasks(path, [name for name in names if name not in tokens])
                number = np.array([tokens[name] for name in names], np.int64)
            layer, expert, count = (
                _values(rows.column(name)) for name in ("layer", "expert", "count")
            )
            table.add(names, number, task, layer, expert, count)
    file.require_unchanged()
    file.close()
    if table.rows == 0:
        raise InputError("the trace has no rows", source=path, remedy=REMEDY)
    _same_tasks(path, set(tokens) - set(names))
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


def _same_tasks(path: object, others: Iterable[str]) -> None:
    for word in sorted(others):
        raise InputError(
            f"task {word!r} is in only one of the rows and the tokens per task", source=path
        )
