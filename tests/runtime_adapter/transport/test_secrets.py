"""A secret comes from a file that its owner alone can read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prism_plan.errors import InputError
from runtime_adapter.transport.secrets import NO_SECRET, RunSecret, read_secret


def written(folder: Path, text: bytes, mode: int = 0o600) -> Path:
    path = folder / "secret"
    path.write_bytes(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("mode", [0o600, 0o400])
@pytest.mark.parametrize("size", [16, 33, 4096])
def test_white_space_around_it_does_not_count(tmp_path: Path, size: int, mode: int) -> None:
    """An editor's newline makes no other secret; bytes of any value may be in it."""
    key = bytes(range(128, 256)) * 32
    path = written(tmp_path, b"\n " + key[:size] + b"\r\n", mode)
    assert read_secret(path) == RunSecret(key[:size], given=True)
    assert read_secret(str(path)).given


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"", "0 bytes"),
        (b"x" * 15 + b"\n" * 10, "15 bytes"),
        (b"x" * 4097, "more than 4,096 bytes"),
        (b"x" * 5_000_000, "more than 4,096 bytes"),
    ],
)
def test_one_of_another_length_is_refused(tmp_path: Path, text: bytes, found: str) -> None:
    """Too few bytes can be guessed; too many are not a secret's."""
    with pytest.raises(InputError, match=found) as error:
        read_secret(written(tmp_path, text))
    assert "16 to 4,096 bytes" in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o620, 0o601, 0o660, 0o777])
def test_rights_of_others_are_refused(tmp_path: Path, mode: int) -> None:
    """Whoever else may read, write or run the file; the message says how to mend it."""
    with pytest.raises(InputError, match=f"mode {mode:03o}.*chmod 600"):
        read_secret(written(tmp_path, b"x" * 32, mode))


def test_files_that_are_not_there_or_no_files(tmp_path: Path) -> None:
    """They are named, in one line."""
    with pytest.raises(InputError, match="none: no such file"):
        read_secret(tmp_path / "none")
    with pytest.raises(InputError, match="is a directory"):
        read_secret(tmp_path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(InputError, match="no regular file"):  # and does not wait for a writer
        read_secret(tmp_path / "pipe")


def test_nobody_sees_the_key_in_messages() -> None:
    """The text of a secret does not have it, nor is no secret a given one."""
    key = os.urandom(20).hex().encode()
    assert key.decode() not in repr(RunSecret(key, given=True))
    assert not NO_SECRET.given
