"""Load a dump of SGLang's recorder: PyTorch's format, or counts in JSON or .npz."""

from __future__ import annotations

import io
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from prism_plan.errors import InputError
from prism_plan.input_limits import MIB
from prism_plan.io.gzip_text import is_gzip, read_maybe_gzipped_text
from prism_plan.io.json import parse_json
from prism_plan.io.location import Location
from prism_plan.io.open_file import OpenFile
from prism_plan.profiling.common.messages import TRUNCATED
from prism_plan.profiling.common.npy import parse_npy
from prism_plan.profiling.sglang.file_kind import COUNTS, file_kind

#: What is read as recordings of SGLang, for messages.
KINDS = (
    "a recorder's dump (.pt), 'logical_count' in a JSON or .npz file, or responses (JSON Lines, a "
    "JSON array or an event stream)"
)
#: Unpacked bytes of an array in a .npz file: four thousand passes of a model of 61 layers and 256
#: experts.
MAX_NPZ_BYTES = 2**29


def load_dump(path: Path) -> Mapping[str, Any]:
    """The dictionary in a dump: of tensors from PyTorch's format, of arrays from JSON or .npz.

    Raises
    ------
    InputError
        It cannot be read, holds code or is something else.
    """
    kind = file_kind(path)
    if kind == "json":
        return _from_json(path)
    with OpenFile(path) as file:
        packed = is_gzip(file)
    if packed:
        raise Location(path).error(
            "compressed with gzip, and no text", KINDS, "unpack it first (gunzip)"
        )
    return _from_npz(path) if kind == "npz" else _from_torch(path)


def _from_torch(path: Path) -> Mapping[str, Any]:
    """The dictionary in a .pt file; nothing but tensors and plain values is ever built of it."""
    try:
        import torch
    except ImportError as error:
        raise Location(path).error(
            "PyTorch is not installed, and the file is its format",
            remedy="pip install 'prism-plan[hf]'",
        ) from error
    try:
        with (
            warnings.catch_warnings(),
            OpenFile(path) as file,
            io.BufferedReader(file.stream(), MIB) as stream,
        ):
            warnings.simplefilter("ignore")
            _refuse_compressed(stream, path)
            dump = torch.load(stream, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # hostile bytes make PyTorch's reader raise anything
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise Location(path).error(
                f"not opened: it holds code or objects ({code.group(1):.60})",
                "tensors and plain values only",
                "use files that the recorder itself wrote",
            ) from error
        raise Location(path).error(
            f"not a readable PyTorch file ({type(error).__name__})", KINDS, TRUNCATED
        ) from error
    if not isinstance(dump, dict):
        raise Location(path).error(
            f"{type(dump).__name__}", "a dump of SGLang's expert distribution recorder"
        )
    return dump


def _refuse_compressed(stream: IO[bytes], path: Path) -> None:
    """Refuse an archive whose entries inflate: PyTorch stores them as they are."""
    if zipfile.is_zipfile(stream):
        with zipfile.ZipFile(stream) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise Location(path).error(
                        f"entry {entry.filename!r:.60} is compressed",
                        "a file as PyTorch writes it",
                        "use files that the recorder itself wrote",
                    )
    stream.seek(0)


def _from_json(path: Path) -> Mapping[str, Any]:
    values = parse_json(read_maybe_gzipped_text(path), path)
    if not isinstance(values, dict) or COUNTS not in values:
        found = f"keys {', '.join(values)}" if isinstance(values, dict) else type(values).__name__
        placement = isinstance(values, dict) and "physical_to_logical_map" in values
        raise Location(path).error(
            f"JSON without {COUNTS!r} ({found:.80})",
            KINDS,
            "this is where experts are to be placed, not what was recorded" if placement else "",
        )
    try:
        array = np.array("true or false" if _holds_booleans(values[COUNTS]) else values[COUNTS])
    except (ValueError, OverflowError):
        array = np.array("ragged")
    if array.dtype.kind not in "iu":
        raise Location(path, repr(COUNTS)).error(
            f"lists that are no array of whole numbers ({array.dtype} {list(array.shape)})",
            "counts [layers][experts] or [passes][layers][experts] below 2^63",
        )
    return {**values, COUNTS: array}


def _holds_booleans(values: Any) -> bool:
    """Whether nested lists contain a boolean, which NumPy takes for a number."""
    if isinstance(values, list):
        return any(map(_holds_booleans, values))
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
                    raise Location(path).error(
                        f"{size:,} bytes of {key!r}", f"at most {MAX_NPZ_BYTES:,}"
                    )
                values[key] = parse_npy(archive.read(name), Location(path, repr(key)))
    except (
        zipfile.BadZipFile,
        zlib.error,
        OSError,
        EOFError,
        RuntimeError,  # of an archive that is encrypted, or of an unknown compression
    ) as error:
        raise Location(path).error(
            f"not a readable .npz file: {error}", remedy=TRUNCATED
        ) from error
    rank = values.pop("rank", np.zeros((), np.int64))
    if rank.ndim:
        raise Location(path, "'rank'").error(f"shape {list(rank.shape)}", "one number")
    return {**values, "rank": int(rank)}
