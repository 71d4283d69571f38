"""Recordings of SGLang, read in the source of SGLang 0.5.23.

*Expert distribution recorder* (``sglang/srt/eplb/expert_distribution.py``), ``.pt`` files or
folders of them; shapes: L decoder layers (dense ones included), P physical experts:

``stat``, ``stat_approx``
    ``{rank, logical_count int32 [S, L, E], average_utilization_rate_over_window}``, one row a
    forward pass, zeros where the buffer was not used. The counts are summed over ranks before
    they are written, so that of files of different ranks one is read. Files of one rank are
    successive dumps (a dump empties the buffer) and are added.
``per_pass``
    ``{records: [{forward_pass_id, rank, gatherer_key, global_physical_count [L, P]}],
    last_physical_to_logical_map [L, P]}``. Ranks are added, as the engine's own reader does
    (``eplb_simulator/reader.py``), but for ranks that recorded exactly the same.
``per_token``
    the same with ``topk_ids_of_layer`` int32 [L, T, 8] of *physical* ids (-1: nothing),
    ``input_ids``, ``positions``, ``extend_seq_lens`` and ``forward_mode`` in each record. Gives a
    token-level trace. Ranks of equal tokens and selections are read once.

Without data-parallel attention every rank selects for all tokens: ``stat`` then counts each call
once a rank, and the tokens of the trace are as many times too many; calls per token stay right.
The map is that of the time of the dump: recordings during which experts moved are wrong unless
the moves show as an expert named twice.

*Requests of per_token.* The recorder keeps no request ids. They are told apart by position, rank
by rank, in the order in which the scheduler keeps them: a piece of an extend pass goes on with a
request of the pass before it (chunked prefill), a one-token piece with any running request, if
the positions meet, and else starts a request; a row of a decode pass goes on with the next request
in batch order whose positions meet. Two requests of one length can be taken for each other when
one of them ends; the provenance counts them. ``forward_mode`` (``model_executor/
forward_batch_info.py``): 1 extend and the long pieces of 3 mixed are prefill; 2 decode and
one-token pieces that go on with a request are decode; 4 idle has no tokens; others are refused.

*Responses* (``sglang/srt/state_capturer/routed_experts.py``), ``.jsonl``: one response of
``/generate`` a line (or a list of them) with ``meta_info.routed_experts``, base64 of raw int32
[tokens - 1 - start, L, K] of logical ids, and ``meta_info.prompt_tokens``, ``completion_tokens``;
or of the OpenAI interface with ``sglext.routed_experts`` and ``usage``.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.model import ModelSpec
from prism_plan.profiling.sources import Source
from prism_plan.profiling.tensors import (
    CHECK_MODEL,
    CUT_SHORT,
    DECODE,
    PREFILL,
    Notify,
    Requests,
    counts_trace,
    decode_base64,
    files_of_tasks,
    json_lines,
    json_object,
    task_of_line,
    whole_number,
)
from prism_plan.profiling.tokens import require_every_layer
from prism_plan.trace import TokenBatch, Trace, check_experts, trace_from_batches

EXTEND_MODE, DECODE_MODE, MIXED_MODE, IDLE_MODE = 1, 2, 3, 4
#: Columns of ``topk_ids_of_layer``, whatever the model's top-k.
RECORDED_K = 8

#: Fewer equal rows of two ranks than this may be chance (prompts that begin alike).
CHANCE_ROWS = 16

Calls = npt.NDArray[np.int64]
PassKey = tuple[int, str]


def read_sglang(
    sources: Sequence[Source], model: ModelSpec, *, notify: Notify = lambda message: None
) -> Trace:
    """One trace: token-level from per_token and responses, counts-only from stat and per_pass.

    A source is a ``.pt`` file, a folder of those of one run, or a ``.jsonl`` file. Files of one
    label are read as parts of one run. ``notify`` is told what was left out.

    Raises
    ------
    InputError
        A file is cut short, holds code, mixes modes or is of another model.
    """
    files = files_of_tasks(sources)
    responses = [s for s in sources if s.path.is_file() and s.path.suffix == ".jsonl"]
    if responses:
        for source in sources:
            if source not in responses:
                raise _mixed(source.path, "a recorder's dump", responses[0].path, "responses")
        return _responses(sources, model, notify)
    runs = {task: _Run(task, model, notify) for task in files}
    first: tuple[Path, str] | None = None
    for task, paths in files.items():
        for path in paths:
            for file in _dumps(path):
                dump = _load(file)
                mode = _mode(dump, file)
                if first is not None and mode != first[1]:
                    raise _mixed(file, mode, *first)
                first = first or (file, mode)
                runs[task].add(file, mode, dump)
                del dump
    assert first is not None
    names = {task: [path.name for path in paths] for task, paths in files.items()}
    provenance: dict[str, Any] = {"mode": first[1], "files": names}
    if first[1] == "per_token":
        return _tokens(runs, model, provenance, notify)
    counts = {task: run.counts(first[1]) for task, run in runs.items()}
    return counts_trace("sglang", model, counts, provenance, notify)


def _mixed(path: Path, found: str, other: Path, expected: str) -> InputError:
    return InputError(
        found,
        source=path,
        expected=f"{expected}, as in {other}",
        remedy="make a trace of each kind of recording",
    )


def _dumps(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("*.pt"))
    if not found:
        raise InputError("no .pt files in it", source=path, expected="dumps of SGLang's recorder")
    return found


# ----------------------------------------------------------------------------------------- loading


def _load(path: Path) -> Mapping[str, Any]:
    """The dictionary in a .pt file, of which nothing but plain data is ever built."""
    try:
        import torch
    except ImportError as error:
        raise InputError(
            "PyTorch is not installed, and the file is its format",
            source=path,
            remedy="pip install 'prism-plan[hf]'",
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dump = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(
            (error.strerror or str(error)).lower(), source=path, remedy="give a readable file"
        ) from error
    except Exception as error:  # hostile bytes make PyTorch's reader raise anything
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise InputError(
                f"not opened: it holds code or objects ({code.group(1):.60})",
                source=path,
                expected="tensors and plain values only",
                remedy="use files that the recorder itself wrote",
            ) from error
        raise InputError(
            f"not a readable PyTorch file ({type(error).__name__})", source=path, remedy=CUT_SHORT
        ) from error
    if not isinstance(dump, dict):
        raise InputError(
            f"{type(dump).__name__}",
            source=path,
            expected="a dump of SGLang's expert distribution recorder",
        )
    return dump


def _mode(dump: Mapping[str, Any], path: Path) -> str:
    if "logical_count" in dump:
        return "stat"
    records = dump.get("records")
    if not isinstance(records, list):
        raise InputError(
            f"keys {', '.join(map(str, dump))!s:.80}",
            source=path,
            expected="'logical_count' (stat), or 'records' (per_pass, per_token)",
        )
    if not records:
        raise InputError("no records in it", source=path, remedy="record while requests run")
    if not all(isinstance(record, dict) for record in records):
        raise InputError("a record is no dictionary", source=path, place="records")
    tokens = ["topk_ids_of_layer" in record for record in records]
    if any(tokens) and not all(tokens):
        raise InputError(
            "'topk_ids_of_layer' is missing",
            source=path,
            place=f"record {tokens.index(False)}",
            expected="it in all records, or in none",
        )
    return "per_token" if all(tokens) else "per_pass"


def _array(
    values: Mapping[str, Any], key: str, dims: str, path: Path, place: str = ""
) -> npt.NDArray[Any]:
    """The whole numbers of a tensor; ``dims`` names its dimensions for the message."""
    tensor = values.get(key)
    place = f"{place} {key!r}".strip()
    rank = dims.count(",") + 1
    try:
        array = tensor.numpy() if tensor is not None else None
        kind = str(tensor.dtype).removeprefix("torch.") if tensor is not None else "nothing"
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{tensor!r:.60}", source=path, place=place, expected=f"a tensor [{dims}]"
        ) from error
    if array is None or array.dtype.kind not in "iu" or array.ndim != rank:
        found = kind if array is None else f"{kind} {list(array.shape)}"
        raise InputError(
            found, source=path, place=place, expected=f"whole numbers [{dims}]", remedy=CUT_SHORT
        )
    return np.asarray(array)


def _number(values: Mapping[str, Any], key: str, path: Path, place: str) -> int:
    number = whole_number(values, key, path, place)
    if number is None:
        raise InputError(f"{key!r} is missing", source=path, place=place)
    return number


def _decoder_layers(found: int, model: ModelSpec, path: Path, place: str) -> None:
    if found <= model.moe_layers[-1]:
        raise InputError(
            f"{found} layers",
            source=path,
            place=place,
            expected=f"{model.moe_layers[-1] + 1} or more, all decoder layers of {model.name}",
            remedy=CHECK_MODEL,
        )


def _only_moe(
    used: npt.NDArray[np.bool_], model: ModelSpec, what: str, path: Path, place: str
) -> None:
    """Refuse a recording in which a layer that is dense in the model is ``used`` [L, ...]."""
    for layer in np.setdiff1d(np.arange(len(used)), model.moe_layers):
        if used[layer].any():
            raise InputError(
                f"{what} in layer {layer}",
                source=path,
                place=place,
                expected=f"none, for {model.name} has its MoE layers at {model.layers_text()}",
                remedy=CHECK_MODEL,
            )


def _logical_map(dump: Mapping[str, Any], model: ModelSpec, path: Path) -> npt.NDArray[np.int64]:
    """``last_physical_to_logical_map`` of the MoE layers, int64 [MoE layers, P]."""
    key = "last_physical_to_logical_map"
    table = _array(dump, key, "L, P", path)
    _decoder_layers(len(table), model, path, repr(key))
    table = table[list(model.moe_layers)].astype(np.int64)
    for layer, row in zip(model.moe_layers, table, strict=True):
        if not np.array_equal(np.unique(row), np.arange(model.num_experts)):
            low, high = (int(row.min()), int(row.max())) if row.size else (0, -1)
            raise InputError(
                f"{len(np.unique(row))} experts, {low}..{high}",
                source=path,
                place=f"{key!r} layer {layer}",
                expected=f"each of 0..{model.num_experts - 1} of {model.name}",
                remedy=CHECK_MODEL,
            )
    return table


# -------------------------------------------------------------------------------------------- runs


@dataclass
class _Pass:
    """A forward pass of one rank: T tokens, of which the rows ``kept`` [T] were recorded."""

    mode: int
    positions: npt.NDArray[np.int64]
    pieces: list[int] | None
    kept: npt.NDArray[np.bool_]
    experts: npt.NDArray[np.uint16]
    tokens_digest: bytes


@dataclass
class _Run:
    """All dumps of one task."""

    task: str
    model: ModelSpec
    notify: Notify
    files: list[Path] = field(default_factory=list)
    stat: dict[int, list[tuple[Path, Calls]]] = field(default_factory=dict)
    sums: dict[int, Calls] = field(default_factory=dict)
    digests: dict[int, dict[PassKey, bytes]] = field(default_factory=dict)
    passes: dict[int, dict[PassKey, _Pass]] = field(default_factory=dict)
    padding: int = 0

    def add(self, path: Path, mode: str, dump: Mapping[str, Any]) -> None:
        """Read one dump."""
        self.files.append(path)
        if mode == "stat":
            self._add_stat(path, dump)
            return
        table = _logical_map(dump, self.model, path)
        for index, record in enumerate(dump["records"]):
            place = f"record {index}"
            rank = _number(record, "rank", path, place)
            key = (
                _number(record, "forward_pass_id", path, place),
                str(record.get("gatherer_key", "")),
            )
            if key in self.digests.setdefault(rank, {}):
                raise InputError(
                    f"forward pass {key[0]} of rank {rank} was read already",
                    source=path,
                    place=place,
                    expected="each pass of each rank once",
                    remedy="give recordings of different runs different tasks",
                )
            if mode == "per_pass":
                calls = _pass_calls(record, table, self.model, path, place)
                self.digests[rank][key] = hashlib.sha256(calls.tobytes()).digest()
                if rank in self.sums:
                    self.sums[rank] += calls
                else:
                    self.sums[rank] = calls
            else:
                step = _pass_tokens(record, table, self.model, path, place)
                self.padding += int((~step.kept).sum())
                self.digests[rank][key] = step.tokens_digest
                self.passes.setdefault(rank, {})[key] = step

    def _add_stat(self, path: Path, dump: Mapping[str, Any]) -> None:
        model = self.model
        rank = _number(dump, "rank", path, "") if "rank" in dump else 0
        rows = _array(dump, "logical_count", "S, L, E", path)
        place = "'logical_count'"
        if rows.shape[2] != model.num_experts:
            raise InputError(
                f"{rows.shape[2]} experts",
                source=path,
                place=place,
                expected=f"{model.num_experts} of {model.name}",
                remedy=CHECK_MODEL,
            )
        _decoder_layers(rows.shape[1], model, path, place)
        if rows.size and rows.min() < 0:
            row, layer, expert = np.unravel_index(int(rows.argmin()), rows.shape)
            raise InputError(
                f"{rows.min()}",
                source=path,
                place=f"{place} row {row} layer {layer} expert {expert}",
                expected="counts of at least 0",
            )
        calls = rows.sum(axis=0, dtype=np.int64)
        _only_moe(calls != 0, model, "calls", path, place)
        calls = calls[list(model.moe_layers)]
        for other, seen in self.stat.get(rank, []):
            if calls.any() and np.array_equal(seen, calls):
                raise InputError(
                    f"the same counts as in {other.name}",
                    source=path,
                    expected="dumps of one rank to differ",
                    remedy="remove the copy",
                )
        self.stat.setdefault(rank, []).append((path, calls))

    def counts(self, mode: str) -> Calls:
        """Calls [MoE layers, E] of a run recorded in mode stat or per_pass."""
        if mode == "stat":
            first, *others = sorted(self.stat)
            if others:
                self.notify(
                    f"task {self.task!r}: read rank {first} of {len(self.stat)}, for the counts "
                    "of each rank are the sum over all"
                )
            parts = [part for _, part in self.stat[first]]
        else:
            ranks, copies = self._distinct_ranks(lambda rank: bool(self.sums[rank].any()))
            self._tell_copies(copies)
            parts = [self.sums[rank] for rank in ranks]
        calls: Calls = np.stack(parts).sum(axis=0)
        try:
            require_every_layer(self.task, calls, self.model)
        except InputError as error:
            raise error.within(self.files[0]) from error
        return calls

    def token_ranks(self) -> list[int]:
        """Ranks of a per_token run whose tokens are not those of another rank."""
        ranks, copies = self._distinct_ranks(
            lambda rank: any(step.kept.any() for step in self.passes[rank].values())
        )
        for rank, twin in copies.items():
            ours, theirs = self.passes[rank], self.passes[twin]
            if not all(np.array_equal(ours[k].experts, theirs[k].experts) for k in ours):
                raise self._misplaced(f"ranks {twin} and {rank} recorded the same tokens, but not "
                                      "the same experts")  # fmt: skip
        for rank, other in itertools.combinations(ranks, 2):
            if _same_experts(self.passes[rank], self.passes[other]):
                raise self._misplaced(f"ranks {rank} and {other} recorded the same experts, but "
                                      "not the same tokens")  # fmt: skip
        self._tell_copies(copies)
        return ranks

    def _misplaced(self, found: str) -> InputError:
        return InputError(
            found,
            source=self.files[0],
            expected="ranks that agree in both or in neither",
            remedy="where ranks share tokens or gather them before the gate, the recorder does "
            "not tell whose rows it kept: record responses (return_routed_experts) instead",
        )

    def _distinct_ranks(self, busy: Callable[[int], bool]) -> tuple[list[int], dict[int, int]]:
        """Ranks that recorded anything, and {copy: rank} of those that recorded the same."""
        kept: list[int] = []
        copies: dict[int, int] = {}
        for rank in sorted(self.digests):
            if busy(rank):
                same = [other for other in kept if self.digests[rank] == self.digests[other]]
                if same:
                    copies[rank] = same[0]
                else:
                    kept.append(rank)
        if not kept:
            raise InputError(
                "no tokens in it", source=self.files[0], remedy="record while requests run"
            )
        return kept, copies

    def _tell_copies(self, copies: Mapping[int, int]) -> None:
        if copies:
            self.notify(
                f"task {self.task!r}: left out ranks {', '.join(map(str, copies))}, which "
                "recorded the same as another"
            )


def _same_experts(ours: Mapping[PassKey, _Pass], theirs: Mapping[PassKey, _Pass]) -> bool:
    """Whether two ranks recorded one and the same rows, as far as both go."""
    rows = 0
    for key in ours.keys() & theirs.keys():
        a, b = ours[key].experts, theirs[key].experts
        both = min(len(a), len(b))
        if not np.array_equal(a[:both], b[:both]):
            return False
        rows += both
    return rows >= CHANCE_ROWS


def _pass_calls(
    record: Mapping[str, Any],
    table: npt.NDArray[np.int64],
    model: ModelSpec,
    path: Path,
    place: str,
) -> Calls:
    """Calls [MoE layers, E] of the logical experts in one pass."""
    key = "global_physical_count"
    counts = _array(record, key, "L, P", path, place)
    place = f"{place} {key!r}"
    _decoder_layers(len(counts), model, path, place)
    if counts.shape[1] != table.shape[1]:
        raise InputError(
            f"{counts.shape[1]} physical experts",
            source=path,
            place=place,
            expected=f"{table.shape[1]}, as in the map",
        )
    if counts.size and counts.min() < 0:
        layer, slot = np.unravel_index(int(counts.argmin()), counts.shape)
        raise InputError(
            f"{counts.min()}",
            source=path,
            place=f"{place} layer {layer} physical expert {slot}",
            expected="counts of at least 0",
        )
    _only_moe(counts != 0, model, "calls", path, place)
    calls = np.zeros((model.num_layers, model.num_experts), np.int64)
    rows = np.arange(model.num_layers)[:, None]
    np.add.at(calls, (rows, table), counts[list(model.moe_layers)].astype(np.int64))
    return calls


def _pass_tokens(
    record: Mapping[str, Any],
    table: npt.NDArray[np.int64],
    model: ModelSpec,
    path: Path,
    place: str,
) -> _Pass:
    """The tokens of one pass, physical ids mapped back to logical ones."""
    mode = _number(record, "forward_mode", path, place)
    if mode not in (EXTEND_MODE, DECODE_MODE, MIXED_MODE, IDLE_MODE):
        raise InputError(
            f"forward_mode {mode}",
            source=path,
            place=place,
            expected="1 extend, 2 decode, 3 mixed or 4 idle",
            remedy="record without speculative decoding and split prefill",
        )
    ids = _array(record, "topk_ids_of_layer", f"L, T, {RECORDED_K}", path, place)
    where = f"{place} 'topk_ids_of_layer'"
    _decoder_layers(len(ids), model, path, where)
    if ids.shape[2] < model.top_k:
        raise InputError(
            f"{ids.shape[2]} columns",
            source=path,
            place=where,
            expected=f"at least {model.top_k}, top-k of {model.name}",
            remedy="this recorder keeps 8 experts a token; use its stat mode for more",
        )
    tokens = ids.shape[1]
    positions = _numbers(record, "positions", tokens, path, place)
    words = _numbers(record, "input_ids", tokens, path, place)
    _only_moe(ids != -1, model, "selections", path, where)
    ids = ids[list(model.moe_layers)]
    kept = (ids != -1).any(axis=(0, 2)) & (mode != IDLE_MODE)
    rows = ids[:, kept]
    at = np.flatnonzero(kept)
    whole = (rows[..., : model.top_k] >= 0).all(axis=2) & (rows[..., model.top_k :] == -1).all(
        axis=2
    )
    bad = ~whole | (rows >= table.shape[1]).any(axis=2)
    if bad.any():
        layer, row = np.unravel_index(int(np.argmax(bad)), bad.shape)
        raise InputError(
            f"physical experts {rows[layer, row].tolist()}",
            source=path,
            place=f"{where} layer {model.moe_layers[layer]} token {at[row]}",
            expected=f"{model.top_k} ids of 0..{table.shape[1] - 1}, then -1",
            remedy=f"{CHECK_MODEL}, with --disable-shared-experts-fusion and no pipeline stages",
        )
    index = np.arange(model.num_layers)[:, None, None]
    experts = np.ascontiguousarray(
        table[index, rows[..., : model.top_k]].transpose(1, 0, 2), np.uint16
    )
    twice = check_experts(experts, model.num_experts)
    if twice is not None:
        raise InputError(
            f"experts {experts[twice].tolist()} name one expert twice",
            source=path,
            place=f"{where} layer {model.moe_layers[twice[1]]} token {at[twice[0]]}",
            expected=f"{model.top_k} different experts",
            remedy="record without --enable-eplb: experts that move while recording cannot be "
            "mapped back",
        )
    return _Pass(
        mode=mode,
        positions=positions,
        pieces=_pieces(record, mode, positions, kept, path, place),
        kept=kept,
        experts=experts,
        tokens_digest=hashlib.sha256(positions.tobytes() + words.tobytes()).digest(),
    )


def _pieces(
    record: Mapping[str, Any],
    mode: int,
    positions: npt.NDArray[np.int64],
    kept: npt.NDArray[np.bool_],
    path: Path,
    place: str,
) -> list[int] | None:
    """``extend_seq_lens`` of an extend or mixed pass; rows after them are padding."""
    if mode not in (EXTEND_MODE, MIXED_MODE):
        return None
    lengths: list[int] = _numbers(record, "extend_seq_lens", None, path, place).tolist()
    if sum(lengths) > len(kept) or kept[sum(lengths) :].any():
        raise InputError(
            f"lengths of {sum(lengths)} tokens together",
            source=path,
            place=f"{place} 'extend_seq_lens'",
            expected=f"{len(kept)}",
            remedy=CUT_SHORT,
        )
    start = 0
    for length in lengths:
        piece = positions[start : start + length]
        if (np.diff(piece) != 1).any():
            raise InputError(
                f"positions {piece[:8].tolist()}",
                source=path,
                place=f"{place} tokens {start}..{start + length - 1}",
                expected="the consecutive positions of one request",
            )
        start += length
    return lengths


def _numbers(
    record: Mapping[str, Any], key: str, length: int | None, path: Path, place: str
) -> npt.NDArray[np.int64]:
    """A list of whole numbers of at least 0."""
    values = record.get(key)
    array: npt.NDArray[Any] = np.empty(0)
    if isinstance(values, list | tuple):
        try:
            array = np.array(values if values else np.empty(0, np.int64))
        except (ValueError, OverflowError):
            array = np.empty(0)
    # negative token ids stand for images and the like, and are of no matter here
    low = -(2**63) if key == "input_ids" else 0
    if array.ndim != 1 or array.dtype.kind not in "iu" or (array.size and array.min() < low):
        raise InputError(
            f"{values!r:.60}",
            source=path,
            place=f"{place} {key!r}",
            expected="a list of whole numbers of at least 0",
        )
    if length is not None and len(array) != length:
        raise InputError(
            f"{len(array)} numbers",
            source=path,
            place=f"{place} {key!r}",
            expected=f"{length}, one for each token of 'topk_ids_of_layer'",
            remedy=CUT_SHORT,
        )
    if array.size and key != "input_ids" and array.max() >= 2**31:
        raise InputError(
            f"{array.max()}", source=path, place=f"{place} {key!r}", expected="numbers below 2^31"
        )
    return array.astype(np.int64)


# ---------------------------------------------------------------------------------------- requests


@dataclass(eq=False)
class _Request:
    """A request being followed: its number, its next position, and whether it decodes yet."""

    number: int
    next: int
    decoding: bool = False


class _Follower:
    """Tells the requests of one rank apart by their positions (see the module's text)."""

    def __init__(self, first: int) -> None:
        self.count = first
        self.active: list[_Request] = []  # in batch order
        self.chunked: list[_Request] = []  # of the last extend pass
        self.swappable = 0

    def follow(self, step: _Pass) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int8]]:
        """Request number and phase of each of the T tokens of a pass."""
        request = np.zeros(len(step.positions), np.int32)
        phase = np.full(len(step.positions), DECODE, np.int8)
        rows: list[int] = []
        fresh: list[_Request] = []
        running = {one.next for one in self.active}
        if step.pieces is None:
            rows = np.flatnonzero(step.kept).tolist()
        else:
            start = 0
            for length in step.pieces:
                piece = slice(start, start + length)
                start += length
                if not length:
                    continue
                at = int(step.positions[piece.start])
                if length == 1 and at in running:
                    rows.append(piece.start)
                    continue
                one = self._extend(at, length)
                fresh.append(one)
                request[piece] = one.number
                phase[piece] = PREFILL
        batch = self._match(
            step.positions[rows].tolist(), [one for one in self.active if one not in fresh]
        )
        request[rows] = [one.number for one in batch]
        if step.mode == EXTEND_MODE:
            others = [one for one in self.active if one not in fresh]
            self.active = others + fresh + [one for one in batch if one not in others]
        elif batch or fresh:
            # The whole running batch steps together: others have ended, but for a prompt of
            # which only a part was fed.
            ended = [one for one in self.active if one not in batch and one not in fresh]
            taken = {one.next - 1 for one in batch}
            self.swappable += sum(one.next in taken for one in ended)
            waiting = [] if fresh else [one for one in self.chunked if not one.decoding]
            self.active = fresh + batch + waiting
        if step.pieces is not None:
            self.chunked = fresh
        return request, phase

    def _extend(self, at: int, length: int) -> _Request:
        going_on = (one for one in self.chunked if one.next == at and not one.decoding)
        one = next(going_on, None) if at else None
        if one is None:
            one = self._new(at)
        else:
            self.chunked.remove(one)
        one.next = at + length
        return one

    def _new(self, at: int) -> _Request:
        self.count += 1
        return _Request(self.count - 1, at)

    def _match(self, positions: list[int], running: list[_Request]) -> list[_Request]:
        """The requests that these rows go on with, in batch order where that is possible."""
        batch: list[_Request] = []
        pointer = 0
        for at in positions:
            ahead = range(pointer, len(running))
            found = next((i for i in ahead if running[i].next == at), None)
            if found is not None:
                pointer = found + 1
                one = running[found]
            else:
                late = (one for one in running if one.next == at and one not in batch)
                one = next(late, None) or self._new(at)
            one.next = at + 1
            one.decoding = True
            batch.append(one)
        return batch


