"""Which runs of whole layers fit a server, with the KV caches of the homes that they serve."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.errors import Infeasible
from prism_plan.expert_capacity import cache_bytes, server_capacity
from prism_plan.instance import Instance
from prism_plan.model_spec import ModelSpec

Ints = npt.NDArray[np.int64]


class RunMemory:
    """Runs of layers and the memory of servers, as the cluster gives it.

    Experts lie on any GPU of a server, KV caches with the dense part. Where experts differ in size
    a server of several GPUs is taken to waste an expert of the largest size on all but one: so much
    is enough for experts dealt out in any order.
    """

    def __init__(self, instance: Instance, cluster: Cluster, model: ModelSpec) -> None:
        self._cluster, self._model = cluster, model
        self._capacity: list[dict[int, tuple[int, ...] | None]] = [{} for _ in cluster.servers]
        size = instance.expert_size * model.num_experts
        self._until = np.concatenate([[0], np.cumsum(size)])  # of layers before each, [L + 1]
        self._largest = 0 if instance.in_slots else int(instance.expert_size.max())
        self._tokens = np.array([server.kv_tokens for server in cluster.servers], np.int64)
        self._at_home = np.array([server.execute_at_home for server in cluster.servers])
        self._known: dict[tuple[int, int], Ints] = {}
        self._kv_until = np.concatenate([[0], np.cumsum(model.decoder_layers_by_layer)])

    def fits_until(self, members: Sequence[int]) -> Ints:
        """The end of the longest run from each layer on each server, int64 [N, L].

        It is the layer itself where no run fits. ``members`` are the servers of a group: they serve
        the homes among them that do not execute at home.
        """
        found = np.repeat(np.arange(self._model.num_layers)[None], len(self._tokens), axis=0)
        served = [n for n in members if not self._at_home[n]]
        tokens = int(self._tokens[served].sum()) if self._model.kv_bytes_per_token else 0
        for m in members:
            key = m, tokens
            if key not in self._known:
                self._known[key] = self._run_ends(m, tokens)
            found[m] = self._known[key]
        return found

    def _run_ends(self, server: int, tokens: int) -> Ints:
        """A row of :meth:`fits_until`, for homes of so many tokens."""
        layers = self._model.num_layers
        ends = np.arange(layers)
        end = 0
        for begin in range(layers):  # a part of a run fits where the run does
            end = max(end, begin)
            while end < layers and self._fits(server, begin, end + 1, tokens):
                end += 1
            ends[begin] = end
        return ends

    def _fits(self, server: int, begin: int, end: int, tokens: int) -> bool:
        needed = int(self._until[end] - self._until[begin])
        token_layers = tokens * int(self._kv_until[end] - self._kv_until[begin])
        if self._at_home[server]:
            token_layers += int(self._tokens[server]) * self._model.num_decoder_layers
        kv = cache_bytes(self._model, token_layers)
        if kv not in self._capacity[server]:
            try:
                found = server_capacity(self._model, self._cluster.servers[server], kv)
            except Infeasible:
                found = None
            self._capacity[server][kv] = found
        limit = self._capacity[server][kv]
        return limit is not None and needed <= sum(limit) - (len(limit) - 1) * self._largest


def deal_out(
    capacity: Sequence[int],
    layers: Sequence[int],
    instance: Instance,
    load: npt.NDArray[np.float64],
) -> npt.NDArray[np.bool_]:  # fmt: skip
    """Whole layers of a server on its GPUs, each layer's experts side by side, bool [GPUs, L, E].

    Experts go one by one, by falling ``load`` [L, E], to the GPU that is then filled least in
    proportion to its ``capacity``: GPUs work on a layer at the same time, so that a layer is as
    fast as its slowest GPU. Ties: lowest GPU.
    """
    packed = np.zeros((len(capacity), instance.model.num_layers, instance.model.num_experts), bool)
    if len(capacity) == 1:
        packed[0, list(layers)] = True
        return packed
    used = [0] * len(capacity)
    for layer in layers:
        size = int(instance.expert_size[layer])
        for expert in np.argsort(-load[layer], kind="stable").tolist():
            with_room = [g for g, room in enumerate(capacity) if used[g] + size <= room]
            gpu = min(with_room, key=lambda g: (used[g] + size) / capacity[g])
            packed[gpu, layer, expert] = True
            used[gpu] += size
    return packed
