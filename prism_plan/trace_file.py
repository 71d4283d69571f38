"""Trace files: Parquet, format ``prism-plan/trace`` version 1 (DESIGN section 6)."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.files import atomic_path, parse_json, printable, sha256
from prism_plan.model import ModelSpec
from prism_plan.trace import (
    PHASES,
    TokenBatch,
    Totals,
    Trace,
    bad_selection,
    check_experts,
    concatenate,
)

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = "prism-plan/trace"
VERSION = 1
METADATA_KEY = b"prism_plan"
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
        self._tasks: list[str] = []
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
            )
            stack.push(self._finish)
            self._stack = stack.pop_all()
        return self

    def _finish(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
                header = _header("tokens", self.model, self.provenance)
                self._writer.add_key_value_metadata({METADATA_KEY: header})
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
        for task in tasks:
            if task not in self._tasks:
                self._tasks.append(task)
        codes = np.array([self._tasks.index(task) for task in tasks], np.int32)
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
                _dictionary(part.task, self._tasks),
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
    bytes a token while duplicates are looked for. ``progress`` is told (rows read, rows).

    Raises
    ------
    InputError
        Not Parquet, cut short, not one of our traces, a newer version, a wrong column, an expert
        or layer that the model does not have, a negative count, a duplicate row.
    """
    header = read_header(path)
    model = ModelSpec.from_json(header.get("model"), source=path)
    provenance = header.get("provenance")
    if not isinstance(provenance, Mapping):
        raise InputError(f"{provenance!r:.60}", source=path, place="provenance", expected="object")
    common: dict[str, Any] = {
        "model": model,
        "provenance": dict(provenance),
        "name": printable(path),
        "sha256": sha256(path),
    }
    if header["kind"] == "counts":
        return _read_counts(path, header, common)
    return _read_tokens(path, model, common, progress or (lambda done, total: None))


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON header of a trace file, its format, version and kind checked.

    Raises
    ------
    InputError
        See :func:`read_trace`.
    """
    with _open(path) as parquet:
        metadata = parquet.schema_arrow.metadata or {}
        metadata = {**metadata, **(parquet.metadata.metadata or {})}
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


@contextlib.contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A Parquet file whose faults, now or while it is read, become input errors."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        stream = open(path, "rb")  # noqa: SIM115 - pyarrow's own messages name no reason
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(reason, source=path, remedy="give a readable trace file") from error
    try:
        with stream, pq.ParquetFile(stream, page_checksum_verification=True) as parquet:
            yield parquet
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"not a readable Parquet file: {str(error).splitlines()[0]}",
            source=path,
            remedy=f"it may be cut short, damaged or of another kind; {REMEDY}",
        ) from error


def _require_columns(path: object, found: pa.Schema, wanted: pa.Schema) -> None:
    for name in found.names:
        if found.names.count(name) > 1:
            raise InputError(
                f"column {name!r} stands twice", source=path, expected="each column once"
            )
    for column in wanted:
        if column.name not in found.names:
            raise InputError(
                f"column {column.name!r} is missing",
                source=path,
                expected=f"columns {', '.join(wanted.names)}",
            )
        kind = found.field(column.name).type
        if str(kind) == "string" and str(column.type).startswith("dictionary"):
            continue
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

    def __init__(self, path: object) -> None:
        self.path = path
        self.words: list[str] = []

    def codes(self, column: Any) -> npt.NDArray[np.int32]:
        if not hasattr(column, "dictionary"):
            column = column.dictionary_encode()
        local = column.dictionary.to_pylist()
        indices = _values(column.indices).astype(np.int64)
        mapping = np.zeros(max(len(local), 1), np.int32)
        used = np.unique(indices)
        if len(used) and not 0 <= used[0] <= used[-1] < len(local):
            raise InputError(
                f"code {used[-1]} in a dictionary of {len(local)} words",
                source=self.path,
                remedy="the file is damaged; write it again",
            )
        for code, word in enumerate(local):  # unused ones too: so tasks keep their order
            if not word or not word.strip():
                raise InputError("empty task or phase", source=self.path, expected="a word")
            if word not in self.words:
                self.words.append(word)
            mapping[code] = self.words.index(word)
        codes: npt.NDArray[np.int32] = mapping[indices]
        return codes


def _token_batches(
    path: str | os.PathLike[str], model: ModelSpec, tasks: _Words
) -> Iterator[TokenBatch]:
    """Token batches of a file whose header was read; checks types, nulls, phases and ids."""
    shape = (-1, model.num_layers, model.top_k)
    with _open(path) as parquet:
        names = parquet.schema_arrow.names
        has_weights = "weights" in names
        _require_columns(path, parquet.schema_arrow, token_schema(model, has_weights))
        row = 0
        for rows in parquet.iter_batches(BATCH_ROWS):
            _no_nulls(path, rows, row)
            phases = _Words(path)
            phase = phases.codes(rows.column("phase"))
            for word in phases.words:
                if word not in PHASES:
                    raise InputError(
                        f"phase {word!r}", source=path, expected=f"one of {', '.join(PHASES)}"
                    )
            phase_codes = np.array([PHASES.index(w) for w in phases.words] or [0], np.int8)
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


def _read_tokens(
    path: str | os.PathLike[str],
    model: ModelSpec,
    common: Mapping[str, Any],
    progress: Callable[[int, int], None],
) -> Trace:
    with _open(path) as parquet:
        num_rows = parquet.metadata.num_rows
    words = _Words(path)
    totals = Totals(model)
    keys: list[npt.NDArray[np.int64]] = []
    task_of = _TaskOfRequest(path)
    row = 0
    has_weights = False
    for batch in _token_batches(path, model, words):
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
        totals.add(batch)
        task_of.add(batch, words.words)
        keys.append(batch.request.astype(np.int64) << 32 | batch.position.astype(np.int64))
        row += len(batch)
        progress(row, num_rows)
    if row == 0:
        raise InputError("the trace has no rows", source=path, remedy=REMEDY)
    _no_duplicates(path, np.concatenate(keys))
    totals.grow(len(words.words))
    used = np.flatnonzero(totals.tokens)  # a dictionary may hold words that no row has
    tasks = tuple(words.words[code] for code in used)
    return Trace(
        **common,
        tasks=tasks,
        counts=totals.counts[used],
        tokens=totals.tokens[used],
        requests=totals.requests()[used],
        batches=lambda: _token_batches(path, model, _fixed_words(path, list(tasks))),
        has_weights=has_weights,
    )


def _fixed_words(path: object, words: list[str]) -> _Words:
    fixed = _Words(path)
    fixed.words = list(words)
    return fixed


class _TaskOfRequest:
    """Checks that a request belongs to one task."""

    def __init__(self, path: object) -> None:
        self.path = path
        self.task_of: dict[int, int] = {}

    def add(self, batch: TokenBatch, tasks: Sequence[str]) -> None:
        pairs = np.unique(batch.request.astype(np.int64) << 32 | batch.task.astype(np.int64))
        for pair in pairs.tolist():
            request, task = pair >> 32, pair & 0xFFFFFFFF
            if self.task_of.setdefault(request, task) != task:
                raise InputError(
                    f"request {request} has tasks {tasks[self.task_of[request]]!r} and "
                    f"{tasks[task]!r}",
                    source=self.path,
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


def _read_counts(
    path: str | os.PathLike[str], header: Mapping[str, Any], common: Mapping[str, Any]
) -> Trace:
    model: ModelSpec = common["model"]
    tokens = header.get("tokens")
    if not isinstance(tokens, Mapping) or not tokens:
        raise InputError(f"{tokens!r:.60}", source=path, place="tokens", expected="tokens per task")
    for task, number in tokens.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 < number < 2**53:
            raise InputError(
                f"{number!r:.60}",
                source=path,
                place=f"tokens.{task}",
                expected="a whole number of at least 1",
            )
    words = _Words(path)
    columns: list[list[npt.NDArray[Any]]] = [[], [], [], []]
    with _open(path) as parquet:
        _require_columns(path, parquet.schema_arrow, counts_schema())
        row = 0
        for rows in parquet.iter_batches(BATCH_ROWS):
            _no_nulls(path, rows, row)
            columns[0].append(words.codes(rows.column("task")))
            for index, name in enumerate(("layer", "expert", "count"), start=1):
                columns[index].append(_values(rows.column(name)))
            row += len(rows)
    if row == 0:
        raise InputError("the trace has no rows", source=path, remedy=REMEDY)
    task, layer, expert, count = (np.concatenate(column) for column in columns)
    names = tuple(words.words)
    for word in sorted(set(names) ^ set(tokens)):
        raise InputError(
            f"task {word!r} is in only one of the rows and the tokens per task", source=path
        )
    number = np.array([tokens[word] for word in names], np.int64)
    counts = counts_from_rows(model, names, number, task, layer, expert, count, source=path)
    return Trace(**common, tasks=names, counts=counts, tokens=number)


def counts_from_rows(
    model: ModelSpec,
    tasks: Sequence[str],
    tokens: npt.NDArray[np.int64] | None,
    task: npt.NDArray[Any],
    layer: npt.NDArray[Any],
    expert: npt.NDArray[Any],
    count: npt.NDArray[Any],
    *,
    source: object,
    lines: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.int64]:
    """Counts [tasks, L, E] from rows of (task code, decoder layer, expert, count).

    Raises
    ------
    InputError
        A layer or expert that the model does not have, a negative count, a count above the
        task's ``tokens``, one (task, layer, expert) twice; names the row, or the line where
        ``lines`` [rows] gives them.
    """

    def refuse(bad: npt.NDArray[np.bool_], what: str, column: Any, expected: str) -> None:
        if bad.any():
            at = int(np.argmax(bad))
            where = f"row {at}" if lines is None else f"line {lines[at]}"
            raise InputError(
                f"{what} {column[at]}",
                source=source,
                place=f"{where} (task {tasks[task[at]]!r})",
                expected=expected,
            )

    refuse(
        ~np.isin(layer, model.moe_layers),
        "layer",
        layer,
        f"a MoE layer of {model.name}, {model.layers_text()}",
    )
    refuse(
        (expert < 0) | (expert >= model.num_experts),
        "expert",
        expert,
        f"ids 0..{model.num_experts - 1} of {model.name}",
    )
    refuse(count < 0, "count", count, "a whole number of at least 0")
    if tokens is not None:
        refuse(
            count > tokens[task],
            "count",
            count,
            "at most the tokens of the task, for a token calls an expert once a layer",
        )
    position = np.searchsorted(np.asarray(model.moe_layers), layer)
    key = (task.astype(np.int64) * model.num_layers + position) * model.num_experts + expert
    order = np.argsort(key, kind="stable")
    twice = np.zeros(len(key), bool)
    twice[order[1:]] = key[order[1:]] == key[order[:-1]]
    refuse(
        twice,
        "second row for layer, expert",
        np.stack([layer, expert], axis=1),
        "each task, layer and expert once",
    )
    flat = np.zeros(len(tasks) * model.num_pairs, np.int64)
    flat[key] = count
    counts = flat.reshape(len(tasks), model.num_layers, model.num_experts)
    if tokens is not None:
        check_sums(model, tasks, tokens, counts, source)
    return counts


def check_sums(
    model: ModelSpec,
    tasks: Sequence[str],
    tokens: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    source: object,
) -> None:
    """Refuse counts [tasks, L, E] with more calls in a layer than ``tokens`` [tasks] can make.

    Raises
    ------
    InputError
        Names task, layer, calls and what would be possible.
    """
    calls = counts.sum(axis=2, dtype=np.float64)
    over = np.argwhere(calls > tokens[:, None] * float(model.top_k))
    if len(over):
        t, layer = (int(i) for i in over[0])
        raise InputError(
            f"{calls[t, layer]:,.0f} calls",
            source=source,
            place=f"task {tasks[t]!r} layer {model.moe_layers[layer]}",
            expected=f"at most {tokens[t]:,} tokens times top-{model.top_k}",
            remedy="check the counts, the tokens and --model",
        )
