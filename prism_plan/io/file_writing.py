"""Writing files whole or not at all, and refusing early what cannot be written."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from prism_plan.errors import OutputError


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def require_writable(path: str | os.PathLike[str]) -> None:
    """Fail early, before long work, where ``path`` cannot be written.

    Raises
    ------
    OutputError
        The folder does not exist or cannot be written, or ``path`` is a folder.
    """
    try:
        if os.path.isdir(path):
            raise OutputError(f"{path}: is a folder; give the name of a file")
        if _is_special_file(path):
            return  # a device or a pipe: it is written in place
        target = Path(os.path.realpath(path))
        if not target.parent.is_dir():
            raise OutputError(f"{path}: folder {target.parent} does not exist; create it first")
        temporary = _make_temporary_file(target)
    except OSError as error:
        raise OutputError(f"{path}: cannot write: {_reason(error)}; choose another file") from error
    temporary.unlink()


def require_writable_folder(path: str | os.PathLike[str]) -> None:
    """Make a folder where there is none; fail early where no file can be written to it.

    Raises
    ------
    OutputError
        It is something else, or cannot be made or written.
    """
    try:
        os.makedirs(path, exist_ok=True)
        _make_temporary_file(Path(path) / "placement").unlink()
    except OSError as error:
        raise OutputError(
            f"{path}: cannot write to this folder: {_reason(error)}; choose another one"
        ) from error


def _is_special_file(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` exists and is not a regular file, but a pipe or a device."""
    return os.path.exists(path) and not os.path.isfile(path)


def _make_temporary_file(target: Path) -> Path:
    """A new empty file beside ``target``; a long name is cut, for it must not become too long."""
    import tempfile  # here, for `--help` needs it not

    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:40]}.")
    os.close(handle)
    return Path(name)


def require_not_an_input(
    output: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]]
) -> None:
    """Refuse to write over a file that is being read.

    Raises
    ------
    OutputError
        ``output`` is one of the ``inputs``, or a file of a folder that is one.
    """
    target = os.path.realpath(output)
    for path in inputs:
        if not os.fspath(path):
            continue  # no name of a file, as its reader will say; not the current folder
        source = os.path.realpath(path)
        inside = os.path.isdir(source) and target.startswith(source + os.sep)
        if os.path.isfile(target) and (source == target or inside):
            raise OutputError(f"{output}: is also read; give the name of another file")


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
    require_writable(path)
    if _is_special_file(path):
        try:
            yield Path(path)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {_reason(error)}") from error
        return
    target = Path(os.path.realpath(path))
    try:
        temporary = _make_temporary_file(target)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {_reason(error)}") from error
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
