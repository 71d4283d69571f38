"""The servers that execute the layers of a home's requests: as planned, or around lost servers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.execution_table import Span, spans
from prism_plan.model_spec import ModelSpec
from prism_plan.placement import Placement, gpu_offsets
from prism_plan.simulate.network import Network
from prism_plan.simulate.timing import timing
from runtime_adapter.weights.expert_map import ExpertMap


@dataclass(frozen=True, eq=False)
class PathCosts:
    """Seconds that a token takes on a path, by a cluster's figures.

    ``dense_s`` [N, L] of a layer's dense part at each server; ``hop_s`` [N, N] of hidden states
    from server to server; ``call_s`` [N] of a call to the nearest other server, and back.
    """

    dense_s: npt.NDArray[np.float64]
    hop_s: npt.NDArray[np.float64]
    call_s: npt.NDArray[np.float64]

    @classmethod
    def of(cls, cluster: Cluster, model: ModelSpec) -> PathCosts:
        """Those of one token on idle servers, without context (docs/design.md, section 4)."""
        network, times = Network.of(cluster, model), timing(cluster, model, 1)
        servers = cluster.servers
        first_gpu = gpu_offsets(len(server.gpus) for server in servers).tolist()
        dense_s = [
            [
                times.dense_s(first + server.dense_gpu, layer, 1, 0)
                for layer in range(model.num_layers)
            ]
            for first, server in zip(first_gpu, servers, strict=False)
        ]
        message_s = network.half_rtt_s + network.token_bytes * network.seconds_per_byte
        call_s = message_s + message_s.T + network.call_overhead_s
        np.fill_diagonal(call_s, np.inf)
        return cls(np.array(dense_s), message_s + network.hop_overhead_s, call_s.min(axis=1))

    def of_layers(
        self, missing: npt.NDArray[np.int64], num_experts: int, top_k: int
    ) -> npt.NDArray[np.float64]:
        """Seconds of each layer at each server, [N, L], by the experts that it misses [N, L].

        A call is made where one of a token's experts is missing, each counted alike.
        """
        call_s = np.where(np.isfinite(self.call_s), self.call_s, 0.0)
        calls = 1.0 - (1.0 - missing / num_experts) ** top_k
        seconds: npt.NDArray[np.float64] = self.dense_s + calls * call_s[:, None]
        return seconds


def path_of_home(
    row: npt.NDArray[np.integer], placement: Placement, expert_map: ExpertMap, home: int,
    avoided: Collection[int], costs: PathCosts | None = None,
) -> tuple[Span, ...]:  # fmt: skip
    """The spans of a request of ``home`` that begins now; ``row`` [L] is what the table says.

    They are the table's where none of its servers is in ``avoided``, else :func:`shortest_path`:
    by ``costs`` where they are known. If not, it misses the fewest experts, for a running server
    does not know how often each is called; of such paths it has the fewest hops a pass, and then
    the lowest servers (docs/design.md, section 10).
    """
    if (row != home).any() and set(row.tolist()).intersection(avoided):
        missing = missing_experts(expert_map, placement)
        num_servers, num_layers = missing.shape
        if costs is None:
            hops = 1.0 - np.eye(num_servers)
            row = shortest_path(missing * (num_layers + 3.0), hops, home, avoided)
        else:
            model = placement.model
            layer_s = costs.of_layers(missing, model.num_experts, model.top_k)
            row = shortest_path(layer_s, costs.hop_s, home, avoided)
    return tuple(spans(row))


def missing_experts(expert_map: ExpertMap, placement: Placement) -> npt.NDArray[np.int64]:
    """Experts of each layer that a server does not hold, but another one does, int64 [N, L]."""
    model = placement.model
    held = (expert_map.gpu_of >= 0).reshape(-1, model.num_layers, model.num_experts)
    missing: npt.NDArray[np.int64] = (held.any(axis=0) & ~held).sum(axis=2)
    return missing


def shortest_path(
    layer: npt.NDArray[np.float64], hop: npt.NDArray[np.float64], home: int,
    avoided: Collection[int] = (),
) -> npt.NDArray[np.int64]:  # fmt: skip
    """The server of each layer, int64 [L], at the least cost without ``avoided`` servers.

    ``layer`` [N, L] is what each layer costs at each server, ``hop`` [N, N] the way from one to
    another, 0 to itself; the ways from and to ``home`` count. Of equal ones it has the lowest
    servers first.
    """
    num_servers, num_layers = layer.shape
    usable = [n for n in range(num_servers) if n == home or n not in avoided]
    cost, way = layer[usable], hop[np.ix_(usable, usable)]
    best = cost[:, -1] + hop[usable, home]  # from each server to the end, and home
    choices = []
    for at_layer in range(num_layers - 2, -1, -1):
        onward = way + best  # [from, to]
        choices.append(onward.argmin(axis=1))
        best = cost[:, at_layer] + onward.min(axis=1)
    at = int((best + hop[home, usable]).argmin())
    row = [usable[at]]
    for choice in reversed(choices):
        at = int(choice[at])
        row.append(usable[at])
    return np.array(row)
