"""An expert backend without a network: all experts of a model in one store."""

from __future__ import annotations

import torch

from runtime_adapter.moe.placed_experts import weighted_sum
from runtime_adapter.weights.expert_store import ExpertStore


class LocalBackend:
    """All experts are in one store: a model in one process."""

    def __init__(self, store: ExpertStore) -> None:
        self.store = store

    def run(
        self,
        layer_position: int,
        hidden: torch.Tensor,
        experts: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """See `runtime_adapter.moe.placed_experts.ExpertBackend`."""
        tokens, top_k = experts.shape
        token = torch.arange(tokens, device=experts.device).repeat_interleave(top_k)
        total = weighted_sum(
            self.store, layer_position, hidden, token, experts.reshape(-1), weights.reshape(-1)
        )
        return total.to(hidden.dtype)