def _tokens(
    runs: Mapping[str, _Run], model: ModelSpec, provenance: Mapping[str, Any], notify: Notify
) -> Trace:
    batches = []
    count = swappable = padding = 0
    for code, run in enumerate(runs.values()):
        for rank in run.token_ranks():
            follower = _Follower(count)
            parts: list[tuple[npt.NDArray[Any], ...]] = []
            for _, step in sorted(run.passes[rank].items()):
                request, phase = follower.follow(step)
                kept = step.kept
                parts.append((request[kept], step.positions[kept], phase[kept], step.experts))
            request, position, phase, experts = (
                np.concatenate(p) for p in zip(*parts, strict=True)
            )
            count = follower.count
            swappable += follower.swappable
            order = np.lexsort((position, request))
            batches.append(
                TokenBatch(
                    request=request[order],
                    position=position[order].astype(np.int32),
                    phase=phase[order],
                    task=np.full(len(order), code, np.int32),
                    experts=experts[order],
                )
            )
        padding += run.padding
        run.passes.clear()
    if padding:
        notify(f"left out {padding:,} rows of padding")
    notify(
        f"told {count:,} requests apart by their positions, for the recorder keeps no request ids; "
        f"{swappable:,} may be swapped with another of the same length"
    )
    return trace_from_batches(
        model,
        list(runs),
        batches,
        provenance={
            "source": "sglang",
            **provenance,
            "requests": "told apart by positions",
            "swappable_requests": swappable,
        },
        name="sglang",
    )


