"""One safetensors file, read by ranges.

The file is neither mapped nor read whole: a mapped file counts as memory page by page, and ends the
process when it is cut while it is served from. Reading is safe from several threads and releases
the interpreter lock.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from prism_plan.errors import InputError
from prism_plan.files import decode, parse_json

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
#: No header is longer; a larger length is no safetensors file (the format's own limit).
MAX_HEADER_BYTES = 100_000_000
_REMEDY = "copy or download the file again"


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: ``begin`` and ``end`` are byte positions in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A safetensors file, open for reading.

    Raises
    ------
    InputError
        The file cannot be read, is cut short, or its header is not that of a safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise InputError(reason, source=self.path, remedy="give a readable file") from error
        self.entries: Mapping[str, Entry] = self._header()

    def __del__(self) -> None:
        fd, self._fd = getattr(self, "_fd", -1), -1
        if fd >= 0:
            os.close(fd)

    def __reduce__(self) -> tuple[Any, ...]:
        return TensorFile, (self.path,)  # another process opens the file itself

    def read(self, name: str, shape: tuple[int, ...] | None = None, first: int = 0) -> torch.Tensor:
        """A tensor of the file, or a ``shape`` of its numbers from number ``first`` on.

        Raises
        ------
        InputError
            The file has become shorter since it was opened, or cannot be read.
        """
        entry = self.entries[name]
        shape = entry.shape if shape is None else shape
        size = entry.dtype.itemsize
        begin, length = entry.begin + first * size, math.prod(shape) * size
        if not entry.begin <= begin <= begin + length <= entry.end:
            raise ValueError(f"{name}: numbers {first} and on of shape {shape} are not in it")
        raw = torch.empty(length, dtype=torch.uint8)
        if length:
            self._fill(memoryview(raw.numpy()), begin, name)
        return raw.view(entry.dtype).view(shape)

    def _fill(self, into: memoryview, position: int, name: str) -> None:
        done = 0
        while done < len(into):
            try:
                got = os.preadv(self._fd, [into[done:]], position + done)
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                raise InputError(
                    f"cannot be read: {reason}", source=self.path, place=name, remedy=_REMEDY
                ) from error
            if not got:
                raise InputError(
                    "the file ends within the tensor",
                    source=self.path,
                    place=name,
                    expected="the file as it was when it was opened",
                    remedy=_REMEDY,
                )
            done += got

    def _header(self) -> dict[str, Entry]:
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode):
            raise InputError("is no regular file", source=self.path, remedy=_REMEDY)
        size = found.st_size
        length = int.from_bytes(self._bytes(0, 8), "little")
        if size < 8 or not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
            raise InputError(
                f"no header in its {size:,} bytes",
                source=self.path,
                expected="a whole safetensors file",
                remedy=_REMEDY,
            )
        text = decode(self._bytes(8, length), self.path)
        values = parse_json(text, self.path)
        if not isinstance(values, dict):
            raise InputError(f"{values!r:.60}", source=self.path, place="header", remedy=_REMEDY)
        values.pop("__metadata__", None)
        entries = {name: self._entry(name, value, 8 + length) for name, value in values.items()}
        end = max((entry.end for entry in entries.values()), default=8 + length)
        if end != size:
            raise InputError(
                f"holds {size:,} bytes",
                source=self.path,
                expected=f"{end:,}, as its header says",
                remedy=_REMEDY,
            )
        return entries

    def _bytes(self, position: int, length: int) -> bytes:
        return os.pread(self._fd, length, position)

    def _entry(self, name: str, value: Any, start: int) -> Entry:
        try:
            kind, shape = value["dtype"], tuple(value["shape"])
            begin, end = value["data_offsets"]
            numbers = (*shape, begin, end)
            if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
                raise ValueError
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(
                f"{value!r:.80}",
                source=self.path,
                place=name,
                expected="dtype, shape and data_offsets",
                remedy=_REMEDY,
            ) from error
        if not isinstance(kind, str) or kind not in DTYPES:
            raise InputError(
                f"numbers of kind {kind!r:.20}",
                source=self.path,
                place=name,
                expected=f"one of {', '.join(DTYPES)}",
                remedy="quantised weights cannot be run here",
            )
        if end - begin != math.prod(shape) * DTYPES[kind].itemsize:
            raise InputError(
                f"{end - begin:,} bytes for shape {list(shape)} of {kind}",
                source=self.path,
                place=name,
                expected=f"{math.prod(shape) * DTYPES[kind].itemsize:,} bytes",
                remedy=_REMEDY,
            )
        return Entry(DTYPES[kind], shape, start + begin, start + end)
