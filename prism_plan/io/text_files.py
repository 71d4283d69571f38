"""Reading UTF-8 text files, with clear errors for files of other encodings and kinds."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator

from prism_plan.errors import InputError
from prism_plan.input_limits import MAX_TEXT_BYTES
from prism_plan.io.open_file import OpenFile


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
    """The text of a file, as :func:`read_text`, and the hex SHA-256 of its bytes."""
    data = read_bytes(path)
    return decode(data, path), hashlib.sha256(data).hexdigest()


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """A file's bytes, at most :data:`~prism_plan.input_limits.MAX_TEXT_BYTES`.

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


def require_not_utf16(data: bytes, source: object) -> None:
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
    """Decode the bytes of a UTF-8 file; see :func:`read_text`.

    In memory every character takes as much as the widest one, so that text beyond Latin-1 may be
    half as long, and text beyond the basic plane a quarter.
    """
    require_not_utf16(data, path)
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


#: Bytes of a character in memory, and the bytes of UTF-8 that begin one so wide.
_WIDE_CHARACTERS = ((4, re.compile(b"[\xf0-\xf4]")), (2, re.compile(b"[\xc4-\xef]")))


def iterate_lines(text: str) -> Iterator[str]:
    """The lines of a text one by one, without their line feeds; no list of them is made."""
    start = 0
    while (end := text.find("\n", start)) >= 0:
        yield text[start:end]
        start = end + 1
    if start < len(text):
        yield text[start:]
