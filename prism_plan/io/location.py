"""Where in a file something stands, for errors."""

from __future__ import annotations

from typing import NamedTuple

from prism_plan.errors import InputError


class Location(NamedTuple):
    """What an error is about: a file or other source, and the line, record or layer in it."""

    source: object
    place: str = ""

    def within(self, part: str) -> Location:
        """A part of what stands here."""
        return Location(self.source, f"{self.place} {part}".strip())

    def error(self, found: str, expected: str = "", remedy: str = "") -> InputError:
        """The error for what was found here."""
        return InputError(
            found, source=self.source, place=self.place, expected=expected, remedy=remedy
        )

    def __str__(self) -> str:
        return f"{self.source} {self.place}".strip()
