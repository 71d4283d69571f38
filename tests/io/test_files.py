"""Tests of files written whole or not at all, of text and JSON, and of file identities."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.errors import InputError, OutputError
from prism_plan.io.file_writing import atomic_path, require_writable, write_bytes
from prism_plan.io.json import parse_json
from prism_plan.io.open_file import OpenFile
from prism_plan.io.text_files import read_text, sha256


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A file with content that is there before the test writes."""
    path = tmp_path / "result.json"
    path.write_bytes(b"old")
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_half(path: Path, error: BaseException) -> None:
    """Fail in the middle of writing."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise error


def serve(pipe: Path, *, read: bool) -> tuple[threading.Thread, list[bytes]]:
    """Open a named pipe for reading in a thread; read all of it, or close it at once."""
    got: list[bytes] = []

    def run() -> None:
        with open(pipe, "rb") as stream:
            if read:
                got.append(stream.read())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, got


# --------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("data", [b"", b"new", bytes(range(256)) * 5000])
def test_writes_the_bytes(tmp_path: Path, data: bytes) -> None:
    """What is written is what was given, and nothing else appears in the folder."""
    write_bytes(tmp_path / "a", data)
    assert (tmp_path / "a").read_bytes() == data
    assert names(tmp_path) == ["a"]


def test_old_content_stands_until_the_end(old: Path) -> None:
    """While the new content is being written, readers see the old; afterwards the new."""
    with atomic_path(old) as temporary:
        temporary.write_bytes(b"half of the n")
        assert old.read_bytes() == b"old"
        temporary.write_bytes(b"new")
        assert temporary.parent == old.parent
    assert old.read_bytes() == b"new"
    assert names(old.parent) == ["result.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, InputError])
def test_error_leaves_old_content(old: Path, error: type[BaseException]) -> None:
    """An error or Ctrl-C in the block passes through; the old file stands, no file is left."""
    with pytest.raises(error, match="stop"):
        write_half(old, error("stop"))
    assert old.read_bytes() == b"old"
    assert names(old.parent) == ["result.json"]


def test_error_leaves_nothing_new(tmp_path: Path) -> None:
    """Where there was no file, an error leaves none."""
    with pytest.raises(RuntimeError):
        write_half(tmp_path / "a", RuntimeError())
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_full_disk(old: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """A fault of the disk at the last moment is an output error; the old file stands."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OutputError, match=r"result\.json: cannot be written: no space left"):
        write_bytes(old, b"new")
    monkeypatch.undo()
    assert old.read_bytes() == b"old"
    assert names(old.parent) == ["result.json"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755, 0o666])
def test_permissions_are_kept(old: Path, mode: int) -> None:
    """A replaced file keeps its permissions."""
    old.chmod(mode)
    write_bytes(old, b"new")
    assert stat.S_IMODE(old.stat().st_mode) == mode
    assert old.read_bytes() == b"new"


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """The process umask, set for the test."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_new_file_follows_the_umask(tmp_path: Path, umask: int) -> None:
    """A new file gets the permissions that ``open`` would give it, not those of a secret."""
    write_bytes(tmp_path / "ours", b"")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_links_are_followed(tmp_path: Path, relative: bool, exists: bool) -> None:
    """Writing to a link changes the file it points to, even in another folder; it stays a link."""
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "target", tmp_path / "link"
    if exists:
        target.write_bytes(b"old")
    link.symlink_to(Path("far") / "target" if relative else target)
    write_bytes(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert not target.is_symlink()
    assert names(tmp_path) == ["far", "link"]
    assert names(tmp_path / "far") == ["target"]


def test_null_device() -> None:
    """The null device takes output and is still a device afterwards."""
    require_writable("/dev/null")
    write_bytes("/dev/null", b"x" * 100)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_named_pipe(tmp_path: Path) -> None:
    """A named pipe is written in place."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader, got = serve(pipe, read=True)
    write_bytes(pipe, b"data")
    reader.join(10)
    assert got == [b"data"]
    assert pipe.is_fifo()


def test_broken_pipe(tmp_path: Path) -> None:
    """A pipe whose reader has gone is an output error, and is still there."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader, _ = serve(pipe, read=False)
    with pytest.raises(OutputError, match="pipe: cannot be written: broken pipe"):
        write_bytes(pipe, b"x" * 10**6)  # more than a pipe holds
    reader.join(10)
    assert pipe.is_fifo()


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no /dev/fd here")
def test_open_pipe() -> None:
    """An open pipe, as the shell's ``>(command)`` and ``/dev/stdout`` name it, is written."""
    read_end, write_end = os.pipe()
    try:
        write_bytes(f"/dev/fd/{write_end}", b"data")
        os.close(write_end)
        write_end = -1
        assert os.read(read_end, 10) == b"data"
    finally:
        os.close(read_end)
        if write_end >= 0:
            os.close(write_end)


