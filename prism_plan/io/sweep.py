"""Sweep tables: one row a simulated run, Parquet or CSV, which the extension says."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, Field

from prism_plan.errors import InputError, did_you_mean
from prism_plan.input_limits import MAX_CELL, MAX_COLUMNS, MAX_RUNS, require_at_most
from prism_plan.io.file_writing import write_bytes
from prism_plan.io.open_file import OpenFile
from prism_plan.io.parquet import batches, num_rows, open_parquet
from prism_plan.io.pydantic_base import FormatModel, NotBlank, short_repr, validate
from prism_plan.io.text_files import iterate_lines, read_text
from prism_plan.placement import OFFLOAD

VERSION = 1
METADATA_KEY = b"prism_plan_sweep"
#: What ``status`` says of a run that went well; otherwise it is the line of the error.
OK = "ok"
#: Rows that are turned into Python's values at a time.
_BATCH_ROWS = 1024
#: Means over the same steps or requests may differ by rounding.
_ROUNDING = 1e-9
_REMEDY = "make sweeps with prism-plan simulate --sweep"


def _integer_if_whole(value: Any) -> Any:
    """An integral float as int, for other tools write whole numbers as 300.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(_integer_if_whole)]
AtLeastOne = Annotated[int, Field(ge=1, lt=2**63), BeforeValidator(_integer_if_whole)]
#: Conditions have the ranges of :class:`prism_plan.evaluate.sweep_grid.Grid`, which makes them;
#: null: as in the cluster file.
Condition = Annotated[float, Field(ge=1e-6, le=1e9)] | None
Amount = Annotated[float, Field(ge=0, lt=2**63)] | None
Share = Annotated[float, Field(ge=0, le=1)] | None


def _parts(annotation: Any) -> list[Any]:
    return [annotation, *(part for inner in get_args(annotation) for part in _parts(inner))]


class RunRow(FormatModel):
    """A simulated run: conditions, ``status``, and results, which are null where it failed."""

    gpus: AtLeastOne
    servers: AtLeastOne
    bandwidth_mbps: Condition
    arrival_interval_s: Condition
    memory_fraction: Annotated[float, Field(ge=1e-6, le=1)] | None
    solver: NotBlank
    seed: Whole
    status: NotBlank
    requests: Whole | None
    latency_mean_s: Amount
    latency_p50_s: Amount
    latency_p95_s: Amount
    latency_p99_s: Amount
    ttft_mean_s: Amount
    tpot_mean_s: Amount
    remote_share: Share
    waiting_share: Share
    destinations: Amount
    bytes_sent: Whole | None
    utilisation: Amount
    events: Whole | None
    solve_s: Amount
    runtime_s: Amount


#: All columns in their order in a file, and whether they hold int, float or str.
COLUMNS: Mapping[str, type] = {
    name: next(kind for kind in (int, float, str) if kind in _parts(field.annotation))
    for name, field in RunRow.model_fields.items()
}
#: Results, which come after the status.
RESULTS = tuple(COLUMNS)[list(COLUMNS).index("status") + 1 :]


def sweep_kind(path: str | os.PathLike[str]) -> str:
    """The kind of file that the extension of ``path`` asks for: "parquet" or "csv".

    Raises
    ------
    InputError
        Another extension.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in ("parquet", "csv"):
        raise InputError(
            f"extension {Path(path).suffix!r}",
            source=path,
            expected=".parquet or .csv",
            remedy="give the file one of these extensions",
        )
    return kind


# ---------------------------------------------------------------------------------------- writing


def write_sweep(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table whole or not at all; keys that a row lacks are null.

    Raises
    ------
    InputError
        Another extension, an unknown key, or a value that its column does not allow.
    OutputError
        The file cannot be written.
    """
    write_bytes(path, dump_sweep(rows, sweep_kind(path), source=path))


def dump_sweep(
    rows: Sequence[Mapping[str, Any]], kind: str = "csv", source: object = "sweep"
) -> bytes:
    """The bytes of a table of ``kind`` "parquet" or "csv"; see :func:`write_sweep`."""
    for number, row in enumerate(rows, 1):
        for key in row:
            if key not in COLUMNS:
                raise InputError(
                    f"key {key!r}{did_you_mean(key, COLUMNS)}", source=source, place=f"row {number}"
                )
    values = _validate_rows([{name: row.get(name) for name in COLUMNS} for row in rows], source)
    return _parquet(values) if kind == "parquet" else _csv(values)


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)  # None is written as nothing, floats with all their digits
    return stream.getvalue().encode("utf-8")


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {int: pa.int64(), float: pa.float64(), str: pa.string()}
    schema = pa.schema(
        [(name, types[kind]) for name, kind in COLUMNS.items()],
        metadata={METADATA_KEY: json.dumps({"version": VERSION}).encode()},
    )
    stream = io.BytesIO()
    table = pa.Table.from_pylist(list(rows), schema=schema)
    # a damaged page is noticed when it is read
    pq.write_table(table, stream, compression="zstd", write_page_checksum=True)
    return stream.getvalue()


