"""Files that are read: each is opened once, has a bounded size, and is a regular file or a stream.

What a command reads of a file, and the digest that it records of it, come from one descriptor:
a file that is replaced meanwhile changes neither, and one that is changed in place is noticed.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import socket
import stat
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

from prism_plan.errors import InputError
from prism_plan.input_limits import MAX_LINE_BYTES, MAX_TEXT_BYTES, MIB

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

#: The name that stands for standard input.
STANDARD_INPUT = "-"
_REMEDY = "give a readable file"
#: Names of descriptors that this process was given: standard input, and what ``<(command)`` makes.
_DESCRIPTOR = re.compile(r"(?:/dev|/proc/self)/fd/(\d{1,9})")
_KINDS = (
    (stat.S_ISFIFO, "is a pipe"),
    (stat.S_ISSOCK, "is a socket"),
    (stat.S_ISCHR, "is a device"),
    (stat.S_ISBLK, "is a device"),
)


def unreadable(error: OSError, path: object, remedy: str = _REMEDY) -> InputError:
    """The error of a file that the operating system refuses to read."""
    return InputError((error.strerror or str(error)).lower(), source=path, remedy=remedy)


class OpenFile:
    """A file, open for reading until it is closed or collected.

    Regular files are read by ranges, as often as is needed, through the one descriptor. Standard
    input (``-``, ``/dev/stdin``) and other descriptors that the process was given are read once,
    at most :data:`~prism_plan.input_limits.MAX_TEXT_BYTES`, and kept in memory. Named pipes,
    devices, sockets and folders are refused without waiting for them.

    Sent to another process it is opened there when it is first read, by its absolute path, and
    refused unless it still is the same file. On another machine a shared file system has other
    numbers for it: there its size and its time of change have to be the same.

    Raises
    ------
    InputError
        The file cannot be opened, is of another kind, or is a stream that is too long.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        # a worker process that it is sent to may be in another folder
        self._absolute_path = self.path if _number(self.path) is not None else os.path.abspath(path)
        self._fd: int | None = None
        self._held: bytes | None = None
        try:
            self._fd = _descriptor(self.path)
            found = os.fstat(self._fd)
            self._check_kind(found.st_mode)
            if not stat.S_ISREG(found.st_mode):
                self._held = _read_stream(self._fd, self.path)
        except OSError as error:
            raise unreadable(error, self.path) from error
        self._identity = _identity(found)
        self._host = socket.gethostname()

    def _check_kind(self, mode: int) -> None:
        if stat.S_ISREG(mode):
            return
        if stat.S_ISDIR(mode):
            raise InputError("is a directory", source=self.path, remedy=_REMEDY)
        if _number(self.path) is None:
            kind = next((text for is_kind, text in _KINDS if is_kind(mode)), "is no file")
            raise InputError(
                kind, source=self.path, expected="a regular file, or - for standard input"
            )

    def close(self) -> None:
        """Close the descriptor and free the bytes that were read of a stream."""
        fd, self._fd, self._held = self._fd, None, None
        if fd is not None:
            os.close(fd)

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fd": None}

    def _descriptor(self) -> int:
        """The file descriptor; in a process that the file was sent to, opened at first use."""
        if self._fd is None:
            try:
                self._fd = _descriptor(self._absolute_path)
            except OSError as error:
                raise unreadable(error, self.path) from error
            if self._host != socket.gethostname():
                here = _identity(os.fstat(self._fd))
                self._identity, self._host = here[:2] + self._identity[2:], socket.gethostname()
            self.require_unchanged()
        return self._fd

    @property
    def size(self) -> int:
        """Bytes of the file when it was opened."""
        return len(self._held) if self._held is not None else self._identity[2]

    def require_unchanged(self) -> None:
        """Refuse to continue with a file that was written to since it was opened.

        Raises
        ------
        InputError
            Its size or its time of change is another, or it is another file.
        """
        if self._held is not None:
            return
        if _identity(os.fstat(self._descriptor())) != self._identity:
            raise InputError(
                "was changed while it was read", source=self.path, remedy="run the command again"
            )

    def pread(self, length: int, position: int) -> bytes:
        """``length`` bytes from ``position`` on, fewer where the file ends.

        Raises
        ------
        InputError
            The file cannot be read.
        """
        if self._held is not None:
            return self._held[position : position + length]
        parts = []
        try:
            while length > 0:
                part = os.pread(self._descriptor(), length, position)
                if not part:
                    break
                parts.append(part)
                position += len(part)
                length -= len(part)
        except OSError as error:
            raise unreadable(error, self.path) from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read(self, most: int = MAX_TEXT_BYTES) -> bytes:
        """All bytes of the file.

        Raises
        ------
        InputError
            There are more than ``most``, or the file cannot be read.
        """
        if self.size > most:
            raise _too_long(self.path, most)
        data = self.pread(self.size or most + 1, 0)  # files of /proc say that they have no bytes
        if len(data) == self.size:
            more = self.pread(most + 1 - len(data), len(data))
            data = data + more if more else data
        if len(data) > most:
            raise _too_long(self.path, most)
        return data

    def stream(self) -> io.RawIOBase | io.BytesIO:
        """The bytes as a stream with a position of its own, to be used while this is open."""
        return io.BytesIO(self._held) if self._held is not None else _View(self)

    def regular(self) -> IO[bytes]:
        """The same open file with a descriptor of its own, for libraries that map files.

        Raises
        ------
        InputError
            It is a stream, which cannot be mapped.
        """
        if self._held is not None:
            raise InputError(
                "is a stream", source=self.path, expected="a regular file", remedy=_REMEDY
            )
        return open(os.dup(self._descriptor()), "rb")

    def sha256(self) -> str:
        """Hex digest of the file's bytes.

        Raises
        ------
        InputError
            The file cannot be read, or was changed since it was opened.
        """
        found = hashlib.sha256()
        position = 0
        while part := self.pread(MIB // 4, position):  # small enough that malloc reuses it
            found.update(part)
            position += len(part)
        self.require_unchanged()
        return found.hexdigest()

    def lines(self, stream: IO[bytes] | None = None) -> Iterator[tuple[int, bytes]]:
        """(number from 1, bytes with the line end) of each line, read one by one.

        ``stream`` is what is read in place of the file's own bytes: what they unpack to.

        Raises
        ------
        InputError
            A line has more than :data:`~prism_plan.input_limits.MAX_LINE_BYTES`, or the file cannot
            be read.
        """
        with stream or io.BufferedReader(self.stream(), MIB) as source:
            number = 0
            while line := source.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise InputError(
                        "a line too long",
                        source=self.path,
                        place=f"line {number}",
                        expected=f"at most {MAX_LINE_BYTES:,} bytes",
                    )
                yield number, line


class _View(io.RawIOBase):
    """A stream over a regular file; each has its own position on the shared descriptor."""

    def __init__(self, file: OpenFile) -> None:
        super().__init__()
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size}
        self._position = max(0, base[whence] + offset)
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._file.size - self._position)
        length = left if size is None or size < 0 else min(size, left)
        data = self._file.pread(length, self._position)
        self._position += len(data)
        return data

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        into = memoryview(buffer).cast("B")
        data = self.read(len(into))
        into[: len(data)] = data
        return len(data)


