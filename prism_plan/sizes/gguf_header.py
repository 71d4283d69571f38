"""Read the header of a GGUF file: its keys and the list of its tensors.

Block sizes of the quantised types are those of the ``gguf`` package. Its own reader is not used: it
makes arrays of every entry of a vocabulary, some hundreds of MB, and believes the lengths and
counts that a file declares.
"""

from __future__ import annotations

import functools
import math
import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from prism_plan.input_limits import MAX_LAYERS, MIB, require_at_most
from prism_plan.io.location import Location
from prism_plan.io.open_file import unreadable
from prism_plan.printable_text import shown
from prism_plan.sizes.config_keys import MAX_SIZE
from prism_plan.sizes.stored_tensors import BY_HAND, StoredTensor

#: Characters of a key, of a tensor's name, and of a text that is read.
_MAX_TEXT = 65_536
#: Keys of a file, texts of one array (the largest vocabularies have 260,000), and tensors.
_MAX_KEYS, _MAX_TEXTS, MAX_GGUF_TENSORS = 65_536, 2**21, 2**18
#: Bytes of a header; those of large vocabularies take some 15 MB.
_MAX_HEADER = 64 * MIB
#: Values of an array of numbers that is read: one a layer. Longer ones are skipped.
_MAX_VALUES = MAX_LAYERS
#: ``struct`` formats of the value types that are numbers.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_TEXT, _ARRAY = 8, 9


class _Malformed(Exception):
    """What is wrong with a header; without a text, that the file ends within it."""


def read_gguf_header(path: Path) -> tuple[dict[str, Any], list[StoredTensor]]:
    """Read the keys and the tensors of one file; values of long texts and arrays are None.

    Raises
    ------
    InputError
        The package ``gguf`` is not installed; the file cannot be read, is truncated, or is no GGUF
        file.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise Location(path).error("is no regular file", remedy="give a GGUF file")
            return _header(file, path)
    except _Malformed as error:
        raise Location(path).error(
            str(error) or "the file ends within its header",
            "a whole GGUF file",
            "copy or download the file again",
        ) from error
    except OSError as error:
        raise unreadable(error, path) from error


def _header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], list[StoredTensor]]:
    size = os.fstat(file.fileno()).st_size
    magic, version = file.read(4), _number(file, "I")
    if magic != b"GGUF" or version not in (2, 3):
        raise _Malformed(f"begins with {magic!r}, version {version}")
    count, num_keys = _number(file, "Q"), _number(file, "Q")
    require_at_most(count, min(MAX_GGUF_TENSORS, size), "tensors", source=path)
    require_at_most(num_keys, _MAX_KEYS, "keys", source=path)
    keys = {}
    for _ in range(num_keys):
        name = _text(file)
        keys[name] = _value(file, _number(file, "I"), size)
        require_at_most(file.tell(), _MAX_HEADER, "bytes of header", source=path)
    infos = []
    for _ in range(count):
        name = _text(file)
        dims = _number(file, "I")
        if dims > 16:
            raise _Malformed(f"tensor {name!r:.60} has {dims:,} dimensions")
        shape = tuple(_number(file, "Q") for _ in range(dims))[::-1]
        infos.append((name, shape, _number(file, "I"), _number(file, "Q")))
    alignment = keys.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= MAX_SIZE:
        raise _Malformed(f"general.alignment is {shown(alignment)}")
    start = -(-file.tell() // alignment) * alignment
    tensors = [_tensor(*info, start, path) for info in infos]
    end = max((tensor.begin + tensor.num_bytes for tensor in tensors), default=0)
    if end > size or sum(tensor.num_bytes for tensor in tensors) > size:
        raise _Malformed(f"holds {size:,} bytes, and its tensors end at {end:,}")
    return keys, tensors


def _tensor(
    name: str, shape: tuple[int, ...], kind: int, offset: int, start: int, path: Path
) -> StoredTensor:
    sizes = block_sizes()
    if kind not in sizes:
        raise Location(path, name).error(
            f"numbers of type {kind}",
            "a type that the installed gguf package knows",
            f"pip install -U gguf, or {BY_HAND}",
        )
    label, block, block_bytes = sizes[kind]
    numbers = math.prod(shape)
    if not shape or shape[-1] % block:
        raise _Malformed(
            f"tensor {name!r:.60} of shape {list(shape)} has no whole blocks of {block}"
        )
    return StoredTensor(name, label, shape, numbers // block * block_bytes, start + offset)


@functools.cache
def block_sizes() -> Mapping[int, tuple[str, int, int]]:
    """Name, numbers a block and bytes a block, by the type's number."""
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        raise Location("a .gguf file").error(
            "gguf is not installed", remedy="pip install 'prism-plan[gguf]'"
        ) from error
    return {kind.value: (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


def _number(file: BinaryIO, form: str) -> Any:
    size = struct.calcsize(f"<{form}")
    data = file.read(size)
    if len(data) < size:
        raise _Malformed
    return struct.unpack(f"<{form}", data)[0]


def _text(file: BinaryIO) -> str:
    length = _number(file, "Q")
    if length > _MAX_TEXT:
        raise _Malformed(f"a name of {length:,} characters")
    return _decoded(file, length)


def _decoded(file: BinaryIO, length: int) -> str:
    data = file.read(length)
    if len(data) < length:
        raise _Malformed
    return data.decode("utf-8", "replace")


def _skip(file: BinaryIO, length: int, size: int) -> None:
    if length > size - file.tell():
        raise _Malformed
    file.seek(length, os.SEEK_CUR)


def _value(file: BinaryIO, kind: int, size: int) -> Any:
    """Read a value; None for long texts and arrays, which are skipped."""
    if kind in _SCALARS:
        return _number(file, _SCALARS[kind])
    if kind == _TEXT:
        length = _number(file, "Q")
        if length <= _MAX_TEXT:
            return _decoded(file, length)
        _skip(file, length, size)
        return None
    if kind != _ARRAY:
        raise _Malformed(f"a value of type {kind}")
    inner, count = _number(file, "I"), _number(file, "Q")
    if inner in _SCALARS:
        width = struct.calcsize(f"<{_SCALARS[inner]}")
        if count > _MAX_VALUES:
            _skip(file, count * width, size)
            return None
        return [_number(file, _SCALARS[inner]) for _ in range(count)]
    if inner != _TEXT or count > _MAX_TEXTS:
        raise _Malformed(f"an array of {count:,} values of type {inner}")
    for _ in range(count):
        _skip(file, _number(file, "Q"), size)
    return None
