"""Where layers execute: execution tables and their spans (docs/design.md, section 10)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class TableChange:
    """When a new execution table begins, beside the steps of a migration.

    ``execution`` int32 [N, L] is for requests that are admitted once the first ``begins_after``
    steps are complete (0: at once); a request keeps the table that it was admitted with. Steps from
    ``waits_from`` on start when the table has begun and no request runs on an older one.
    ``begins_after`` is 0 or ``waits_from``; other values raise ``ValueError``.
    """

    execution: Ints
    begins_after: int
    waits_from: int

    def __post_init__(self) -> None:
        if self.waits_from < 0 or self.begins_after not in (0, self.waits_from):
            raise ValueError(f"begins after {self.begins_after}, waits from {self.waits_from}")


class Span(NamedTuple):
    """A maximal run of MoE layers that one server executes: layer positions, and the server."""

    first: int
    last: int
    server: int


def home_execution(num_servers: int, num_layers: int) -> Ints:
    """The table of plans that execute every layer at the request's home server, int32 [N, L]."""
    return np.repeat(np.arange(num_servers, dtype=np.int32)[:, None], num_layers, axis=1)


def executed_elsewhere(table: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """Which layers of which home execute on another server, bool [N, L]."""
    elsewhere: npt.NDArray[np.bool_] = table != np.arange(len(table))[:, None]
    return elsewhere


def executes_at_home(table: npt.NDArray[np.integer]) -> bool:
    """Whether every layer executes at the home server, by a table [N, L]."""
    return not executed_elsewhere(table).any()


def layers_by_server(
    table: npt.NDArray[np.integer], moe_layers: Sequence[int], homes: npt.NDArray[np.bool_]
) -> list[str]:
    """Which layers each server executes for some home, by decoder layer index: "1-18, 26", or "".

    ``table`` is int32 [N, L]; ``homes`` bool [N] are the rows that count.
    """
    layers = np.array(moe_layers)
    texts = []
    for server in range(len(table)):
        executed = np.flatnonzero((table[homes] == server).any(axis=0))
        runs = np.split(executed, np.flatnonzero(np.diff(executed) > 1) + 1)
        ends = [(layers[run[0]], layers[run[-1]]) for run in runs if len(run)]
        texts.append(", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in ends))
    return texts


def moved_activations(
    activations: npt.NDArray[np.float64], table: npt.NDArray[np.integer]
) -> npt.NDArray[np.float64]:
    """Calls by the server that executes the layer, g[m, l, e], of those by home, f[n, l, e].

    g[m, l, e] is the sum of f[n, l, e] over the homes n whose layer l executes at m, float64
    [N, L, E]; with every layer at home it is f.
    """
    moved = np.zeros_like(activations)
    layers = np.arange(table.shape[1])
    for calls, row in zip(activations, table, strict=True):
        moved[row, layers] += calls
    return moved


def spans(row: npt.NDArray[np.integer]) -> list[Span]:
    """The spans of one home's row [L] of a table, in the order in which they execute."""
    starts = np.flatnonzero(np.concatenate([[True], row[1:] != row[:-1]])).tolist()
    ends = [*starts[1:], len(row)]
    return [Span(a, b - 1, int(row[a])) for a, b in zip(starts, ends, strict=True)]
