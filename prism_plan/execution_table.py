"""Where layers execute: execution tables and their spans (docs/design.md, section 10)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]


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


def spans(row: npt.NDArray[np.integer]) -> list[Span]:
    """The spans of one home's row [L] of a table, in the order in which they execute."""
    starts = np.flatnonzero(np.concatenate([[True], row[1:] != row[:-1]])).tolist()
    ends = [*starts[1:], len(row)]
    return [Span(a, b - 1, int(row[a])) for a, b in zip(starts, ends, strict=True)]
