"""Open trace files: header, columns, rows and digest, all through one descriptor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prism_plan.io.open_file import OpenFile
from prism_plan.io.parquet import batches, key_value_metadata, num_rows, open_parquet
from prism_plan.io.trace_columns import require_no_nulls
from prism_plan.io.trace_schema import REMEDY, parse_header


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

    def record_batches(self, rows: int, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """Record batches of at most so many ``rows``, of which none holds an empty value.

        ``columns`` are those that are decoded; by default all.

        Raises
        ------
        InputError
            The file is damaged, holds an empty value, or is written to while it is read.
        """
        self._file.require_unchanged()
        row = 0
        with open_parquet(self._file, remedy=REMEDY) as parquet:
            for batch in batches(parquet, rows, source=self.path, columns=columns):
                require_no_nulls(self.path, batch, row)
                yield batch
                row += len(batch)
        self._file.require_unchanged()

    def close(self) -> None:
        """Close the file; nothing more can be read from it."""
        self._file.close()
