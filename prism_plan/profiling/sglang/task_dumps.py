"""Add up all dumps of one recording with SGLang's recorder; see :mod:`.reader`."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prism_plan.errors import InputError
from prism_plan.io.location import Location
from prism_plan.model_spec import ModelSpec
from prism_plan.profiling.common.call_counts import Counts, require_every_layer, sum_calls
from prism_plan.profiling.common.messages import CHECK_MODEL, Notify
from prism_plan.profiling.sglang.dump_fields import (
    array_of,
    logical_map,
    require_decoder_layers,
    require_only_moe,
    required_count,
)
from prism_plan.profiling.sglang.forward_pass import (
    RecordedPass,
    read_pass_calls,
    read_pass_tokens,
)

#: Fewer equal rows of two ranks than this may be chance (prompts that begin alike).
MIN_COMMON_ROWS = 16

#: ``forward_pass_id`` and ``gatherer_key``.
PassKey = tuple[int, str]


@dataclass
class TaskDumps:
    """All dumps of one task, by rank.

    ``stat`` are the counts of each dump of mode stat; ``sums`` the counts of mode per_pass;
    ``passes`` those of mode per_token. ``digests`` show which ranks recorded the same.
    """

    task: str
    model: ModelSpec
    notify: Notify
    files: list[Path] = field(default_factory=list)
    stat: dict[int, list[tuple[Path, Counts]]] = field(default_factory=dict)
    sums: dict[int, Counts] = field(default_factory=dict)
    digests: dict[int, dict[PassKey, bytes]] = field(default_factory=dict)
    passes: dict[int, dict[PassKey, RecordedPass]] = field(default_factory=dict)
    padding: int = 0
    mtp_layers: set[int] = field(default_factory=set)

    def add(self, path: Path, mode: str, dump: Mapping[str, Any]) -> None:
        """Add one dump."""
        self.files.append(path)
        if mode == "stat":
            self._add_stat(path, dump)
            return
        logical_of = logical_map(dump, self.model, path)
        for index, record in enumerate(dump["records"]):
            at = Location(path, f"record {index}")
            rank = required_count(record, "rank", at)
            pass_id = required_count(record, "forward_pass_id", at)
            key = (pass_id, str(record.get("gatherer_key", "")))
            digests = self.digests.setdefault(rank, {})
            if key in digests:
                raise at.error(
                    f"forward pass {pass_id} of rank {rank} was read already",
                    "each pass of each rank once",
                    "give recordings of different runs different tasks",
                )
            if mode == "per_pass":
                calls, mtp_layers = read_pass_calls(record, logical_of, self.model, at)
                digests[key] = hashlib.sha256(calls.tobytes()).digest()
                if rank in self.sums:
                    calls = sum_calls(np.stack([self.sums[rank], calls]), at)
                self.sums[rank] = calls
            else:
                step = read_pass_tokens(record, logical_of, self.model, at)
                mtp_layers = step.mtp_layers
                digests[key] = step.tokens_digest
                self.padding += int((~step.recorded).sum())
                self.passes.setdefault(rank, {})[key] = step
            self.mtp_layers.update(mtp_layers)

    def _add_stat(self, path: Path, dump: Mapping[str, Any]) -> None:
        model, at = self.model, Location(path)
        rank = required_count(dump, "rank", at) if "rank" in dump else 0
        rows = array_of(dump, "logical_count", "S, L, E or L, E", at)
        at = at.within("'logical_count'")
        if rows.ndim == 2:  # summed already
            rows = rows[None]
        if rows.shape[2] != model.num_experts:
            expected = f"{model.num_experts} of {model.name}"
            raise at.error(f"{rows.shape[2]} experts", expected, CHECK_MODEL)
        require_decoder_layers(rows.shape[1], model, at)
        if rows.size and rows.min() < 0:
            row, layer, expert = np.unravel_index(int(rows.argmin()), rows.shape)
            where = at.within(f"row {row} layer {layer} expert {expert}")
            raise where.error(f"{rows.min()}", "counts of at least 0")
        calls = sum_calls(rows, at)
        self.mtp_layers.update(require_only_moe(calls != 0, model, "calls", at))
        calls = calls[list(model.moe_layers)]
        for other, seen in self.stat.get(rank, []):
            if calls.any() and np.array_equal(seen, calls):
                raise Location(path).error(
                    f"the same counts as in {other.name}",
                    "dumps of one rank to differ",
                    "remove the copy",
                )
        self.stat.setdefault(rank, []).append((path, calls))

    def counts(self, mode: str) -> Counts:
        """Calls [L, E] of dumps of mode stat or per_pass."""
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
            self._notify_of_copies(copies)
            parts = [self.sums[rank] for rank in ranks]
        calls = sum_calls(np.stack(parts), Location(self.files[0]))
        require_every_layer(self.task, calls, self.model, self.files[0])
        return calls

    def token_ranks(self) -> list[int]:
        """Ranks of dumps of mode per_token whose tokens are not those of another rank."""
        ranks, copies = self._distinct_ranks(
            lambda rank: any(step.recorded.any() for step in self.passes[rank].values())
        )
        for rank, twin in copies.items():
            ours, theirs = self.passes[rank], self.passes[twin]
            if not all(np.array_equal(ours[k].experts, theirs[k].experts) for k in ours):
                raise self._contradiction(
                    f"ranks {twin} and {rank} recorded the same tokens, but not the same experts"
                )
        for rank, other in itertools.combinations(ranks, 2):
            if _same_experts(self.passes[rank], self.passes[other]):
                raise self._contradiction(
                    f"ranks {rank} and {other} recorded the same experts, but not the same tokens"
                )
        self._notify_of_copies(copies)
        return ranks

    def _contradiction(self, found: str) -> InputError:
        return Location(self.files[0]).error(
            found,
            "ranks that agree in both or in neither",
            "where ranks share tokens or gather them before the gate, the recorder does "
            "not tell whose rows it kept: record responses (return_routed_experts) instead",
        )

    def _distinct_ranks(
        self, has_tokens: Callable[[int], bool]
    ) -> tuple[list[int], dict[int, int]]:
        """Ranks that recorded anything, and {copy: rank} of those that recorded the same."""
        kept: list[int] = []
        copies: dict[int, int] = {}
        for rank in sorted(self.digests):
            if has_tokens(rank):
                same = [other for other in kept if self.digests[rank] == self.digests[other]]
                if same:
                    copies[rank] = same[0]
                else:
                    kept.append(rank)
        if not kept:
            raise Location(self.files[0]).error(
                "no tokens in it", remedy="record while requests run"
            )
        return kept, copies

    def _notify_of_copies(self, copies: Mapping[int, int]) -> None:
        if copies:
            self.notify(
                f"task {self.task!r}: left out ranks {', '.join(map(str, copies))}, which "
                "recorded the same as another"
            )


def _same_experts(
    ours: Mapping[PassKey, RecordedPass], theirs: Mapping[PassKey, RecordedPass]
) -> bool:
    """Whether two ranks recorded the same rows in their common passes, too many for chance."""
    rows = 0
    for key in ours.keys() & theirs.keys():
        a, b = ours[key].experts, theirs[key].experts
        both = min(len(a), len(b))
        if not np.array_equal(a[:both], b[:both]):
            return False
        rows += both
    return rows >= MIN_COMMON_ROWS
