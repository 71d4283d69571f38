"""The servers that execute the layers of a home's requests: as planned, or around lost servers."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from prism_plan.execution_table import Span, spans
from prism_plan.placement import Placement
from runtime_adapter.weights.expert_map import ExpertMap


def path_of_home(
    row: npt.NDArray[np.integer], placement: Placement, expert_map: ExpertMap, home: int,
    avoided: Collection[int],
) -> tuple[Span, ...]:  # fmt: skip
    """The spans of a request of ``home`` that begins now; ``row`` [L] is what the table says.

    They are the table's where none of its servers is in ``avoided``, else :func:`shortest_path`.
    """
    if (row != home).any() and set(row.tolist()).intersection(avoided):
        row = shortest_path(missing_experts(expert_map, placement), home, avoided)
    return tuple(spans(row))


def missing_experts(expert_map: ExpertMap, placement: Placement) -> npt.NDArray[np.int64]:
    """Experts of each layer that a server does not hold, but another one does, int64 [N, L]."""
    model = placement.model
    held = (expert_map.gpu_of >= 0).reshape(-1, model.num_layers, model.num_experts)
    missing: npt.NDArray[np.int64] = (held.any(axis=0) & ~held).sum(axis=2)
    return missing


def shortest_path(
    missing: npt.NDArray[np.int64], home: int, avoided: Collection[int] = ()
) -> npt.NDArray[np.int64]:
    """The server of each layer, int64 [L], without ``avoided`` ones; ``missing`` is [N, L].

    It misses the fewest experts, each layer counted alike, for a running server does not know how
    often each is called; of such paths it has the fewest hops a pass, and then the lowest servers
    (docs/design.md, section 10).
    """
    num_servers, num_layers = missing.shape
    usable = [n for n in range(num_servers) if n == home or n not in avoided]
    cost = missing[usable] * (num_layers + 3)  # more than all hops of a pass
    away = (np.array(usable) != home).astype(np.int64)
    hop = 1 - np.eye(len(usable), dtype=np.int64)
    best = cost[:, -1] + away  # from each server to the end, the way home included
    choices = []
    for layer in range(num_layers - 2, -1, -1):
        onward = hop + best  # [from, to]
        choices.append(onward.argmin(axis=1))
        best = cost[:, layer] + onward.min(axis=1)
    at = int((best + away).argmin())
    row = [usable[at]]
    for choice in reversed(choices):
        at = int(choice[at])
        row.append(usable[at])
    return np.array(row)
