"""Columns of a trace file as arrays: numbers and dictionary-encoded texts, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.input_limits import MAX_NAME_LENGTH, MAX_NAMES, require_at_most, require_name


def require_no_nulls(path: object, batch: Any, first_row: int) -> None:
    """Refuse a record batch, whose first row is ``first_row`` of the file, with an empty value.

    Raises
    ------
    InputError
        Names the column and the rows.
    """
    import pyarrow as pa

    for index, column in enumerate(batch.columns):
        lists = isinstance(column, pa.FixedSizeListArray)
        if column.null_count or (lists and list_items(column).null_count):
            raise InputError(
                f"column {batch.schema.names[index]!r} has an empty value",
                source=path,
                place=f"rows {first_row}..{first_row + len(batch) - 1}",
                expected="a value in every row",
            )


def list_items(column: Any) -> Any:
    """The items of a column of lists of one length, none of which is null, as one column.

    Unlike ``column.flatten()`` this does not make pyarrow import its functions.
    """
    width = column.type.list_size
    return column.values.slice(column.offset * width, len(column) * width)


def column_values(column: Any) -> npt.NDArray[Any]:
    """The numbers of a column without nulls, not copied.

    Unlike ``column.to_numpy()`` this does not make pyarrow import pandas, which takes longer than
    most traces.
    """
    values: npt.NDArray[Any] = np.from_dlpack(column)
    return values


class StringCodes:
    """Codes for the words of a dictionary column, in the order of the file's dictionaries."""

    def __init__(self, path: object, words: Sequence[str] = ()) -> None:
        self.path = path
        self.code_of = {word: code for code, word in enumerate(words)}
        self._dictionary: Any = None
        self._mapping = np.zeros(1, np.int32)

    @property
    def words(self) -> list[str]:
        """All words so far, by code."""
        return list(self.code_of)

    def codes(self, column: Any) -> npt.NDArray[np.int32]:
        """Codes int32 [rows] of a column, whose new words are added.

        Raises
        ------
        InputError
            An empty word, a name too long, more words than tasks may be, or a damaged column.
        """
        local = column.dictionary
        if self._dictionary is None or not local.equals(self._dictionary):
            self._mapping = self._add_words(local)
            self._dictionary = local
        indices = column_values(column.indices)
        unsigned = indices.view(f"u{indices.itemsize}")  # codes below 0 are far too large there
        if len(indices) and unsigned.max() >= len(local):
            raise InputError(
                f"code {indices.max()} in a dictionary of {len(local)} words",
                source=self.path,
                remedy="the file is damaged; write it again",
            )
        codes: npt.NDArray[np.int32] = self._mapping[indices]
        return codes

    def _add_words(self, dictionary: Any) -> npt.NDArray[np.int32]:
        """Codes of all words of one dictionary, used or not, so that tasks keep their order."""
        what = "words in a column of tasks or phases"
        require_at_most(len(dictionary), MAX_NAMES, what, source=self.path)
        if dictionary.nbytes > MAX_NAMES * (MAX_NAME_LENGTH + 8):
            raise InputError(f"{dictionary.nbytes:,} bytes of names of tasks", source=self.path)
        mapping = np.zeros(max(len(dictionary), 1), np.int32)
        for index, word in enumerate(dictionary.to_pylist()):
            if not word or not word.strip():
                raise InputError("empty task or phase", source=self.path, expected="a word")
            require_name(word, source=self.path, place="task")
            mapping[index] = self.code_of.setdefault(word, len(self.code_of))
        require_at_most(len(self.code_of), MAX_NAMES, what, source=self.path)
        return mapping
