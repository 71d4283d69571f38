"""What a file of SGLang is, told by its content; see :mod:`prism_plan.profiling.sglang`."""

from __future__ import annotations

import codecs
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prism_plan.errors import InputError
from prism_plan.io.gzip_text import decompressed_head, is_gzip, read_maybe_gzipped_text
from prism_plan.io.json import parse_json
from prism_plan.io.json_lines import text_lines
from prism_plan.io.open_file import OpenFile
from prism_plan.io.text_files import require_not_utf16
from prism_plan.profiling.event_stream import is_event
from prism_plan.profiling.sglang_dump import KINDS, load
from prism_plan.profiling.tensors import CUT_SHORT, parse_npy

Kind = Literal["responses", "json", "npz", "torch"]

COUNTS = "logical_count"
#: A key of a JSON object, not part of a text in it (there the quotes are escaped).
_COUNTS_KEY = re.compile(rb'(?<!\\)"logical_count"\s*:')
_RESPONSE_KEYS = ("meta_info", "sglext", "choices")
_A_RESPONSE_KEY = re.compile(rb'(?<!\\)"(meta_info|sglext|choices)"\s*:')
_HEAD_BYTES = 4096
#: Unpacked bytes of an array in a .npz file: four thousand passes of a model of 61 layers and 256
#: experts.
MAX_NPZ_BYTES = 2**29


def holds_responses(path: Path) -> bool:
    """Whether a file holds responses rather than a dump."""
    return _kind_of(path) == "responses"


def read_dump(path: Path) -> Mapping[str, Any]:
    """The dictionary in a dump: of tensors from PyTorch's format, of arrays from JSON or .npz.

    Raises
    ------
    InputError
        It cannot be read, holds code or is something else.
    """
    kind = _kind_of(path)
    if kind == "json":
        return _from_json(path)
    with OpenFile(path) as file:
        packed = is_gzip(file)
    if packed:
        raise InputError(
            "compressed with gzip, and no text",
            source=path,
            expected=KINDS,
            remedy="unpack it first (gunzip)",
        )
    return _from_npz(path) if kind == "npz" else load(path)


def _kind_of(path: Path) -> Kind:
    try:
        head = decompressed_head(path, _HEAD_BYTES)
        require_not_utf16(head, path)
    except InputError:
        return "json"  # whose reader names the reason
    if head.startswith(b"PK"):
        return "npz" if f"{COUNTS}.npy" in _members(path) else "torch"
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    lines_of_json = ".jsonl" in path.suffixes
    if not text.startswith((b"{", b"[")):
        events = is_event(text[:16].decode("latin-1"))
        return "responses" if events or lines_of_json else "torch"
    if _COUNTS_KEY.search(text):
        return "json"
    return "responses" if lines_of_json or _holds_a_response(path, text) else "json"


def _holds_a_response(path: Path, head: bytes) -> bool:
    """Whether the first line, or all of a JSON document, is a response or a list of them."""
    if head.startswith(b"["):
        return True
    _, line = next(text_lines(path, lambda error: None), (0, ""))
    try:
        try:
            value = parse_json(line, path)
        except InputError:
            value = parse_json(read_maybe_gzipped_text(path), path)
    except InputError:
        return _A_RESPONSE_KEY.search(head) is not None
    return not set(_RESPONSE_KEYS).isdisjoint(value)


def _members(path: Path) -> list[str]:
    try:
        with OpenFile(path) as file, zipfile.ZipFile(file.stream()) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, InputError, OSError, ValueError):
        return []


def _from_json(path: Path) -> Mapping[str, Any]:
    values = parse_json(read_maybe_gzipped_text(path), path)
    if not isinstance(values, dict) or COUNTS not in values:
        found = f"keys {', '.join(values)}" if isinstance(values, dict) else type(values).__name__
        placement = isinstance(values, dict) and "physical_to_logical_map" in values
        raise InputError(
            f"JSON without {COUNTS!r} ({found:.80})",
            source=path,
            expected=KINDS,
            remedy="this is where experts are to be placed, not what was recorded"
            if placement
            else "",
        )
    try:
        array = np.array("true or false" if _holds_flags(values[COUNTS]) else values[COUNTS])
    except (ValueError, OverflowError):
        array = np.array("ragged")
    if array.dtype.kind not in "iu":
        raise InputError(
            f"lists that are no array of whole numbers ({array.dtype} {list(array.shape)})",
            source=path,
            place=repr(COUNTS),
            expected="counts [layers][experts] or [passes][layers][experts] below 2^63",
        )
    return {**values, COUNTS: array}


def _holds_flags(values: Any) -> bool:
    """Whether true or false stands somewhere in lists; NumPy takes them for numbers."""
    if isinstance(values, list):
        return any(map(_holds_flags, values))
    return isinstance(values, bool)


def _from_npz(path: Path) -> Mapping[str, Any]:
    """``logical_count`` and, where it is there, ``rank`` of a .npz file; nothing is unpickled."""
    try:
        with OpenFile(path) as file, zipfile.ZipFile(file.stream()) as archive:
            values = {}
            for key in (COUNTS, "rank"):
                name = f"{key}.npy"
                if name not in archive.namelist():
                    continue
                size = archive.getinfo(name).file_size
                if size > MAX_NPZ_BYTES:
                    raise InputError(
                        f"{size:,} bytes of {key!r}",
                        source=path,
                        expected=f"at most {MAX_NPZ_BYTES:,}",
                    )
                values[key] = parse_npy(archive.read(name), path, repr(key))
    except (
        zipfile.BadZipFile,
        zlib.error,
        OSError,
        EOFError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise InputError(
            f"not a readable .npz file: {error}", source=path, remedy=CUT_SHORT
        ) from error
    rank = values.pop("rank", np.zeros((), np.int64))
    if rank.ndim:
        raise InputError(
            f"shape {list(rank.shape)}", source=path, place="'rank'", expected="one number"
        )
    return {**values, "rank": int(rank)}
