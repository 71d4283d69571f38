"""The tokens of an open trace file in batches: decoded from its rows, or kept in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.input_limits import MAX_BATCH_SELECTIONS, MAX_KEPT_BYTES
from prism_plan.io.trace_columns import StringCodes, column_values, list_items
from prism_plan.io.trace_file import TraceFile
from prism_plan.io.trace_schema import BATCH_ROWS, require_columns, token_schema
from prism_plan.model_spec import ModelSpec
from prism_plan.trace import PHASES, TokenBatch


def token_batches(
    file: TraceFile, model: ModelSpec, tasks: StringCodes, *, weights: bool = True
) -> Iterator[TokenBatch]:
    """Decode the tokens of a file; checks columns, empty values and phases, not the expert ids.

    Gate weights, where there are any, are decoded only with ``weights``.

    Raises
    ------
    InputError
        A column, an empty value or a phase is wrong; the file is damaged or was written to.
    """
    shape = (-1, model.num_layers, model.top_k)
    has_weights = "weights" in file.schema.names
    schema = token_schema(model, has_weights)
    require_columns(file.path, file.schema, schema)
    weights = weights and has_weights
    columns = [name for name in schema.names if weights or name != "weights"]
    phases = StringCodes(file.path)
    phase_codes = np.zeros(0, np.int8)
    for rows in file.record_batches(_batch_rows(model), columns):
        phase = phases.codes(rows.column("phase"))
        if len(phases.code_of) != len(phase_codes):
            phase_codes = _phase_codes(file.path, phases)
        gates = column_values(list_items(rows.column("weights"))) if weights else None
        yield TokenBatch(
            request=column_values(rows.column("request")),
            position=column_values(rows.column("position")),
            phase=phase_codes[phase],
            task=tasks.codes(rows.column("task")),
            experts=column_values(list_items(rows.column("experts"))).reshape(shape),
            weights=None if gates is None else gates.reshape(shape),
        )


def _batch_rows(model: ModelSpec) -> int:
    """Rows that are read at a time: fewer of a model with many selections a token."""
    width = model.num_layers * model.top_k
    return max(1, min(BATCH_ROWS, MAX_BATCH_SELECTIONS // width))


def _phase_codes(path: object, phases: StringCodes) -> npt.NDArray[np.int8]:
    """Codes into :data:`~prism_plan.trace.PHASES` of the words of a file's phases, int8 [words]."""
    for word in phases.words:
        if word not in PHASES:
            raise InputError(
                f"phase {word!r:.60}", source=path, expected=f"one of {', '.join(PHASES)}"
            )
    return np.array([PHASES.index(word) for word in phases.words], np.int8)


class KeptTokens:
    """All tokens of a trace in memory without their gate weights, in columns as narrow as can be.

    Parameters
    ----------
    model
        Gives the shape of the selections; ids of at most 256 experts take one byte each.
    rows
        How many tokens will be added.
    """

    def __init__(self, model: ModelSpec, rows: int) -> None:
        self._rows_at_a_time = _batch_rows(model)
        self._length = 0
        self._request = np.empty(rows, np.int32)
        self._position = np.empty(rows, np.int32)
        self._phase = np.empty(rows, np.int8)
        self._task = np.empty(rows, np.int16)  # there are at most MAX_NAMES tasks
        self._experts: npt.NDArray[Any] = np.empty(
            (rows, model.num_layers, model.top_k), _id_type(model)
        )

    @classmethod
    def of(cls, model: ModelSpec, rows: int) -> KeptTokens | None:
        """Room for so many tokens; ``None`` where it would take more than the bound on it."""
        width = model.num_layers * model.top_k * np.dtype(_id_type(model)).itemsize
        return cls(model, rows) if rows * (width + 11) <= MAX_KEPT_BYTES else None

    def add(self, batch: TokenBatch) -> None:
        """Append the tokens of a batch."""
        part = slice(self._length, self._length + len(batch))
        self._request[part] = batch.request
        self._position[part] = batch.position
        self._phase[part] = batch.phase
        self._task[part] = batch.task
        self._experts[part] = batch.experts
        self._length = part.stop

    def renumber_tasks(self, new_code: npt.NDArray[np.int64]) -> None:
        """Give task code c the code ``new_code[c]``."""
        if (new_code != np.arange(len(new_code))).any():
            self._task[:] = new_code[self._task]

    def batches(self) -> Iterator[TokenBatch]:
        """The tokens in order; the arrays are for reading only."""
        for start in range(0, self._length, self._rows_at_a_time):
            part = slice(start, min(start + self._rows_at_a_time, self._length))
            yield TokenBatch(
                request=self._request[part],
                position=self._position[part],
                phase=self._phase[part],
                task=self._task[part].astype(np.int32),
                experts=self._experts[part].astype(np.uint16, copy=False),
            )


def _id_type(model: ModelSpec) -> type[np.unsignedinteger[Any]]:
    return np.uint8 if model.num_experts <= 256 else np.uint16


class TokenSource:
    """Starts a pass over the tokens of a trace file at each call.

    Sent to another process, it reads the file there.

    Parameters
    ----------
    file
        The open file, which is decoded in each pass unless its tokens are kept.
    model
        The model of the trace.
    tasks
        Its tasks, in the order of their codes.
    weights
        Gate weights are decoded too.
    keep_tokens
        Keep the tokens of the first whole pass in memory where they are not too many.
    kept
        The tokens, where they have been kept already.
    """

    def __init__(
        self,
        file: TraceFile,
        model: ModelSpec,
        tasks: Sequence[str],
        *,
        weights: bool,
        keep_tokens: bool,
        kept: KeptTokens | None,
    ) -> None:
        self._file = file
        self._model = model
        self._tasks = tasks
        self._weights = weights
        self._keep_tokens = keep_tokens
        self._kept = kept

    def __call__(self) -> Iterator[TokenBatch]:
        """The tokens batch by batch.

        Raises
        ------
        InputError
            The file is damaged or was written to since it was opened.
        """
        if self._kept is not None:
            yield from self._kept.batches()
            return
        kept = KeptTokens.of(self._model, self._file.num_rows) if self._keep_tokens else None
        words = StringCodes(self._file.path, self._tasks)
        for batch in token_batches(self._file, self._model, words, weights=self._weights):
            if kept is not None:
                kept.add(batch)
            yield batch
        self._kept = kept

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}
