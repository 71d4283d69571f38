"""Several servers in one process: what the transport does, without the transport."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from runtime_adapter.moe.placed_experts import weighted_sum
from runtime_adapter.weights.checkpoint import Checkpoint
from runtime_adapter.weights.expert_store import ExpertStore
from runtime_adapter.weights.server_experts import load_server_experts


class SplitBackend:
    """Local experts at home; for each other server one message, each token once, one sum back.

    An expert that is not at home is asked of the holder that comes first after home. ``messages``
    counts the messages of one layer by destination; ``tokens`` the tokens that were sent.
    """

    def __init__(self, stores: list[ExpertStore], home: int) -> None:
        self.stores = stores
        self.home = home
        self.messages: Counter[int] = Counter()
        self.tokens: Counter[int] = Counter()
        self.calls = 0

    def run(self, layer_position: int, hidden: Any, experts: Any, weights: Any) -> Any:
        """See `runtime_adapter.moe.placed_experts.ExpertBackend`."""
        servers = [(self.home + step) % len(self.stores) for step in range(len(self.stores))]
        number = self.stores[0].shape.spec.num_experts
        by_server: dict[int, list[tuple[int, int, Any]]] = {}
        for token, row in enumerate(experts.tolist()):
            for k, expert in enumerate(row):
                pair = layer_position * number + expert
                server = next(n for n in servers if self.stores[n].has(pair))
                by_server.setdefault(server, []).append((token, expert, weights[token, k]))
                self.calls += 1
        total = 0
        for server, named in by_server.items():
            tokens = sorted({token for token, _, _ in named})  # each token once
            row = {token: at for at, token in enumerate(tokens)}
            part = weighted_sum(
                self.stores[server],
                layer_position,
                hidden[tokens],
                torch.tensor([row[token] for token, _, _ in named]),
                torch.tensor([expert for _, expert, _ in named]),
                torch.stack([weight for _, _, weight in named]),
            )
            if server != self.home:
                self.messages[server] += 1
                self.tokens[server] += len(tokens)
                part = part.to(hidden.dtype)  # as it comes back over the wire
            total = total + torch.zeros_like(hidden, dtype=part.dtype).index_add_(
                0, torch.tensor(tokens), part
            )
        return total.to(hidden.dtype)


def stores_of(checkpoint: Checkpoint, placement: Any, dtype: Any) -> list[ExpertStore]:
    """A store for each server of a placement, on the CPU."""
    return [
        load_server_experts(checkpoint, placement, n, [torch.device("cpu")] * len(gpus), dtype)
        for n, gpus in enumerate(placement.gpu_capacity)
    ]
