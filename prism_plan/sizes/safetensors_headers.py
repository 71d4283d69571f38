"""Read the headers of safetensors files: names, dtypes, shapes and places of their tensors."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prism_plan.input_limits import require_at_most
from prism_plan.io.json import parse_json
from prism_plan.io.location import Location
from prism_plan.io.open_file import unreadable
from prism_plan.io.text_files import decode
from prism_plan.sizes.stored_tensors import MAX_TENSORS, StoredTensor
from prism_plan.sizes.weight_files import INDEX, SINGLE, indexed_files, shards_without_index

#: The format's own limit of a header.
MAX_HEADER_BYTES = 100_000_000
#: Bits of a number of each dtype. The size of a tensor of another dtype is not checked.
BITS = {
    **{"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64, "BOOL": 8},
    **{"I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
_REMEDY = "copy or download the file again"


def tensors_of_folder(folder: Path) -> Iterator[StoredTensor]:
    """Read the headers of all safetensors files of a checkpoint.

    The files are ``model.safetensors``, those of the index, shards whose index is missing where
    they are complete, or the only file of another name.

    Raises
    ------
    InputError
        There are none; one is missing, truncated or damaged; a tensor is not where the index says.
    """
    if (folder / SINGLE).is_file():
        yield from read_header(folder / SINGLE).values()
        return
    shards = [] if (folder / INDEX).is_file() else shards_without_index(folder)
    if shards:
        for file in shards:
            yield from read_header(folder / file).values()
        return
    files = indexed_files(folder)
    headers, tensors = {}, 0
    for file in sorted(set(files.values())):
        headers[file] = read_header(folder / file)
        tensors += len(headers[file])
        require_at_most(tensors, MAX_TENSORS, "tensors", source=folder / INDEX)
    for name, file in files.items():
        if name not in headers[file]:
            raise Location(folder / file).error(
                f"tensor {name} is missing",
                f"it there, as {INDEX} says",
                "copy or download the checkpoint again",
            )
    for header in headers.values():  # what is stored counts, even where it is not in the index
        yield from header.values()


def read_header(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """Read the header of one file.

    Raises
    ------
    InputError
        The file cannot be read, is truncated, or its header is not that of a safetensors file.
    """
    fd = open_file(path)
    try:
        return header_of(fd, path)
    finally:
        os.close(fd)


def open_file(path: str | os.PathLike[str]) -> int:
    """Open a file for reading by ranges, and return its descriptor.

    Raises
    ------
    InputError
        It cannot be opened.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise unreadable(error, path) from error


def header_of(fd: int, path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """Read the header of an open file: its tensors by name, with their places in the file.

    Raises
    ------
    InputError
        The file is truncated, or its header is not that of a safetensors file.
    """
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise Location(path).error("is no regular file", remedy=_REMEDY)
    size = found.st_size
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if size < 8 or not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
        raise Location(path).error(
            f"no header in its {size:,} bytes", "a whole safetensors file", _REMEDY
        )
    values = parse_json(decode(os.pread(fd, length, 8), path), path)
    if not isinstance(values, dict):
        raise Location(path, "header").error(f"{values!r:.60}", remedy=_REMEDY)
    values.pop("__metadata__", None)
    tensors = {name: _tensor(name, value, 8 + length, path) for name, value in values.items()}
    stated = 8 + length + sum(tensor.num_bytes for tensor in tensors.values())
    end = max((tensor.begin + tensor.num_bytes for tensor in tensors.values()), default=8 + length)
    if end != size or stated != size:
        raise Location(path).error(
            f"holds {size:,} bytes",
            f"{end if end != size else stated:,}, as its header says",
            _REMEDY,
        )
    return tensors


def _tensor(name: str, value: Any, start: int, path: str | os.PathLike[str]) -> StoredTensor:
    try:
        kind, shape = value["dtype"], tuple(value["shape"])
        begin, end = value["data_offsets"]
        numbers = (*shape, begin, end)
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
            raise ValueError
        if not isinstance(kind, str) or end < begin or len(shape) > 16 or max(numbers) >= 2**63:
            raise ValueError
    except (TypeError, KeyError, ValueError) as error:
        raise Location(path, name).error(
            f"{value!r:.80}", "dtype, shape and data_offsets", _REMEDY
        ) from error
    bits = BITS.get(kind)
    if bits is not None and 8 * (end - begin) != math.prod(shape) * bits:
        raise Location(path, name).error(
            f"{end - begin:,} bytes for shape {list(shape)} of {kind}",
            f"{math.prod(shape) * bits // 8:,} bytes",
            _REMEDY,
        )
    return StoredTensor(name, kind, shape, end - begin, start + begin)
