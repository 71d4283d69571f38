"""Bad rows of large recordings, which may be left out one by one if the user says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from prism_plan.errors import InputError

#: Bad rows of a file that are described with their places; further ones are only counted.
NUM_EXAMPLES = 3


@dataclass
class _FileRows:
    """What was found in a file: good rows, bad rows, and the errors of the first bad ones."""

    good: int = 0
    bad: int = 0
    errors: list[InputError] = field(default_factory=list)


@dataclass
class BadRows:
    """Rows that a reader refuses: each ends the reading, or is counted where ``skip`` is set.

    A row is a line, a response or a request, whatever is refused as a whole. Errors of the file or
    of the model are no matter of rows and are raised as they are.
    """

    skip: bool = False
    files: dict[Path, _FileRows] = field(default_factory=dict)

    def skip_or_raise(self, path: Path, error: InputError) -> None:
        """Count a bad row of a file.

        Raises
        ------
        InputError
            The ``error``, unless bad rows are to be left out.
        """
        if not self.skip:
            raise error
        found = self._of(path)
        found.bad += 1
        if len(found.errors) < NUM_EXAMPLES:
            found.errors.append(error)

    def count_good(self, path: Path, rows: int = 1) -> None:
        """Count good rows of a file."""
        self._of(path).good += rows

    def _of(self, path: Path) -> _FileRows:
        return self.files.setdefault(path, _FileRows())

    @property
    def number(self) -> int:
        """Rows that were left out, of all files together."""
        return sum(found.bad for found in self.files.values())

    def require_good(self) -> None:
        """Refuse files of which no row is good: they are of another kind or of another model.

        Raises
        ------
        InputError
            The error of the first bad row, and that all are bad.
        """
        for path, found in self.files.items():
            if found.bad and not found.good:
                first = found.errors[0]
                raise InputError(
                    f"no row is good ({found.bad:,} bad), the first one: {first.found}",
                    source=first.source or path,
                    place=first.place,
                    expected=first.expected,
                    remedy=first.remedy,
                )

    def report(self, notify: Callable[[str], None]) -> None:
        """Log for each file how many bad rows it has, and what is wrong with the first ones."""
        for path, found in self.files.items():
            if found.bad:
                reasons = "; ".join(_reason(error, path) for error in found.errors)
                rest = found.bad - len(found.errors)
                more = f"; and {rest:,} more" if rest else ""
                notify(
                    f"{path}: left out bad rows: {found.bad:,} of {found.bad + found.good:,} "
                    f"({reasons}{more})"
                )

    def provenance(self) -> dict[str, int]:
        """How many rows were left out, where there are any."""
        return {"bad_rows_left_out": self.number} if self.number else {}


def _reason(error: InputError, path: Path) -> str:
    """Where a bad row stands, in which file if ``path`` is a folder, and what is wrong."""
    name = "" if error.source == str(path) else f"{Path(error.source).name} "
    return f"{name}{error.place}: {error.found}"


def rows_cannot_be_skipped(path: Path) -> InputError:
    """The error of a file whose rows cannot be left out one by one."""
    return InputError(
        "sums, which have no rows that could be left out",
        source=path,
        parameter="skip_bad",
        expected="responses, selections, tables or expert scores",
        remedy="leave ``skip_bad`` out, and record again what cannot be read",
    )
