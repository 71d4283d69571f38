"""Read selections one by one: JSON Lines of one request, token and layer each.

Hooks on routers write such files, for example patches of vLLM with ``VLLM_LOG_MOE``::

    {"type": "meta", "model_id": "Qwen/Qwen1.5-MoE-A2.7B-Chat", "top_k": 4}
    {"type": "route", "req_id": "r1", "token_idx": 0, "layer": 0, "topk_ids": [7, 2, 40, 11]}

Each line has four things, under one of several names (``NAMES`` of
:mod:`.line_parser`): the request, a text or a whole number; the token, its
position in the request; the decoder layer; and K logical expert ids. ``phase`` ("prefill",
"decode" or "unknown") and ``task`` are optional. All other keys (gate weights, dates) are ignored,
and of lines of ``"type": "meta"`` all but ``top_k``.

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
from prism_plan.input_limits import MIB
from prism_plan.io.bad_rows import BadRows
from prism_plan.io.json_lines import json_lines
from prism_plan.io.location import Location
from prism_plan.model_spec import ModelSpec
from prism_plan.profiling.common.extra_layers import foreign_layer, split_mtp_layers
from prism_plan.profiling.common.messages import TRUNCATED, Notify
from prism_plan.profiling.common.request_batches import RequestBatches
from prism_plan.profiling.selections.line_parser import Line, LineParser, example_line
from prism_plan.profiling.sources import Source, paths_by_task
from prism_plan.trace import PHASES, Trace, trace_from_batches

#: Bytes of tokens that are not complete yet, 2 for each selection and some 500 beside them: a pass
#: of 200,000 tokens layer by layer through a model of 48 layers, top-8.
MAX_INCOMPLETE_BYTES, TOKEN_BYTES = 256 * MIB, 500
#: Tokens that are put together into arrays at a time.
_CHUNK_TOKENS = 4096

Ids = npt.NDArray[np.uint16]
#: Number of a request in its file, and position of a token in it.
TokenKey = tuple[int, int]


def read_selections(
    sources: Sequence[Source],
    model: ModelSpec,
    *,
    skip_bad: bool = False,
    notify: Notify = lambda message: None,
) -> Trace:
    """One token-level trace from files of selections.

    The task is the source's label, else the line's ``task``, else the file's stem; files of one
    label are put together. With ``skip_bad`` lines that cannot be read or are of another model are
    left out, with the other layers of their tokens. ``notify`` is called with what was left out or
    looks wrong.

    Raises
    ------
    InputError
        A line is not JSON, lacks a key, is of another model or is duplicated; a token lacks a
        layer; a request lacks a token; too many tokens are incomplete at once. Names the line.
    """
    paths_by_task(sources)  # refuses two unlabelled files of one name
    bad = BadRows(skip_bad)
    reader = _Reader(model, bad)
    for source in sources:
        reader.read(source)
    bad.require_good()
    requests = reader.requests
    if not requests.batches:
        expected = f"lines {example_line(model)}"
        raise Location(sources[0].path).error("no selections in it", expected)
    bad.report(notify)
    for text in [*reader.notices(), *requests.layer_notices()]:
        notify(text)
    repeated = requests.repeated.rows
    return trace_from_batches(
        model,
        requests.tasks,
        requests.batches,
        provenance={
            "source": "selections",
            "files": [source.path.name for source in sources],
            **({"repeated_rows": repeated} if repeated else {}),
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
class _CompleteTokens:
    """Complete tokens of a file: their requests, positions, phases, last lines and ids."""

    rows: list[tuple[int, int, int, int]] = field(default_factory=list)
    experts: list[Ids] = field(default_factory=list)
    chunks: list[tuple[npt.NDArray[np.int64], Ids]] = field(default_factory=list)

    def add(self, request: int, position: int, token: _Token) -> None:
        self.rows.append((request, position, token.phase, token.line))
        self.experts.append(token.experts)
        if len(self.rows) == _CHUNK_TOKENS:
            self._close_chunk()

    def _close_chunk(self) -> None:
        if self.rows:
            self.chunks.append((np.array(self.rows, np.int64), np.stack(self.experts)))
            self.rows, self.experts = [], []

    def among(self, keys: Collection[TokenKey]) -> set[TokenKey]:
        """Those of the keys whose token is complete."""
        self._close_chunk()
        codes = np.array([request << 32 | position for request, position in keys], np.int64)
        found: set[int] = set()
        for rows, _ in self.chunks:
            found.update(np.intersect1d(rows[:, 0] << 32 | rows[:, 1], codes).tolist())
        return {divmod(code, 1 << 32) for code in found}

    def sorted(self) -> tuple[npt.NDArray[np.int64], Ids]:
        """(request, position, phase, line) int64 [T, 4] and ids [T, L, K], by request and token."""
        self._close_chunk()
        rows = np.concatenate([rows for rows, _ in self.chunks])
        experts = np.concatenate([ids for _, ids in self.chunks])
        self.chunks.clear()
        order = np.lexsort((rows[:, 1], rows[:, 0]))
        return rows[order], experts[order]


@dataclass
class _Reader:
    """Reads files, each by itself, into batches of one request."""

    model: ModelSpec
    bad: BadRows
    num_missing_tokens: int = 0

    def __post_init__(self) -> None:
        self.requests = RequestBatches(self.model)
        self._parser = LineParser(self.model)
        self._index_of = {layer: index for index, layer in enumerate(self.model.moe_layers)}
        self._all_layers = (1 << self.model.num_layers) - 1

    def read(self, source: Source) -> None:
        """Add the requests of a file."""
        path = source.path
        if path.is_dir():
            expected = f"a file of lines {example_line(self.model)}"
            raise Location(path).error("is a folder", expected)
        requests: dict[tuple[str, str | int], int] = {}
        incomplete: dict[TokenKey, _Token] = {}
        complete = _CompleteTokens()
        later_layers: dict[int, Location] = {}  # where layers after the model's first stand
        selections = self.model.num_layers * self.model.top_k
        max_incomplete = MAX_INCOMPLETE_BYTES // (TOKEN_BYTES + 2 * selections)
        for place, value in json_lines(path, self.bad):
            at = Location(path, place)
            try:
                line = self._parser.parse(value, source, at)
                if line is None:
                    continue
                if line.layer not in self._index_of:
                    later_layers.setdefault(line.layer, at)
                    continue
                request = requests.setdefault((line.task, line.request), len(requests))
                key = (request, line.position)
                if key not in incomplete:
                    shape = (self.model.num_layers, self.model.top_k)
                    incomplete[key] = _Token(np.zeros(shape, np.uint16), line.phase)
                token = incomplete[key]
                self._add_layer(token, line, at)
            except InputError as error:
                self.bad.skip_or_raise(path, error)
                continue
            token.line = int(place.removeprefix("line "))
            self.bad.count_good(path)
            if token.layers == self._all_layers:
                complete.add(*key, incomplete.pop(key))
            elif len(incomplete) > max_incomplete:
                raise at.error(
                    f"more than {max_incomplete:,} tokens lack layers that may still come",
                    "the lines of a token close to each other",
                    "sort the file by request and token",
                )
        names = list(requests)
        mtp_layers, stray = split_mtp_layers(later_layers, self.model)
        if stray is not None:
            raise foreign_layer(stray, self.model, later_layers[stray])
        self.requests.mtp_layers.update(mtp_layers)
        self._refuse_incomplete(incomplete, complete, names, path)
        if complete.rows or complete.chunks:
            self._add_requests(complete, names, path)

    def _add_layer(self, token: _Token, line: Line, at: Location) -> None:
        """Add a line's selection to its token."""
        index = self._index_of[line.layer]
        if token.layers >> index & 1:
            raise _twice(line.request, line.position, at)
        if line.phase != token.phase:
            raise at.error(
                f"phase {PHASES[line.phase]!r}",
                f"{PHASES[token.phase]!r}, as in other layers of the token",
            )
        token.experts[index] = line.experts
        token.layers |= 1 << index

    def _refuse_incomplete(
        self,
        incomplete: Mapping[TokenKey, _Token],
        complete: _CompleteTokens,
        names: Sequence[tuple[str, str | int]],
        path: Path,
    ) -> None:
        model = self.model
        done = complete.among(incomplete)
        for (request, position), token in incomplete.items():
            self.bad.count_good(path, -token.layers.bit_count())
            at, name = Location(path, f"line {token.line}"), names[request][1]
            if (request, position) in done:
                self.bad.skip_or_raise(path, _twice(name, position, at))
                continue
            missing = [
                layer for i, layer in enumerate(model.moe_layers) if not token.layers >> i & 1
            ]
            shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            error = at.error(
                f"request {name!r} token {position} lacks layers {shown}",
                f"a line for each MoE layer of {model.name}, {model.layers_text()}",
                f"{TRUNCATED}, with all layers",
            )
            self.bad.skip_or_raise(path, error)

    def _add_requests(
        self, complete: _CompleteTokens, names: Sequence[tuple[str, str | int]], path: Path
    ) -> None:
        """Make a batch of each request of a file."""
        rows, experts = complete.sorted()
        starts = np.flatnonzero(np.diff(rows[:, 0], prepend=-1))
        for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
            task, request = names[rows[start, 0]]
            own, ids = self._require_gapless(rows[start:end], experts[start:end], request, path)
            position, phase = own[:, 1].astype(np.int32), own[:, 2].astype(np.int8)
            self.requests.append(task, position, phase, ids, Location(path))
            first = int(position[0])
            self.requests.without_start += bool(first)
            self.requests.repeated.add(ids, f"{path} request {request!r}", first=first)

    def _require_gapless(
        self, rows: npt.NDArray[np.int64], experts: Ids, request: str | int, path: Path
    ) -> tuple[npt.NDArray[np.int64], Ids]:
        """The tokens of a request; refuses or counts duplicate or missing ones."""
        step = np.diff(rows[:, 1])
        if not step.all():
            for i in np.flatnonzero(step == 0).tolist():
                later_line = int(rows[i : i + 2, 3].max())
                twice = _twice(request, int(rows[i, 1]), Location(path, f"line {later_line}"))
                self.bad.skip_or_raise(path, twice)
            keep = np.concatenate([[True], step != 0])
            rows, experts = rows[keep], experts[keep]
            step = np.diff(rows[:, 1])
        if (step > 1).any():
            i = int(np.argmax(step > 1))
            if not self.bad.skip:
                raise Location(path, f"line {rows[i + 1, 3]}").error(
                    f"request {request!r} continues with token {rows[i + 1, 1]}",
                    f"token {rows[i, 1] + 1} after token {rows[i, 1]}",
                    TRUNCATED,
                )
            self.num_missing_tokens += int((step[step > 1] - 1).sum())
        return rows, experts

    def notices(self) -> Iterator[str]:
        """Notices of incomplete requests."""
        if self.requests.without_start:
            yield (
                f"{self.requests.without_start:,} requests were recorded without the start of the "
                "prompt"
            )
        if self.num_missing_tokens:
            yield f"{self.num_missing_tokens:,} tokens are missing between others of their requests"


def _twice(request: str | int, position: int, at: Location) -> InputError:
    return at.error(
        f"request {request!r} token {position} for the second time",
        "each request, token and layer once",
        "requests of different runs need different ids",
    )
