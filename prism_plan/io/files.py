"""Writing files whole or not at all, reading text with clear errors, and file identities."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prism_plan.errors import InputError, OutputError
from prism_plan.io.open_file import OpenFile
from prism_plan.limits import MAX_NESTING, MAX_TEXT_BYTES, MAX_VALUE_BYTES


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


def _is_special_file(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is there and is no regular file."""
    return os.path.exists(path) and not os.path.isfile(path)


def _make_temporary_file(target: Path) -> Path:
    """A new empty file beside ``target``; a long name is cut, for it must not become too long."""
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


def file_name_text(path: str | os.PathLike[str]) -> str:
    """A file's name as text that UTF-8 can hold."""
    return os.fsencode(os.path.basename(path)).decode("utf-8", "replace")


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file's bytes.

    Raises
    ------
    InputError
        The file cannot be read.
    """
    with OpenFile(path) as file:
        return file.sha256()


def read_text(path: str | os.PathLike[str]) -> str:
    """A UTF-8 text file, a byte order mark left out.

    Raises
    ------
    InputError
        Missing, unreadable, too long or not UTF-8 (UTF-16 and UTF-32 are named).
    """
    return decode(read_bytes(path), path)


def read_text_and_digest(path: str | os.PathLike[str]) -> tuple[str, str]:
    """The text of a file, as :func:`read_text`, and the hex SHA-256 of the bytes that it is of."""
    data = read_bytes(path)
    return decode(data, path), hashlib.sha256(data).hexdigest()


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """A file's bytes, at most :data:`~prism_plan.limits.MAX_TEXT_BYTES`.

    Raises
    ------
    InputError
        Missing, unreadable or too long.
    """
    with OpenFile(path) as file:
        return file.read()


#: How text of other encodings begins that Windows programs like to write.
_OTHER_MARKS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


#: How files begin that are given where text is read.
_BINARY_MARKS = (
    (b"PAR1", "a Parquet file, as traces are"),
    (b"PK\x03\x04", "a zip archive, as .npz and PyTorch files are"),
    (b"\x93NUMPY", "an array of NumPy"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "compressed by gzip"),
    (b"\x89PNG", "an image"),
    (b"%PDF", "a PDF file"),
)
#: How TOML begins, and JSON does not: a comment, a table, a key with a value.
_TOML = re.compile(r"""\s*(?:#|\[\[|\[[A-Za-z"]|[\w.-]+\s*=)""")


def require_utf8_mark(data: bytes, source: object) -> None:
    """Refuse a file whose first bytes say that it is UTF-16 or UTF-32.

    Raises
    ------
    InputError
        Names the encoding.
    """
    for mark, name in _OTHER_MARKS:
        if data.startswith(mark):
            raise InputError(
                f"text in {name}",
                source=source,
                expected="UTF-8",
                remedy=f"write it again as UTF-8 (iconv -f {name} -t UTF-8)",
            )


def decode(data: bytes, path: object) -> str:
    """The text of a UTF-8 file; see :func:`read_text`.

    In memory every character takes as much as the widest one, so that text beyond Latin-1 may be
    half as long, and text beyond the basic plane a quarter.
    """
    require_utf8_mark(data, path)
    if len(data) * 4 > MAX_TEXT_BYTES:
        width = next((width for width, first in _WIDE_CHARACTERS if first.search(data)), 1)
        if len(data) * width > MAX_TEXT_BYTES:
            raise InputError(
                f"{len(data):,} bytes of text with wide characters",
                source=path,
                expected=f"at most {MAX_TEXT_BYTES // width:,}",
            )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = next((kind for mark, kind in _BINARY_MARKS if data.startswith(mark)), None)
        raise InputError(
            f"byte {error.start} is not UTF-8" if kind is None else f"is {kind}",
            source=path,
            expected="a UTF-8 text file",
        ) from error


#: Bytes of a character in memory, and the bytes of UTF-8 that tell of one so wide.
_WIDE_CHARACTERS = ((4, re.compile(b"[\xf0-\xf4]")), (2, re.compile(b"[\xc4-\xef]")))


def iterate_lines(text: str) -> Iterator[str]:
    """The lines of a text one by one, without their line feeds; no list of them is made."""
    start = 0
    while (end := text.find("\n", start)) >= 0:
        yield text[start:end]
        start = end + 1
    if start < len(text):
        yield text[start:]


# ------------------------------------------------------------------------------------------- JSON

#: A half of a surrogate pair, which only an escape can spell in JSON.
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
#: Up to the next bracket that is not in a string. Possessive, and matched from bracket to bracket,
#: so that a text is passed over once.
_TO_BRACKET = re.compile(r'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+")*+([\[\]{}])', re.DOTALL)
#: Bytes of memory that each of these characters stands for at most, about.
_JSON_BYTES = {",": 32, ":": 120, "{": 240, "[": 72, '"': 20}


def _check_bounds(text: str, source: object) -> None:
    """Refuse JSON whose values would take too much memory, or that is nested too deeply.

    Linear in the text, which is not parsed: characters are counted, also those of strings.

    Raises
    ------
    InputError
        See :data:`~prism_plan.limits.MAX_VALUE_BYTES` and :data:`~prism_plan.limits.MAX_NESTING`.
    """
    if sum(text.count(word) * size for word, size in _JSON_BYTES.items()) > MAX_VALUE_BYTES:
        raise InputError(
            f"more values than {MAX_VALUE_BYTES:,} bytes of memory hold",
            source=source,
            expected="one of our files",
        )
    if text.count("[") + text.count("{") <= MAX_NESTING:
        return
    depth = position = 0
    while found := _TO_BRACKET.match(text, position):
        depth += 1 if found[1] in "[{" else -1
        position = found.end()
        if depth > MAX_NESTING:
            raise InputError(
                "nested too deeply", source=source, expected=f"at most {MAX_NESTING} levels"
            )


def _refuse_lone_surrogates(values: Any, source: object, place: str) -> None:
    if isinstance(values, dict):
        for key, value in values.items():
            _refuse_lone_surrogates(key, source, place)
            _refuse_lone_surrogates(value, source, f"{place}.{key}" if place else key)
    elif isinstance(values, list):
        for index, value in enumerate(values):
            _refuse_lone_surrogates(value, source, f"{place}[{index}]")
    elif isinstance(values, str) and _SURROGATE.search(values):
        raise InputError(
            f"{values!r:.60} has half a character",
            source=source,
            place=place,
            expected="text that UTF-8 can hold",
        )


class _NonFinite(str):
    """``NaN``, ``Infinity`` or ``-Infinity`` where a number should stand."""


def _find_non_finite(values: Any, key: str) -> tuple[str, str] | None:
    """The first of these words in ``values``, and the key under which it stands."""
    if isinstance(values, _NonFinite):
        return str(values), key
    inner: Iterable[tuple[str, Any]] = ()
    if isinstance(values, dict):
        inner = ((f"{key}.{name}" if key else name, value) for name, value in values.items())
    elif isinstance(values, list):
        inner = ((f"{key}[{index}]", value) for index, value in enumerate(values))
    return next(filter(None, (_find_non_finite(value, at) for at, value in inner)), None)


def parse_json(text: str, source: object, *, non_finite: bool = False) -> Any:
    """JSON without duplicate keys, NaN, infinities or lone surrogates (it has none of them).

    ``non_finite`` is for files of others: Python's ``json`` writes ``NaN``, ``Infinity`` and
    ``-Infinity``, and they are then read as the numbers that Python reads.

    Raises
    ------
    InputError
        Names line and column of a syntax error, or the key that is duplicate or not finite; or see
        :func:`_check_bounds`.
    """
    _check_bounds(text, source)

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

    refused: list[_NonFinite] = []

    def constant(word: str) -> Any:
        if non_finite:
            return float(word)
        refused.append(_NonFinite(word))
        return refused[-1]

    try:
        values = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
        if refused and (found := _find_non_finite(values, "")):
            raise InputError(
                f"{found[0]} is not JSON" + (f", under key {found[1]!r:.80}" if found[1] else ""),
                source=source,
                expected="finite numbers",
                remedy="write a number in its place",
            )
        if _ESCAPED_SURROGATE.search(text):
            _refuse_lone_surrogates(values, source, "")
        return values
    except json.JSONDecodeError as error:
        if _TOML.match(text):
            raise InputError("looks like TOML", source=source, expected="a JSON file") from error
        raise InputError(
            f"not JSON: {error.msg}",
            source=source,
            place=f"line {error.lineno} column {error.colno}",
            remedy="the file may be cut short; write it again",
        ) from error
    except ValueError as error:  # an integer of thousands of digits
        raise InputError(
            f"not JSON: a whole number of more than {sys.get_int_max_str_digits():,} digits",
            source=source,
            expected="numbers of fewer digits",
        ) from error
    except RecursionError as error:
        raise InputError("nested too deeply", source=source, expected="one of our files") from error
