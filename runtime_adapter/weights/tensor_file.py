"""Reads tensors, or ranges of them, from a safetensors file.

The file is neither mapped nor read whole: a mapped file counts as memory page by page, and ends the
process when it is cut while it is served from. Reading is safe from several threads and releases
the interpreter lock.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from prism_plan.errors import InputError
from prism_plan.sizes.safetensors_headers import header_of, open_file
from prism_plan.sizes.stored_tensors import StoredTensor

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
_REMEDY = "copy or download the file again"


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a file, whose bytes are at ``begin`` to ``end`` of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A safetensors file, open for reading.

    Raises
    ------
    InputError
        The file cannot be read, is truncated, or its header is not that of a safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._fd = open_file(self.path)
        self.entries: Mapping[str, TensorEntry] = {
            name: self._entry(tensor) for name, tensor in header_of(self._fd, self.path).items()
        }

    def __del__(self) -> None:
        fd, self._fd = getattr(self, "_fd", -1), -1
        if fd >= 0:
            os.close(fd)

    def __reduce__(self) -> tuple[Any, ...]:
        return TensorFile, (self.path,)  # another process opens the file itself

    def read(self, name: str, shape: tuple[int, ...] | None = None, first: int = 0) -> torch.Tensor:
        """Read a tensor, or a ``shape`` of its numbers from number ``first`` on.

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

    def _fill(self, target: memoryview, position: int, name: str) -> None:
        done = 0
        while done < len(target):
            try:
                num_read = os.preadv(self._fd, [target[done:]], position + done)
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                raise InputError(
                    f"cannot be read: {reason}", source=self.path, place=name, remedy=_REMEDY
                ) from error
            if not num_read:
                raise InputError(
                    "the file ends within the tensor",
                    source=self.path,
                    place=name,
                    expected="the file as it was when it was opened",
                    remedy=_REMEDY,
                )
            done += num_read

    def _entry(self, tensor: StoredTensor) -> TensorEntry:
        if tensor.dtype not in DTYPES:
            raise InputError(
                f"numbers of kind {tensor.dtype!r:.20}",
                source=self.path,
                place=tensor.name,
                expected=f"one of {', '.join(DTYPES)}",
                remedy="quantised weights cannot be run here",
            )
        end = tensor.begin + tensor.num_bytes
        return TensorEntry(DTYPES[tensor.dtype], tensor.shape, tensor.begin, end)
