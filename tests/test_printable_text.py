"""Text made printable: nothing steers a terminal, nothing is escaped twice, JSON stays exact."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_plan.errors import InputError, PrismError
from prism_plan.printable_text import is_printable, printable, printable_json, printable_lines

ANY_TEXT = st.text(st.characters(exclude_categories=()))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mRED\x1b]0;owned\x07", r"\x1b[31mRED\x1b]0;owned\x07"),
        ("\x7f\x85\x9b31m", r"\x7f\x85\x9b31m"),
        ("a\u202eb\u2066c", r"a\u202eb\u2066c"),
        ("a\u200bb\u2060\ufeff", r"a\u200bb\u2060\ufeff"),
        ("a\u2028b\u2029", r"a\u2028b\u2029"),
        ("a\nb\rc\td", r"a\nb\rc\td"),
        ("\ud800\udcff", r"\ud800\udcff"),
        ("\ufffe\U000e0041", r"\ufffe\U000e0041"),
        ("[red]x[/] <b> $x$ \\x1b é 日本 ü\xa0", "[red]x[/] <b> $x$ \\x1b é 日本 ü\xa0"),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    """Controls, marks of direction, widthless characters and surrogates become escapes."""
    assert printable(text) == shown


@given(ANY_TEXT)
def test_printable_is_printable_once_and_for_all(text: str) -> None:
    """All characters of the result are printable, and it is not changed again."""
    shown = printable(text)
    assert all(map(is_printable, shown))
    assert printable(shown) == shown
    assert "\n".join(map(printable, text.split("\n"))) == printable_lines(text)


@given(st.dictionaries(ANY_TEXT, ANY_TEXT | st.integers()))
def test_json_on_a_terminal_has_the_same_values(values: dict[str, object]) -> None:
    """Escaped JSON is read as the values that it was made of, keys too."""
    text = json.dumps(values, indent=1, ensure_ascii=False)
    shown = printable_json(text)
    assert json.loads(shown) == json.loads(text)
    assert all(c == "\n" or is_printable(c) for c in shown)


def test_errors_are_printable_where_they_are_made() -> None:
    """A message is one printable line; its parts stay exact for callers."""
    error = InputError("\x1b[2J", source="a\u202eb.toml", place="server\x85")
    assert str(error) == r"a\u202eb.toml: server : \x1b[2J"
    assert (error.found, error.source) == ("\x1b[2J", "a\u202eb.toml")
    assert str(error.within("other")) == str(error)
    assert len(str(PrismError("\x1b" * 10_000))) < 400
