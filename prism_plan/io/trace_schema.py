"""Columns and header of traces, ``prism-plan/trace`` version 1 (docs/design.md, section 6)."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prism_plan.errors import InputError
from prism_plan.io.json import parse_json
from prism_plan.model_spec import ModelSpec

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


def header_bytes(kind: str, model: ModelSpec, provenance: Mapping[str, Any], **more: Any) -> bytes:
    """The header of a trace as JSON; ``more`` are the tokens per task of a counts-only one."""
    header = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "model": model.to_json(),
        "provenance": dict(provenance),
        **more,
    }
    return json.dumps(header).encode()


def file_metadata(schema: pa.Schema, header: bytes) -> dict[bytes, bytes]:
    """Key-value metadata of a finished file: our header, and the columns' Arrow types.

    Arrow shows the metadata of the schema that it stores itself, and hides others where there is
    one: the header stands in both, so that every way to read Parquet finds it.
    """
    stored = schema.with_metadata({METADATA_KEY: header}).serialize().to_pybytes()
    return {METADATA_KEY: header, ARROW_SCHEMA_KEY: base64.b64encode(stored)}


def parse_header(metadata: Mapping[bytes, bytes], path: object) -> dict[str, Any]:
    """The header in the key-value metadata of a Parquet file; format, version and kind checked.

    Raises
    ------
    InputError
        No trace of ours, a newer version, or a header that is damaged.
    """
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


def require_columns(path: object, found: pa.Schema, wanted: pa.Schema) -> None:
    """Refuse a file whose columns are not the expected ones, whatever their order.

    Raises
    ------
    InputError
        A column is missing, unknown, or of another type.
    """
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