# --------------------------------------------------------------------------------------- responses


def _responses(sources: Sequence[Source], model: ModelSpec, notify: Notify) -> Trace:
    requests = Requests(model)
    for source in sources:
        path = source.path
        for place, value in json_lines(path):
            for index, item in enumerate(value if isinstance(value, list) else [value]):
                where = f"{place} item {index}" if isinstance(value, list) else place
                line = json_object(item, path, where)
                task = task_of_line(line, source.task, path, where)
                for text, prompt, generated in _routed(line, path, where):
                    if text is None:
                        requests.missing += 1
                        continue
                    array = _raw_array(text, model, path, where)
                    requests.add(task, array, prompt, generated, path, where)
    requests.tell(sources[0].path, notify)
    return trace_from_batches(
        model,
        requests.tasks,
        requests.batches,
        provenance={
            "source": "sglang",
            "mode": "responses",
            "files": [source.path.name for source in sources],
        },
        name="sglang",
    )


def _routed(
    line: Mapping[str, Any], path: Path, place: str
) -> Iterator[tuple[str | None, int | None, int | None]]:
    """(base64 text, prompt tokens, generated tokens) of a response."""
    if "meta_info" in line:
        holder = json_object(line["meta_info"], path, f"{place} 'meta_info'")
        usage = holder
    elif "sglext" in line:
        holder = json_object(line["sglext"], path, f"{place} 'sglext'")
        usage = json_object(line.get("usage") or {}, path, f"{place} 'usage'")
    else:
        raise InputError(
            "neither 'meta_info' nor 'sglext' in it",
            source=path,
            place=place,
            expected="a response with meta_info.routed_experts or sglext.routed_experts",
            remedy="start SGLang with --enable-return-routed-experts and ask for "
            "return_routed_experts",
        )
    text = holder.get("routed_experts")
    if text is not None and not isinstance(text, str):
        raise InputError(
            f"{text!r:.60}", source=path, place=f"{place} 'routed_experts'", expected="base64 text"
        )
    prompt = whole_number(usage, "prompt_tokens", path, place)
    generated = whole_number(usage, "completion_tokens", path, place)
    choices = line.get("choices")
    if isinstance(choices, list) and len(choices) > 1:
        generated = None  # of all choices together; the array is the first one's
    yield text, prompt, generated


def _raw_array(text: str, model: ModelSpec, path: Path, place: str) -> npt.NDArray[Any]:
    data = decode_base64(text, path, place)
    layers = model.moe_layers[-1] + 1
    row = layers * model.top_k * 4
    if len(data) % row:
        raise InputError(
            f"{len(data)} bytes",
            source=path,
            place=f"{place} 'routed_experts'",
            expected=f"a multiple of {row}: int32 of {layers} layers, top-{model.top_k}",
            remedy=f"{CHECK_MODEL}; {CUT_SHORT}",
        )
    return np.frombuffer(data, "<i4").reshape(-1, layers, model.top_k)
