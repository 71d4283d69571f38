"""Reading Parquet files through one descriptor, with bounds on footer, columns and rows."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prism_plan.errors import InputError
from prism_plan.input_limits import (
    MAX_COLUMNS,
    MAX_FOOTER_BYTES,
    MAX_ROW_GROUP_BYTES,
    require_at_most,
)
from prism_plan.io.open_file import OpenFile

if TYPE_CHECKING:
    import pyarrow as pa

MAGIC = b"PAR1"


@contextlib.contextmanager
def open_parquet(
    file: OpenFile, *, columns: Sequence[str] | None = None, remedy: str
) -> Iterator[Any]:
    """A ``pyarrow.parquet.ParquetFile``; its errors, now or while it is read, become input errors.

    Columns of text are read as dictionaries, so that a long text in many rows is in memory once.
    ``columns`` are those that will be read; by default all.

    Raises
    ------
    InputError
        No Parquet, truncated or damaged; a footer, a number of columns or a row group beyond the
        bounds of :mod:`prism_plan.input_limits`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    _check_footer(file)
    try:
        with pq.ParquetFile(file.stream()) as plain:
            metadata, schema = plain.metadata, plain.schema_arrow
        _check_columns(file, schema, metadata, columns)
        kinds = pa.types
        texts = [
            field.name
            for field in schema
            if kinds.is_string(field.type) or kinds.is_large_string(field.type)
        ]
        with pq.ParquetFile(
            file.stream(),
            metadata=metadata,
            read_dictionary=texts,
            page_checksum_verification=True,
            pre_buffer=False,  # for remote files; it would keep the bytes of all row groups
        ) as parquet:
            yield parquet
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"not a readable Parquet file: {(str(error).splitlines() or [''])[0]}",
            source=file.path,
            remedy=f"it may be truncated, damaged or of another kind; {remedy}",
        ) from error


def batches(
    parquet: Any, rows: int, *, source: object, columns: Sequence[str] | None = None
) -> Iterator[Any]:
    """Record batches of at most so many ``rows``, until all rows of the footer have been read.

    Raises
    ------
    InputError
        There are fewer rows than the footer states: a damaged page ends a column early, which
        pyarrow passes over in silence.
    """
    found = 0
    for batch in parquet.iter_batches(rows, columns=columns, use_threads=False):
        found += len(batch)
        yield batch
    if found != num_rows(parquet):
        raise InputError(
            f"not a readable Parquet file: {found:,} rows, {num_rows(parquet):,} in its footer",
            source=source,
            remedy="it is damaged; copy or write it again",
        )


def key_value_metadata(parquet: Any) -> dict[bytes, bytes]:
    """The metadata of a Parquet file: of its schema and of the file itself."""
    return {**(parquet.schema_arrow.metadata or {}), **(parquet.metadata.metadata or {})}


def num_rows(parquet: Any) -> int:
    """Rows of all row groups, which are what will be read."""
    metadata = parquet.metadata
    return sum(max(0, metadata.row_group(i).num_rows) for i in range(metadata.num_row_groups))


def _check_footer(file: OpenFile) -> None:
    """Bound the size of the footer, which pyarrow parses as a whole."""
    tail = file.pread(8, max(0, file.size - 8))
    if tail[4:] == MAGIC:
        length = int.from_bytes(tail[:4], "little")
        require_at_most(length, MAX_FOOTER_BYTES, "bytes", source=file.path, place="footer")


def _check_columns(
    file: OpenFile, schema: pa.Schema, metadata: Any, columns: Sequence[str] | None
) -> None:
    require_at_most(metadata.num_columns, MAX_COLUMNS, "columns", source=file.path)
    for name, times in Counter(schema.names).items():
        if times > 1:
            raise InputError(
                f"column {name!r} is duplicated", source=file.path, expected="each column once"
            )
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        chunks = (group.column(i) for i in range(group.num_columns))
        size = sum(
            max(0, chunk.total_uncompressed_size)
            for chunk in chunks
            if columns is None or chunk.path_in_schema.partition(".")[0] in columns
        )
        require_at_most(
            size,
            MAX_ROW_GROUP_BYTES,
            "bytes decompressed",
            source=file.path,
            place=f"row group {index}",
            remedy="write smaller row groups",
        )
