"""Replaces the experts modules of a model, so that its experts run where the placement has them.

A module of the model passes the gate's choice to an :class:`ExpertBackend`, which computes it here
or on other servers. The sum over a token's experts is taken in float32 for narrower types, as
transformers' grouped kernels do.
"""

from __future__ import annotations

from typing import Protocol

import torch

from prism_plan.errors import InputError
from runtime_adapter.weights.expert_store import ExpertStore


class ExpertBackend(Protocol):
    """What a placed model calls for its experts."""

    def run(
        self,
        layer_position: int,
        hidden: torch.Tensor,
        experts: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """The weighted sum over the K experts of each token.

        hidden [T, H], experts int [T, K], weights [T, K]; the result is [T, H] in ``hidden``'s
        dtype and on its device.
        """
        ...


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which outputs of experts are added: float32 for narrower types."""
    promoted: torch.dtype = torch.promote_types(dtype, torch.float32)
    return promoted


def weighted_sum(
    store: ExpertStore,
    layer_position: int,
    hidden: torch.Tensor,
    token: torch.Tensor,
    expert: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    """Each token's weighted sum over some of its experts.

    Parameters
    ----------
    hidden
        [T, H].
    token, expert, weight
        [C], one entry a call: a row of ``hidden``, an expert of the layer, and its gate weight.
        ``token`` ascends; no (token, expert) comes twice.

    Returns
    -------
    torch.Tensor
        [T, H] in :func:`sum_dtype`; 0 for a token without a call.
    """
    dtype = sum_dtype(hidden.dtype)
    total = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    if len(hidden) == 1:  # decoding: every expert is called with the one token
        for call, e in enumerate(expert.tolist()):
            total += store.compute(layer_position, e, hidden).to(dtype) * weight[call]
        return total
    order = torch.argsort(expert, stable=True)
    experts, counts = torch.unique_consecutive(expert[order], return_counts=True)
    begin = 0
    for e, count in zip(experts.tolist(), counts.tolist(), strict=True):
        calls = order[begin : begin + count]
        begin += count
        rows = token[calls]
        out = store.compute(layer_position, e, hidden[rows])
        total.index_add_(0, rows, out.to(dtype) * weight[calls, None].to(dtype))
    return total


class PlacedExperts(torch.nn.Module):  # type: ignore[misc]
    """Takes the place of the experts module of a MoE layer; has no weights."""

    def __init__(self, layer_position: int, backend: ExpertBackend) -> None:
        super().__init__()
        self.layer_position = layer_position
        self.backend = backend

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """What transformers' experts modules compute: [T, H] of hidden [T, H] and choices [T, K].

        Raises
        ------
        InputError
            The model is being trained: placed experts have no gradients.
        """
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            raise InputError(
                "experts that are placed cannot be trained", remedy="run under torch.no_grad()"
            )
        return self.backend.run(self.layer_position, hidden_states, top_k_index, top_k_weights)
