r"""Text for messages, tables, figures and reports: printable, shortened, with counts and lists.

Names in a file are data and are kept as they are, also in the files that are written. Where text is
*displayed*, characters that control a terminal, reorder or hide their neighbours, or that XML does
not allow are written as escapes: ``\x1b``, ``\u202e``. All output passes through one of the two
functions here: messages of errors, tables, progress bars, titles and labels of figures through
:func:`printable`, JSON on standard output through :func:`printable_json`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

#: Names that are written out before "and n more", and characters of each.
MAX_LISTED, MAX_LISTED_LENGTH = 3, 40
#: Printable characters of ASCII: text of these alone is not examined character by character.
_PLAIN = re.compile(r"[\x20-\x7e]*")


def is_printable(character: str) -> bool:
    """Whether a character is displayed as itself, which spaces are and controls are not.

    Not printable are the Unicode categories of controls (C0, C1, DEL), formats (marks of direction,
    characters of no width, the byte order mark), separators of lines and paragraphs, lone
    surrogates, private use and what is not assigned.
    """
    return character.isprintable() or unicodedata.category(character) == "Zs"


def printable(text: object) -> str:
    """``text`` on one line; characters that would not be displayed become escapes of Python.

    Backslashes stay single, so that a text that has been escaped is not changed again.
    """
    plain = str(text)
    if _PLAIN.fullmatch(plain):
        return plain
    return "".join(c if is_printable(c) else c.encode("unicode_escape").decode() for c in plain)


def shown(value: object, max_length: int = 60) -> str:
    """The beginning of a value, with JSON's spelling of true, null, NaN and the like."""
    if value is None or isinstance(value, bool | float):
        import json  # here, for most texts need it not

        return json.dumps(value)
    try:
        return repr(value)[:max_length]
    except ValueError:  # Python does not print integers of more than 4300 digits
        return "a number of thousands of digits"


def quantity(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: ``"1 task"``, ``"2,000 tasks"``; ``plural`` where it needs more."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def shortened(name: str) -> str:
    """A name of bounded length for a message."""
    return name if len(name) <= MAX_LISTED_LENGTH else f"{name[: MAX_LISTED_LENGTH - 1]}…"


def listed(names: Iterable[str]) -> str:
    """Names for a message: the first :data:`MAX_LISTED`, and how many more there are."""
    short = [shortened(name) for name in names]
    more = len(short) - MAX_LISTED
    return ", ".join(short[:MAX_LISTED]) + (f" and {more:,} more" if more > 0 else "")


def printable_lines(text: str) -> str:
    """Like :func:`printable`, for a text of several lines, such as a traceback."""
    return "\n".join(map(printable, text.split("\n")))


def printable_json(text: str) -> str:
    """JSON text of the same values; characters that would not be displayed become escapes.

    Outside of its strings JSON has none but newlines and tabs, which stay; inside of them each
    becomes an escape of JSON, a backslash, u and four hexadecimal digits.
    """
    if _PLAIN.fullmatch(text):
        return text
    return "".join(c if c in "\n\r\t" or is_printable(c) else _json_escape(c) for c in text)


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))
