"""Every error that prism-plan raises on purpose.

::

    PrismError                 exit code
    ├── InputError             2   a file or a parameter is wrong
    │   └── WrongModel         2   two files are of different models
    ├── UnsupportedFeature     2   the solver does not support what is required
    ├── OutputError            2   a result cannot be written to its destination
    ├── Infeasible             3   no placement can exist: which constraint, by how much
    └── LimitReached           4   a limit ended the search before a placement was found
    any other exception       70   an internal error, see :mod:`prism_plan.cli.internal_errors`

The message of each is one printable line. The command line prints it and exits with the exit code;
nothing else in the package prints or exits.

Messages name parameters as Python knows them, between double backquotes::

    raise LimitReached("out of memory; lower ``batch_size``")

``str(error)`` leaves the backquotes out. The command line renders messages by
:meth:`PrismError.line` and puts its own options there: "out of memory; lower --batch-size".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from prism_plan.printable_text import printable

#: A parameter in a message.
_PARAMETER = re.compile("``([a-z][a-z0-9_]*)``")
#: The ending of the first word of a unit, ``"slots"`` or ``"experts at least"``.
_PLURAL = re.compile(r"s\b")


class PrismError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 2

    #: The message as it was written: longer and with parameters between double backquotes.
    message: str

    #: Longer messages are cut in the middle: a value of a broken file can be of any length.
    MAX_LENGTH = 380

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(self.line({}))

    def line(self, names: Mapping[str, str]) -> str:
        """The message in one printable line, with parameters called by their ``names``, if any."""
        text = _PARAMETER.sub(lambda found: names.get(found[1], found[1]), self.message)
        line = printable(" ".join(text.split()))
        if len(line) > self.MAX_LENGTH:
            line = f"{line[: self.MAX_LENGTH // 2]} … {line[-self.MAX_LENGTH // 2 + 3 :]}"
        return line


class InputError(PrismError):
    """A file or a parameter is wrong.

    The parts of the message are the ``source`` (a file) or the name of the ``parameter``, the
    ``place`` in it, what was ``found``, what was ``expected`` and the ``remedy``.
    """

    def __init__(
        self,
        found: str,
        *,
        source: object = "",
        parameter: str = "",
        place: str = "",
        expected: str = "",
        remedy: str = "",
    ) -> None:
        self.source = str(source)
        self.parameter = parameter
        self.place = place
        self.found = found
        self.expected = expected
        self.remedy = remedy
        named = f"``{parameter}``" if parameter else ""
        where = ": ".join(part for part in (self.source, named, place) if part)
        text = f"{where}: {found}" if where else found
        if expected:
            text += f"; expected {expected}"
        if remedy:
            text += f"; {remedy}"
        super().__init__(text)

    def within(self, source: object = "", *, parameter: str = "") -> InputError:
        """The same error with a file or parameter as its origin, if it has none yet."""
        if self.source or self.parameter:
            return self
        parts = {key: getattr(self, key) for key in ("place", "expected", "remedy")}
        return type(self)(self.found, source=source, parameter=parameter, **parts)


class WrongModel(InputError):
    """Two files are of different models."""


class UnsupportedFeature(PrismError):
    """The solver does not support what is required; the message names solvers that do."""


class OutputError(PrismError):
    """A result cannot be written to its destination."""


class Infeasible(PrismError):
    """No placement satisfies the constraints.

    Attributes
    ----------
    constraint : str
        Which constraint (or set of constraints) cannot be met.
    shortfall : int
        By how much, in ``unit``.
    unit : str
        ``"slots"``, ``"servers"`` or ``"bytes"``.
    source : str
        The file whose constraint it is, where known.
    """

    exit_code = 3

    def __init__(
        self, constraint: str, *, shortfall: int, unit: str, remedy: str = "", source: object = ""
    ) -> None:
        self.constraint = constraint
        self.shortfall = shortfall
        self.unit = unit
        self.remedy = remedy
        self.source = str(source)
        where = f"{source}: " if self.source else ""
        lacking = f"{shortfall:,} {unit}" if shortfall != 1 else f"1 {_PLURAL.sub('', unit, 1)}"
        text = f"{where}infeasible: {constraint}; short by {lacking}"
        if remedy:
            text += f"; {remedy}"
        super().__init__(text)

    def within(self, source: object) -> Infeasible:
        """The same error with a file as its origin, if it has none yet."""
        if self.source:
            return self
        parts = {key: getattr(self, key) for key in ("shortfall", "unit", "remedy")}
        return Infeasible(self.constraint, source=source, **parts)


class LimitReached(PrismError):
    """A time or memory limit ended the search before any placement was found."""

    exit_code = 4


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` for the closest of the ``known`` words, or nothing."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