def test_long_name(tmp_path: Path) -> None:
    """Any name that the file system takes can be written."""
    path = tmp_path / ("n" * 255)
    path.write_bytes(b"old")  # the file system takes it
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


def test_folder_and_missing_folder(tmp_path: Path) -> None:
    """A folder as a target, or in no folder at all, is told before any work."""
    for check in (require_writable, lambda path: write_bytes(path, b"")):
        with pytest.raises(OutputError, match="is a folder"):
            check(tmp_path)
        with pytest.raises(OutputError, match="gone does not exist"):
            check(tmp_path / "gone" / "a")
    assert names(tmp_path) == []


def test_check_writable_changes_nothing(old: Path) -> None:
    """The early check neither creates a file nor touches one."""
    before = old.stat()
    require_writable(old)
    require_writable(old.parent / "new")
    assert names(old.parent) == ["result.json"]
    assert (old.stat().st_mtime_ns, old.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


# --------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("size", [0, 1, 1_000_000])
def test_sha256(tmp_path: Path, size: int) -> None:
    """The identity of a file is the SHA-256 of its bytes."""
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_read_text(tmp_path: Path) -> None:
    """Text is UTF-8 with its line ends as they are; the first byte that is not is named."""
    path = tmp_path / "a"
    path.write_bytes("Größe\r\n×\n".encode())
    assert read_text(path) == "Größe\r\n×\n"
    path.write_bytes(b"abc\xff")
    with pytest.raises(InputError, match="byte 3 is not UTF-8"):
        read_text(path)


@pytest.mark.parametrize("read", [read_text, sha256])
def test_unreadable(tmp_path: Path, read: object) -> None:
    """A missing file and a folder are input errors that name the path."""
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(InputError) as caught:
            read(path)  # type: ignore[operator]
        assert caught.value.source == str(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(JSON)
@settings(max_examples=60)
def test_json_values(value: object) -> None:
    """Every JSON value comes back as it was."""
    assert parse_json(json.dumps(value), "f") == value


@given(JSON, st.data())
@settings(max_examples=60)
def test_json_cut_short(value: object, data: st.DataObject) -> None:
    """An object cut anywhere is refused, never read in part."""
    text = json.dumps({"a": value})
    cut = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(InputError, match="not JSON"):
        parse_json(text[:cut], "f")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 1}', "f: key 'a' is duplicated"),
        ('[{"b": {"c": 1, "d": 2, "c": 3}}]', "f: key 'c' is duplicated"),
        ('{"a": 1, "\\u0061": 2}', "f: key 'a' is duplicated"),
        ("[NaN]", "f: NaN is not JSON"),
        ('{"a": -Infinity}', "f: -Infinity is not JSON, under key 'a'"),
        ('{"a": [1, {"b": [0, NaN]}]}', "f: NaN is not JSON, under key 'a[1].b[1]'"),
        ('{"a":\n  tru}', "f: line 2 column 3: not JSON"),
        ("9" * 5000, "f: not JSON"),
        ("[" * 200_000, "f: nested too deeply"),
    ],
    ids=[
        "twice",
        "twice-deep",
        "twice-escaped",
        "nan",
        "infinity",
        "nan-deep",
        "syntax",
        "digits",
        "deep",
    ],
)
def test_json_refused(text: str, message: str) -> None:
    """Duplicate keys, NaN, infinities and broken text are refused, with the place."""
    with pytest.raises(InputError) as caught:
        parse_json(text, "f")
    assert str(caught.value).startswith(message)


def test_same_key_in_different_objects() -> None:
    """One key in two objects is no duplicate."""
    assert parse_json('{"a": {"a": 1}, "b": [{"a": 2}, {"a": 3}]}', "f") == {
        "a": {"a": 1},
        "b": [{"a": 2}, {"a": 3}],
    }


def test_a_file_sent_to_another_folder_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker process in another folder opens the file that a relative name meant."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "elsewhere" / "a.txt").write_text("two")
    monkeypatch.chdir(tmp_path)
    with OpenFile("a.txt") as file:
        sent = pickle.dumps(file)
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pickle.loads(sent) as received:
        assert received.read() == b"one"
        assert received.path == "a.txt"
