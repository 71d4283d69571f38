"""All dumps of one recording of SGLang; see :mod:`.reader`."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prism_plan.errors import InputError
from prism_plan.model import ModelSpec
from prism_plan.profiling.common.call_counts import require_every_layer, sum_calls
from prism_plan.profiling.common.json_fields import CHECK_MODEL, Notify
from prism_plan.profiling.sglang.dump_fields import (
    array_of,
    logical_map,
    number_of,
    require_decoder_layers,
    require_only_moe,
)
from prism_plan.profiling.sglang.forward_pass import Calls, Pass, pass_calls, pass_tokens

#: Fewer equal rows of two ranks than this may be chance (prompts that begin alike).
CHANCE_ROWS = 16

PassKey = tuple[int, str]


@dataclass
class Run:
    """All dumps of one task."""

    task: str
    model: ModelSpec
    notify: Notify
    files: list[Path] = field(default_factory=list)
    stat: dict[int, list[tuple[Path, Calls]]] = field(default_factory=dict)
    sums: dict[int, Calls] = field(default_factory=dict)
    digests: dict[int, dict[PassKey, bytes]] = field(default_factory=dict)
    passes: dict[int, dict[PassKey, Pass]] = field(default_factory=dict)
    padding: int = 0
    left_out_layers: set[int] = field(default_factory=set)

    def add(self, path: Path, mode: str, dump: Mapping[str, Any]) -> None:
        """Read one dump."""
        self.files.append(path)
        if mode == "stat":
            self._add_stat(path, dump)
            return
        table = logical_map(dump, self.model, path)
        for index, record in enumerate(dump["records"]):
            place = f"record {index}"
            rank = number_of(record, "rank", path, place)
            key = (
                number_of(record, "forward_pass_id", path, place),
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
                calls, extra = pass_calls(record, table, self.model, path, place)
                self.left_out_layers.update(extra)
                self.digests[rank][key] = hashlib.sha256(calls.tobytes()).digest()
                if rank in self.sums:
                    self.sums[rank] = sum_calls(np.stack([self.sums[rank], calls]), path, place)
                else:
                    self.sums[rank] = calls
            else:
                step = pass_tokens(record, table, self.model, path, place)
                self.padding += int((~step.kept).sum())
                self.left_out_layers.update(step.left_out_layers)
                self.digests[rank][key] = step.tokens_digest
                self.passes.setdefault(rank, {})[key] = step

    def _add_stat(self, path: Path, dump: Mapping[str, Any]) -> None:
        model = self.model
        rank = number_of(dump, "rank", path, "") if "rank" in dump else 0
        rows = array_of(dump, "logical_count", "S, L, E or L, E", path)
        place = "'logical_count'"
        if rows.ndim == 2:  # summed already
            rows = rows[None]
        if rows.shape[2] != model.num_experts:
            raise InputError(
                f"{rows.shape[2]} experts",
                source=path,
                place=place,
                expected=f"{model.num_experts} of {model.name}",
                remedy=CHECK_MODEL,
            )
        require_decoder_layers(rows.shape[1], model, path, place)
        if rows.size and rows.min() < 0:
            row, layer, expert = np.unravel_index(int(rows.argmin()), rows.shape)
            raise InputError(
                f"{rows.min()}",
                source=path,
                place=f"{place} row {row} layer {layer} expert {expert}",
                expected="counts of at least 0",
            )
        calls = sum_calls(rows, path, place)
        extra = require_only_moe(calls != 0, model, "calls", path, place)
        self.left_out_layers.update(extra)
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
        calls: Calls = sum_calls(np.stack(parts), self.files[0])
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


def _same_experts(ours: Mapping[PassKey, Pass], theirs: Mapping[PassKey, Pass]) -> bool:
    """Whether two ranks recorded one and the same rows, as far as both go."""
    rows = 0
    for key in ours.keys() & theirs.keys():
        a, b = ours[key].experts, theirs[key].experts
        both = min(len(a), len(b))
        if not np.array_equal(a[:both], b[:both]):
            return False
        rows += both
    return rows >= CHANCE_ROWS
