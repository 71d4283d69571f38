"""Detect by its content what a file of SGLang is: responses, or a dump in one of three formats."""

from __future__ import annotations

import codecs
import re
import zipfile
from pathlib import Path
from typing import Literal

from prism_plan.errors import InputError
from prism_plan.io.gzip_text import decompressed_head, read_maybe_gzipped_text
from prism_plan.io.json import parse_json
from prism_plan.io.json_lines import text_lines
from prism_plan.io.open_file import OpenFile
from prism_plan.io.text_files import require_not_utf16
from prism_plan.profiling.responses.event_stream import is_event

Kind = Literal["responses", "json", "npz", "torch"]

#: The key of the counts of a dump.
COUNTS = "logical_count"
#: A key of a JSON object, not part of a text in it (there the quotes are escaped).
_COUNTS_KEY = re.compile(rb'(?<!\\)"logical_count"\s*:')
_RESPONSE_KEYS = ("meta_info", "sglext", "choices")
_RESPONSE_KEY = re.compile(rb'(?<!\\)"(meta_info|sglext|choices)"\s*:')
_HEAD_BYTES = 4096


def file_kind(path: Path) -> Kind:
    """What a file is; ``"json"`` also for what cannot be read, so that its reader says why."""
    try:
        head = decompressed_head(path, _HEAD_BYTES)
        require_not_utf16(head, path)
    except InputError:
        return "json"
    if head.startswith(b"PK"):
        return "npz" if f"{COUNTS}.npy" in _archive_members(path) else "torch"
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    json_lines = ".jsonl" in path.suffixes
    if not text.startswith((b"{", b"[")):
        events = is_event(text[:16].decode("latin-1"))
        return "responses" if events or json_lines else "torch"
    if _COUNTS_KEY.search(text):
        return "json"
    return "responses" if json_lines or _holds_response(path, text) else "json"


def _holds_response(path: Path, head: bytes) -> bool:
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
        return _RESPONSE_KEY.search(head) is not None
    return not set(_RESPONSE_KEYS).isdisjoint(value)


def _archive_members(path: Path) -> list[str]:
    try:
        with OpenFile(path) as file, zipfile.ZipFile(file.stream()) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, InputError, OSError, ValueError):
        return []
