"""Writing files whole or not at all, reading text with clear errors, and file identities."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prism_plan.errors import InputError, OutputError


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def check_writable(path: str | os.PathLike[str]) -> None:
    """Fail early, before long work, where ``path`` cannot be written.

    Raises
    ------
    OutputError
        The folder does not exist or cannot be written, or ``path`` is a folder.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise OutputError(f"{path}: is a folder; give the name of a file")
    if target.exists() and not target.is_file():
        return  # a device or a pipe: it is written in place
    if not target.parent.is_dir():
        raise OutputError(f"{path}: folder {target.parent} does not exist; create it first")
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise OutputError(
            f"{path}: cannot write in {target.parent}: {_reason(error)}; choose another folder"
        ) from error
    os.close(handle)
    os.unlink(name)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside ``path`` that replaces it when the block ends well.

    On any exception, Ctrl-C included, the temporary file is removed and an earlier file at
    ``path`` is as it was.

    Raises
    ------
    OutputError
        The folder is missing, read-only or full.
    """
    check_writable(path)
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        try:
            yield target
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {_reason(error)}") from error
        return
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {_reason(error)}") from error
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, _mode_for(target))
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {_reason(error)}; free space or choose another folder"
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _mode_for(target: Path) -> int:
    """The permissions of the file being replaced, or those a new file gets."""
    if target.exists():
        return stat.S_IMODE(target.stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path`` whole or not at all.

    Raises
    ------
    OutputError
        See :func:`atomic_path`.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        stream.write(data)


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file's bytes.

    Raises
    ------
    InputError
        The file cannot be read.
    """
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(_reason(error), source=path, remedy="give a readable file") from error


def read_text(path: str | os.PathLike[str]) -> str:
    """A UTF-8 text file.

    Raises
    ------
    InputError
        Missing, unreadable or not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(_reason(error), source=path, remedy="give a readable file") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"byte {error.start} is not UTF-8", source=path, expected="a UTF-8 text file"
        ) from error


def parse_json(text: str, source: object) -> Any:
    """JSON without duplicate keys, NaN or infinities (JSON has none of the three).

    Raises
    ------
    InputError
        Names line and column of a syntax error, or the duplicate key.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise InputError(
                    f"key {key!r} stands twice in one object",
                    source=source,
                    remedy="remove one of the two",
                )
            seen[key] = value
        return seen

    def no_constant(word: str) -> Any:
        raise InputError(f"{word} is not JSON", source=source, expected="finite numbers")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        raise InputError(
            f"not JSON: {error.msg}",
            source=source,
            place=f"line {error.lineno} column {error.colno}",
            remedy="the file may be cut short; write it again",
        ) from error
    except ValueError as error:  # an integer of thousands of digits
        raise InputError(f"not JSON: {error}", source=source) from error
    except RecursionError as error:
        raise InputError("nested too deeply", source=source, expected="one of our files") from error