def _number(path: str | bytes) -> int | None:
    """The descriptor that a path stands for, ``None`` for a path of the file system."""
    text = os.fsdecode(path)
    if text in (STANDARD_INPUT, "/dev/stdin"):
        return 0
    match = _DESCRIPTOR.fullmatch(text)
    return int(match.group(1)) if match else None


def _descriptor(path: str | bytes) -> int:
    """A descriptor of our own for ``path``; opening never waits for the writer of a pipe."""
    number = _number(path)
    if number is not None:
        return os.dup(number)
    flags = os.O_RDONLY
    for name in ("O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY", "O_BINARY"):
        flags |= getattr(os, name, 0)
    try:
        return os.open(path, flags)
    except ValueError as error:  # a null character in the name
        raise OSError(None, str(error)) from error


def _read_stream(fd: int, path: str) -> bytes:
    """All bytes of a pipe or terminal."""
    parts, length = [], 0
    while part := os.read(fd, MIB):
        parts.append(part)
        length += len(part)
        if length > MAX_TEXT_BYTES:
            raise _too_long(path, MAX_TEXT_BYTES)
    return b"".join(parts)


def _too_long(path: object, most: int) -> InputError:
    return InputError(
        f"is longer than {most:,} bytes", source=path, remedy="give a file of this program"
    )


def _identity(found: os.stat_result) -> tuple[int, int, int, int]:
    """Device, inode, size and time of change: they differ once a file was written to."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