# ---------------------------------------------------------------------------------------- reading


def read_sweep(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a table with Python's own ints, floats, texts and None, columns in order.

    Columns that are not ours are left out, so that a table may be extended elsewhere.

    Raises
    ------
    InputError
        Another extension, an unreadable file, a missing column, no row, or a value that its
        column does not allow; names row (from 1) and column.
    """
    if sweep_kind(path) == "csv":
        return sweep_from_csv(read_text(path), source=path)
    with OpenFile(path) as file:
        return sweep_from_open_file(file)


def sweep_from_csv(text: str, source: object = "") -> list[dict[str, Any]]:
    """The rows of a table from the text of a CSV file; see :func:`read_sweep`."""
    reader = csv.reader((f"{line}\n" for line in iterate_lines(text)), strict=True)
    try:
        lines = (line for line in reader if line)
        header = next(lines, None)
        if header is None:
            raise InputError("not CSV: an empty file", source=source, remedy=_REMEDY)
        _require_columns(header, source)
        at = {name: header.index(name) for name in COLUMNS}
        typed = []
        for number, line in enumerate(lines, 1):
            require_at_most(number, MAX_RUNS, "rows", source=source)
            if len(line) != len(header):
                raise InputError(
                    f"{len(line)} values",
                    source=source,
                    place=f"row {number}",
                    expected=f"{len(header)}, as in the header",
                )
            typed.append({name: _from_text(line[at[name]], kind) for name, kind in COLUMNS.items()})
    except csv.Error as error:
        raise InputError(f"not CSV: {error}", source=source, remedy=_REMEDY) from error
    return _validate_rows(typed, source, some=True)


def _from_text(text: str, kind: type) -> Any:
    """The number that the text of a cell stands for, or the text itself."""
    if kind is str:
        return text
    if not text.strip():
        return None
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def sweep_from_open_file(file: OpenFile) -> list[dict[str, Any]]:
    """The rows of a table from a Parquet file that is open; see :func:`read_sweep`."""
    source = file.path
    with open_parquet(file, columns=list(COLUMNS), remedy=_REMEDY) as parquet:
        header = (parquet.schema_arrow.metadata or {}).get(METADATA_KEY)
        _require_columns(parquet.schema_arrow.names, source)
        _require_version(header, source)
        _require_primitive_columns(parquet.schema_arrow, source)
        require_at_most(num_rows(parquet), MAX_RUNS, "rows", source=source)
        rows: list[dict[str, Any]] = []
        for batch in batches(parquet, _BATCH_ROWS, source=source, columns=list(COLUMNS)):
            _require_short_texts(batch, source)
            rows += batch.to_pylist()
    return _validate_rows(rows, source, some=True)


def _require_primitive_columns(schema: Any, source: object) -> None:
    """Refuse columns of lists and structures before they are decoded: one value may be of any size.

    ``schema`` is that of the columns as they are read, texts as dictionaries.
    """
    import pyarrow.types as kinds

    for name in COLUMNS:
        kind = schema.field(name).type
        if not (kinds.is_dictionary(kind) or kinds.is_primitive(kind) or kinds.is_null(kind)):
            raise InputError(
                f"type {kind!s:.60}",
                source=source,
                place=f"column {name!r}",
                expected="numbers or texts",
            )


def _require_short_texts(batch: Any, source: object) -> None:
    """Refuse long texts, which would be copied into every row."""
    import pyarrow.compute as pc
    import pyarrow.types as kinds

    for name in COLUMNS:
        column = batch.column(name)
        if kinds.is_dictionary(column.type) and not kinds.is_primitive(column.type.value_type):
            longest = pc.max(pc.binary_length(column.dictionary)).as_py() or 0
            place = f"column {name!r}"
            require_at_most(longest, MAX_CELL, "characters", source=source, place=place)


def _require_version(header: bytes | None, source: object) -> None:
    """A table written by another tool has no version, and is taken by its columns."""
    if header is None:
        return
    try:
        version = json.loads(header)["version"]
    except (ValueError, KeyError, TypeError):
        version = header.decode("utf-8", "replace")
    if version != VERSION or isinstance(version, bool):
        raise InputError(
            f"{version!r:.60}",
            source=source,
            place=f"metadata {METADATA_KEY.decode()}",
            expected=f"version {VERSION}",
            remedy="a newer file needs a newer prism-plan",
        )


def is_sweep(file: OpenFile) -> bool:
    """Whether a Parquet file says in its metadata that it is a sweep table."""
    try:
        with open_parquet(file, columns=list(COLUMNS), remedy=_REMEDY) as parquet:
            return METADATA_KEY in (parquet.schema_arrow.metadata or {})
    except InputError:
        return False


def is_sweep_csv(text: str) -> bool:
    """Whether the first line of a text file names columns of a sweep table."""
    words = text[: text.find("\n") + 1 or MAX_CELL].replace('"', "").strip().split(",")
    return len(set(words) & set(COLUMNS)) >= len(COLUMNS) // 2


def _require_columns(names: Sequence[str], source: object) -> None:
    require_at_most(len(names), MAX_COLUMNS, "columns", source=source)
    for name, times in Counter(names).items():
        if times > 1:
            raise InputError(
                f"column {name!r} is duplicated", source=source, expected="each column once"
            )
    others = [name for name in names if name not in COLUMNS]
    for name in COLUMNS:
        if name not in names:
            raise InputError(
                f"no column {name!r}{did_you_mean(name, others)}",
                source=source,
                expected=f"columns {', '.join(COLUMNS)}",
                remedy=_REMEDY,
            )


# --------------------------------------------------------------------------------------- checking


def _validate_rows(
    rows: Sequence[Mapping[str, Any]], source: object, *, some: bool = False
) -> list[dict[str, Any]]:
    """The rows with their values of the right kind."""
    if some and not rows:
        raise InputError("no rows", source=source, expected="a row for each run", remedy=_REMEDY)
    checked = []
    for number, row in enumerate(rows, 1):
        values = dict(validate(RunRow, row, source=source, part=f"row {number}"))
        _check_row(values, source, number)
        checked.append(values)
    return checked


#: Pairs of columns of which the first is never larger than the second.
_ORDERED = (
    ("servers", "gpus"),
    ("latency_p50_s", "latency_p95_s"),
    ("latency_p95_s", "latency_p99_s"),
    ("ttft_mean_s", "latency_mean_s"),
    ("remote_share", "waiting_share"),  # a step with a remote expert waits
)


def _check_row(row: Mapping[str, Any], source: object, number: int) -> None:
    """Refuse values of a row that contradict each other, which ranges cannot express."""

    def require(holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise InputError(
                short_repr(row[name]),
                source=source,
                place=f"row {number}: {name}",
                expected=expected,
            )

    known = _solver_names()
    name = row["solver"]
    close = did_you_mean(name, known)
    require(name in known, "solver", f"one of {', '.join(known)}{close}")
    for column in RESULTS if row["status"] != OK else ():
        require(row[column] is None, column, "nothing, for the run failed")
    for column in ("requests", "bytes_sent", "events") if row["status"] == OK else ():
        require(row[column] is not None, column, "a whole number, for the run went well")
    for smaller, larger in _ORDERED:
        if row[smaller] is not None and row[larger] is not None:
            least, most = row[smaller], row[larger]
            require(
                least <= most * (1 + _ROUNDING) + _ROUNDING, smaller,
                f"at most {larger}, {most:g}",
            )  # fmt: skip
    destinations = row["destinations"]
    if destinations is not None:
        others = row["servers"] - 1
        require(
            destinations <= others + _ROUNDING, "destinations", f"at most {others}, other servers"
        )
    times = [key for key in COLUMNS if key.startswith("latency_")]
    for key in times:
        require(
            (row[key] is None) == (row[times[0]] is None), key,
            f"a number exactly if {times[0]} is one",
        )  # fmt: skip


def _solver_names() -> tuple[str, ...]:
    """The names that a sweep can have in its column of solvers."""
    from prism_plan.solvers import ALL_SOLVERS, PATHS, SOLVER_NAMES

    return (*ALL_SOLVERS, *(name + PATHS for name in SOLVER_NAMES), OFFLOAD)
