"""The secret of a run, which everybody who takes part in it knows."""

from __future__ import annotations

import os
import shlex
import stat
from dataclasses import dataclass, field

from prism_plan.errors import InputError

#: Bytes of a secret, without white space at its ends.
MIN_BYTES, MAX_BYTES = 16, 4096


@dataclass(frozen=True)
class RunSecret:
    """The key of a run's handshakes; without one (``given`` False) everybody may take part."""

    key: bytes = field(repr=False)
    given: bool


NO_SECRET = RunSecret(b"", given=False)


def read_secret(path: str | os.PathLike[str]) -> RunSecret:
    """Read a secret from a file.

    Raises
    ------
    InputError
        The file cannot be read, is no regular file, is too short or too long, or other users may
        read it.
    """
    remedy = (
        f"make one: (umask 077; head -c 32 /dev/urandom | base64 > {shlex.quote(str(path)):.200})"
    )
    try:
        with open(path, "rb", opener=_open_without_waiting) as stream:
            mode = os.fstat(stream.fileno()).st_mode
            raw = stream.read(MAX_BYTES + 65) if stat.S_ISREG(mode) else b""
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(reason, source=path, expected="a secret file", remedy=remedy) from error
    if not stat.S_ISREG(mode):  # processes that are started again read it again
        raise InputError("no regular file", source=path, expected="a secret file", remedy=remedy)
    if mode & 0o077:
        raise InputError(
            f"mode {stat.S_IMODE(mode):03o}: other users may read it",
            source=path,
            expected="mode 600 or 400",
            remedy="chmod 600 it, or make a new one if others may have read it",
        )
    key = raw.strip()
    if not MIN_BYTES <= len(key) <= MAX_BYTES:
        found = f"{len(key):,} bytes" if len(key) <= MAX_BYTES else f"more than {MAX_BYTES:,} bytes"
        raise InputError(
            found, source=path, expected=f"{MIN_BYTES} to {MAX_BYTES:,} bytes", remedy=remedy
        )
    return RunSecret(key, given=True)


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe that nobody writes to would else never be open."""
    return os.open(path, flags | os.O_NONBLOCK)
