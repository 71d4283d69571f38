"""Text files that may be compressed with gzip, which their first bytes say.

A few bytes of a gzip file can stand for a thousand times as many, so that what is unpacked is
bounded by the size of the file before any of it is kept.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from typing import IO, TYPE_CHECKING

from prism_plan.errors import InputError
from prism_plan.input_limits import MAX_TEXT_BYTES, MIB
from prism_plan.io.open_file import OpenFile
from prism_plan.io.text_files import decode

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

GZIP = b"\x1f\x8b"
#: Bytes that any gzip file may unpack to, and how many more for each of its own: recordings of
#: random ids shrink to a tenth, tables that are nearly all zeros to less than a hundredth.
MIN_UNPACKED_LIMIT_BYTES, MAX_COMPRESSION_RATIO = 64 * MIB, 100


def is_gzip(file: OpenFile) -> bool:
    """Whether a file is compressed with gzip."""
    return file.pread(len(GZIP), 0) == GZIP


def decompressed(file: OpenFile) -> IO[bytes]:
    """A stream of the bytes of an open file, decompressed where it is gzip.

    Raises
    ------
    InputError
        While reading: the file is truncated or damaged, or unpacks to too much.
    """
    if is_gzip(file):
        return io.BufferedReader(_BoundedGzipStream(file), MIB)
    return io.BufferedReader(file.stream(), MIB)


def read_maybe_gzipped_text(source: str | os.PathLike[str] | OpenFile) -> str:
    """Read a UTF-8 text file, gzip or not; see :func:`prism_plan.io.text_files.read_text`.

    A file that is open already stays open.

    Raises
    ------
    InputError
        Unreadable, too long (also when unpacked) or not UTF-8.
    """
    if not isinstance(source, OpenFile):
        with OpenFile(source) as file:
            return read_maybe_gzipped_text(file)
    if not is_gzip(source):
        return decode(source.read(), source.path)
    data = bytearray()  # which takes what there is, not what there may be
    with decompressed(source) as stream:
        while part := stream.read(MIB):
            data += part
            if len(data) > MAX_TEXT_BYTES:
                raise InputError(
                    f"unpacks to more than {MAX_TEXT_BYTES:,} bytes",
                    source=source.path,
                    remedy="give a file of a part of it",
                )
    return decode(bytes(data), source.path)


def decompressed_head(path: str | os.PathLike[str], length: int) -> bytes:
    """The first bytes of a file, decompressed where it is gzip."""
    with OpenFile(path) as file, decompressed(file) as stream:
        return stream.read(length)


class _BoundedGzipStream(io.RawIOBase):
    """The decompressed bytes of a gzip file; refuses to give more than its size allows."""

    def __init__(self, file: OpenFile) -> None:
        super().__init__()
        self._path = file.path
        self._packed = gzip.GzipFile(fileobj=io.BufferedReader(file.stream(), MIB), mode="rb")
        self._most = MIN_UNPACKED_LIMIT_BYTES + MAX_COMPRESSION_RATIO * file.size
        self._read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        into = memoryview(buffer).cast("B")
        try:
            data = self._packed.read(len(into))
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(
                f"not a whole gzip file: {error}",
                source=self._path,
                remedy="the file may be truncated; record or copy it again",
            ) from error
        self._read += len(data)
        if self._read > self._most:
            raise InputError(
                f"unpacks to more than {self._most:,} bytes",
                source=self._path,
                expected=f"at most {MIN_UNPACKED_LIMIT_BYTES:,} and {MAX_COMPRESSION_RATIO} times "
                "the size of the file",
                remedy="unpack it first (gunzip) if it is really a recording",
            )
        into[: len(data)] = data
        return len(data)
