"""Selections one by one: JSON Lines of one request, token and layer each.

Hooks on routers write such files, for example patches of vLLM with ``VLLM_LOG_MOE``::

    {"type": "meta", "model_id": "Qwen/Qwen1.5-MoE-A2.7B-Chat", "top_k": 4}
    {"type": "route", "req_id": "r1", "token_idx": 0, "layer": 0, "topk_ids": [7, 2, 40, 11]}

Each line has four things, under one of several names (``NAMES`` of
:mod:`prism_plan.profiling.selection_lines`): the request, a text or a whole number; the token, its
position in the request; the decoder layer; and K logical expert ids. ``phase`` ("prefill",
"decode" or "unknown") and ``task`` may be there, all other keys (gate weights, dates) are passed
over, and lines of ``"type": "meta"`` but for their ``top_k``.

Every token has one line for each MoE layer, and a request's positions have no gap. Lines may
come in any order in which tokens are complete before long, such as token by token, or layer by
layer of each pass. A request is one of its file and task. Files may be compressed with gzip.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.io.bad_rows import BadRows
from prism_plan.io.json_lines import json_lines
from prism_plan.limits import MAX_NAMES, MIB, require_at_most, require_name
from prism_plan.model import ModelSpec
from prism_plan.profiling.layers import mtp_layers, mtp_notice
from prism_plan.profiling.rows import RepeatedRows
from prism_plan.profiling.selection_lines import Line, LineParser, example
from prism_plan.profiling.sources import Source
from prism_plan.profiling.tensors import CUT_SHORT, Notify, files_of_tasks
from prism_plan.trace import PHASES, TokenBatch, Trace, trace_from_batches

#: Bytes of tokens that are not complete yet, 2 for each selection and some 500 beside them: a pass
#: of 200,000 tokens layer by layer through a model of 48 layers, top-8.
MAX_OPEN_BYTES, TOKEN_BYTES = 256 * MIB, 500
#: Tokens that are put together into arrays at a time.
_CHUNK = 4096

Ids = npt.NDArray[np.uint16]


def read_selections(
    sources: Sequence[Source],
    model: ModelSpec,
    *,
    skip_bad: bool = False,
    notify: Notify = lambda message: None,
) -> Trace:
    """One token-level trace from files of selections.

    The task is the source's label, else the line's ``task``, else the file's stem; files of one
    label are put together. ``notify`` is told what was left out or looks wrong: with ``skip_bad``
    lines that cannot be read or are of another model, and the other layers of their tokens.

    Raises
    ------
    InputError
        A line is not JSON, lacks a key, is of another model or stands twice; a token lacks a
        layer; a request lacks a token; too many tokens are open at once. Names the line.
    """
    files_of_tasks(sources)  # refuses two unlabelled files of one name
    bad = BadRows(skip_bad)
    reader = _Reader(model, bad)
    for source in sources:
        reader.read(source)
    bad.require_good()
    if not reader.batches:
        raise InputError(
            "no selections in it", source=sources[0].path, expected=f"lines {example(model)}"
        )
    bad.tell(notify)
    repeated = reader.repeated
    for text in [*reader.notices(), mtp_notice(reader.left_out_layers, model), repeated.notice()]:
        if text:
            notify(text)
    return trace_from_batches(
        model,
        reader.tasks,
        reader.batches,
        provenance={
            "source": "selections",
            "files": [source.path.name for source in sources],
            **({"repeated_rows": repeated.rows} if repeated.rows else {}),
            **bad.provenance(),
        },
        name="selections",
    )


@dataclass
class _Token:
    """A token of which some layers were read: ids [L, K], layers as bits, its last line."""

    experts: Ids
    phase: int
    layers: int = 0
    line: int = 0


@dataclass
class _Tokens:
    """Complete tokens of a file: their requests, positions, phases, last lines and ids."""

    rows: list[tuple[int, int, int, int]] = field(default_factory=list)
    experts: list[Ids] = field(default_factory=list)
    parts: list[tuple[npt.NDArray[np.int64], Ids]] = field(default_factory=list)

    def add(self, request: int, position: int, token: _Token) -> None:
        self.rows.append((request, position, token.phase, token.line))
        self.experts.append(token.experts)
        if len(self.rows) == _CHUNK:
            self._put_together()

    def _put_together(self) -> None:
        if self.rows:
            self.parts.append((np.array(self.rows, np.int64), np.stack(self.experts)))
            self.rows, self.experts = [], []

    def known(self, keys: Collection[tuple[int, int]]) -> set[tuple[int, int]]:
        """Those of the (request, position) that are complete."""
        self._put_together()
        wanted = np.array([request << 32 | position for request, position in keys], np.int64)
        found: set[int] = set()
        for rows, _ in self.parts:
            found.update(np.intersect1d(rows[:, 0] << 32 | rows[:, 1], wanted).tolist())
        return {divmod(key, 1 << 32) for key in found}

    def sorted(self) -> tuple[npt.NDArray[np.int64], Ids]:
        """(request, position, phase, line) int64 [T, 4] and ids [T, L, K], by request and token."""
        self._put_together()
        rows = np.concatenate([part for part, _ in self.parts])
        experts = np.concatenate([ids for _, ids in self.parts])
        self.parts.clear()
        order = np.lexsort((rows[:, 1], rows[:, 0]))
        return rows[order], experts[order]


@dataclass
class _Reader:
    """Reads files, each by itself, into batches of one request."""

    model: ModelSpec
    bad: BadRows
    tasks: dict[str, int] = field(default_factory=dict)
    batches: list[TokenBatch] = field(default_factory=list)
    left_out_layers: set[int] = field(default_factory=set)
    without_start: int = 0
    gaps: int = 0

    def __post_init__(self) -> None:
        self.lines = LineParser(self.model)
        self.repeated = RepeatedRows(self.model)
        self._position_of = {layer: at for at, layer in enumerate(self.model.moe_layers)}
        self._all_layers = (1 << self.model.num_layers) - 1

    def read(self, source: Source) -> None:
        """Add the requests of a file."""
        path = source.path
        if path.is_dir():
            raise InputError(
                "is a folder", source=path, expected=f"a file of lines {example(self.model)}"
            )
        requests: dict[tuple[str, str | int], int] = {}
        waiting: dict[tuple[int, int], _Token] = {}
        complete = _Tokens()
        beyond: dict[int, int] = {}
        selections = self.model.num_layers * self.model.top_k
        most = MAX_OPEN_BYTES // (TOKEN_BYTES + 2 * selections)
        for place, value in json_lines(path, self.bad):
            number = int(place.removeprefix("line "))
            try:
                line = self.lines.parse(value, source, place)
                if line is None:
                    continue
                if line.layer not in self._position_of:
                    beyond.setdefault(line.layer, number)
                    continue
                request = requests.setdefault((line.task, line.request), len(requests))
                key = (request, line.position)
                token = waiting.get(key)
                if token is None:
                    token = waiting[key] = self._new_token(line)
                self._put(token, line, path, place)
            except InputError as error:
                self.bad.skip_or_raise(path, error)
                continue
            token.line = number
            self.bad.keep(path)
            if token.layers == self._all_layers:
                complete.add(*key, waiting.pop(key))
            elif len(waiting) > most:
                raise _too_many_open(most, path, place)
        names = list(requests)
        self._check_beyond(beyond, path)
        self._refuse_incomplete(waiting, complete, names, path)
        if complete.rows or complete.parts:
            self._add(complete, names, path)

    # ------------------------------------------------------------------------------ tokens

    def _new_token(self, line: Line) -> _Token:
        return _Token(np.zeros((self.model.num_layers, self.model.top_k), np.uint16), line.phase)

    def _put(self, token: _Token, line: Line, path: Path, place: str) -> None:
        """Put a line's layer to its token."""
        at = self._position_of[line.layer]
        if token.layers >> at & 1:
            raise _twice(line.request, line.position, path, place)
        if line.phase != token.phase:
            raise InputError(
                f"phase {PHASES[line.phase]!r}",
                source=path,
                place=place,
                expected=f"{PHASES[token.phase]!r}, as in other layers of the token",
            )
        token.experts[at] = line.experts
        token.layers |= 1 << at

    def _check_beyond(self, beyond: Mapping[int, int], path: Path) -> None:
        extra, stray = mtp_layers(beyond, self.model)
        if stray is not None:
            raise self.lines.foreign_layer(stray, path, f"line {beyond[stray]}")
        self.left_out_layers.update(extra)

    def _refuse_incomplete(
        self,
        waiting: Mapping[tuple[int, int], _Token],
        complete: _Tokens,
        names: Sequence[tuple[str, str | int]],
        path: Path,
    ) -> None:
        layers = self.model.moe_layers
        done = complete.known(waiting)
        for (request, position), token in waiting.items():
            self.bad.keep(path, -token.layers.bit_count())
            if (request, position) in done:
                twice = _twice(names[request][1], position, path, f"line {token.line}")
                self.bad.skip_or_raise(path, twice)
                continue
            missing = [layer for at, layer in enumerate(layers) if not token.layers >> at & 1]
            shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            error = InputError(
                f"request {names[request][1]!r} token {position} lacks layers {shown}",
                source=path,
                place=f"line {token.line}",
                expected=f"a line for each MoE layer of {self.model.name}, "
                f"{self.model.layers_text()}",
                remedy=f"{CUT_SHORT}, with all layers",
            )
            self.bad.skip_or_raise(path, error)

    # ---------------------------------------------------------------------------- requests

    def _add(self, complete: _Tokens, names: Sequence[tuple[str, str | int]], path: Path) -> None:
        """Make a batch of each request of a file."""
        rows, experts = complete.sorted()
        starts = np.flatnonzero(np.diff(rows[:, 0], prepend=-1))
        for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
            task, request = names[rows[start, 0]]
            own, ids = self._checked(rows[start:end], experts[start:end], request, path)
            if task not in self.tasks:
                require_name(task, source=path)
                require_at_most(len(self.tasks) + 1, MAX_NAMES, "tasks", source=path)
                self.tasks[task] = len(self.tasks)
            self.without_start += bool(own[0, 1])
            self.repeated.add(ids, f"{path} request {request!r}", first=int(own[0, 1]))
            self.batches.append(
                TokenBatch(
                    request=np.full(len(own), len(self.batches), np.int32),
                    position=own[:, 1].astype(np.int32),
                    phase=own[:, 2].astype(np.int8),
                    task=np.full(len(own), self.tasks[task], np.int32),
                    experts=ids,
                )
            )

    def _checked(
        self, rows: npt.NDArray[np.int64], experts: Ids, request: str | int, path: Path
    ) -> tuple[npt.NDArray[np.int64], Ids]:
        """The tokens of a request, none of them twice and none missing between them."""
        step = np.diff(rows[:, 1])
        if not step.all():
            # which of the two came first is told by the lines
            for at in np.flatnonzero(step == 0).tolist():
                second = int(rows[at : at + 2, 3].max())
                twice = _twice(request, int(rows[at, 1]), path, f"line {second}")
                self.bad.skip_or_raise(path, twice)
            keep = np.concatenate([[True], step != 0])
            rows, experts = rows[keep], experts[keep]
            step = np.diff(rows[:, 1])
        if (step > 1).any():
            at = int(np.argmax(step > 1))
            if not self.bad.skip:
                raise InputError(
                    f"request {request!r} goes on with token {rows[at + 1, 1]}",
                    source=path,
                    place=f"line {rows[at + 1, 3]}",
                    expected=f"token {rows[at, 1] + 1} after token {rows[at, 1]}",
                    remedy=CUT_SHORT,
                )
            self.gaps += int((step[step > 1] - 1).sum())
        return rows, experts

    def notices(self) -> Iterator[str]:
        """What is to be said of requests."""
        if self.without_start:
            yield f"{self.without_start:,} requests were recorded without the start of the prompt"
        if self.gaps:
            yield f"{self.gaps:,} tokens are missing between others of their requests"


def _twice(request: str | int, position: int, path: Path, place: str) -> InputError:
    return InputError(
        f"request {request!r} token {position} for the second time",
        source=path,
        place=place,
        expected="each request, token and layer once",
        remedy="requests of different runs need different ids",
    )


def _too_many_open(most: int, path: Path, place: str) -> InputError:
    return InputError(
        f"more than {most:,} tokens lack layers that may still come",
        source=path,
        place=place,
        expected="the lines of a token close to each other",
        remedy="sort the file by request and token",
    )
