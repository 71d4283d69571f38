"""Writing trace files; their columns and header stand in :mod:`prism_plan.io.trace_schema`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.io.file_writing import atomic_path
from prism_plan.io.trace_schema import (
    BATCH_ROWS,
    METADATA_KEY,
    counts_schema,
    file_metadata,
    header_bytes,
    token_schema,
)
from prism_plan.model_spec import ModelSpec
from prism_plan.trace import PHASES, TokenBatch, Trace, concatenate_batches


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
            # pyarrow removes a path that it fails to write, even a device, but not a stream
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
                header = header_bytes("tokens", self.model, self.provenance)
                schema = token_schema(self.model, self.weights)
                self._writer.add_key_value_metadata(file_metadata(schema, header))
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
        if error := batch.invalid_selection(self.model):
            raise error
        numbers = (self._tasks.setdefault(task, len(self._tasks)) for task in tasks)
        codes = np.fromiter(numbers, np.int32, len(tasks))
        self._held.append(dataclasses.replace(batch, task=codes[batch.task]))
        self._rows += len(batch)
        if self._rows >= BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        """Write the buffered batches as row groups, which are large to save space and time."""
        import pyarrow as pa

        held, self._held, self._rows = self._held, [], 0
        if not held:
            return
        batch = concatenate_batches(held) if len(held) > 1 else held[0]
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
    header = header_bytes("counts", trace.model, trace.provenance, tokens=tokens)
    table = table.replace_schema_metadata({METADATA_KEY: header})
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        pq.write_table(table, stream, compression="zstd", write_page_checksum=True)


def _dictionary(codes: npt.NDArray[Any], words: Sequence[str]) -> Any:
    import pyarrow as pa

    return pa.DictionaryArray.from_arrays(
        pa.array(codes.astype(np.int32)), pa.array(list(words), pa.string())
    )


def _fixed_lists(values: npt.NDArray[Any], kind: Any) -> Any:
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=kind)
