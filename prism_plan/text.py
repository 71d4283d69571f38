r"""Text of files and libraries made printable, for terminals, figures and reports.

Names in a file are data and are kept as they are, also in the files that we write. Where a text is
*shown*, characters that steer a terminal, reorder or hide what stands beside them, or that XML does
not allow are written as escapes: ``\x1b``, ``\u202e``. Every text leaves through one of the two
functions here: messages of errors, tables, progress bars, titles and labels of figures through
:func:`printable`, JSON on standard output through :func:`printable_json`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable

#: Newline, carriage return and tab have names that everybody knows; the others get their number.
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
#: Names that are written out before "and n more", and characters of each.
MAX_LISTED, MAX_LISTED_LENGTH = 3, 40
#: Printable characters of ASCII: text of these alone is not examined character by character.
_PLAIN = re.compile(r"[\x20-\x7e]*")


def is_printable(character: str) -> bool:
    """Whether a character shows as itself: spaces of all kinds do, controls of no kind.

    Not printable are the Unicode categories of controls (C0, C1, DEL), formats (marks of direction,
    characters of no width, the byte order mark), separators of lines and paragraphs, lone
    surrogates, private use and what is not assigned.
    """
    return character.isprintable() or unicodedata.category(character) == "Zs"


def printable(text: object) -> str:
    """``text`` on one line, with what does not show as itself as an escape of Python.

    Backslashes stay single, so that a text that has been escaped is not changed again.
    """
    plain = str(text)
    if _PLAIN.fullmatch(plain):
        return plain
    return "".join(c if is_printable(c) else _escape(c) for c in plain)


def shown(value: object, max_length: int = 60) -> str:
    """The beginning of a value of a JSON file: true, null, NaN and the like as it spells them."""
    if value is None or isinstance(value, bool | float):
        return json.dumps(value)
    try:
        return repr(value)[:max_length]
    except ValueError:  # Python does not print integers of more than 4300 digits
        return "a number of thousands of digits"


def quantity(number: int, noun: str) -> str:
    """A number with its noun: ``"1 task"``, ``"2,000 tasks"``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def shortened(name: str) -> str:
    """A name of bounded length for a message."""
    return name if len(name) <= MAX_LISTED_LENGTH else f"{name[: MAX_LISTED_LENGTH - 1]}…"


def listed(names: Iterable[str]) -> str:
    """Names for a message: the first :data:`MAX_LISTED`, and how many more there are."""
    short = [shortened(name) for name in names]
    more = len(short) - MAX_LISTED
    return ", ".join(short[:MAX_LISTED]) + (f" and {more:,} more" if more > 0 else "")


def printable_lines(text: str) -> str:
    """The same for a text of several lines, such as a traceback: newlines stay."""
    return "\n".join(map(printable, text.split("\n")))


def printable_json(text: str) -> str:
    r"""JSON text of the same values without characters that do not show as themselves.

    Outside of its strings JSON has none but newlines and tabs, which stay; inside of them each is
    written as the escape ``\uXXXX`` of JSON.
    """
    if _PLAIN.fullmatch(text):
        return text
    return "".join(c if c in "\n\r\t" or is_printable(c) else _json_escape(c) for c in text)


def _escape(character: str) -> str:
    named = _NAMED.get(character)
    if named is not None:
        return named
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))
