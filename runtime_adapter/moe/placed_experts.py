"""The experts module of a model whose experts are elsewhere.

The module in the model only hands on what the gate chose; a :class:`Dispatcher` gets it computed,
here or on other servers. The sum over a token's experts is taken in float32 for narrower types, as
transformers' grouped kernels do.
"""

from __future__ import annotations

from typing import Protocol

import torch

from prism_plan.errors import InputError


class Dispatcher(Protocol):
    """Computes the routed experts of one layer for some tokens."""

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


class Computes(Protocol):
    """What an :class:`~runtime_adapter.weights.expert_store.ExpertStore` can do with one expert."""

    def compute(self, layer_position: int, expert: int, x: torch.Tensor) -> torch.Tensor:
        """The expert's output for x [t, H], [t, H]."""
        ...


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which outputs of experts are added: float32 for narrower types."""
    wide: torch.dtype = torch.promote_types(dtype, torch.float32)
    return wide


def weighted_sum(
    store: Computes,
    layer_position: int,
    hidden: torch.Tensor,
    token: torch.Tensor,
    expert: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    """Each token's weighted sum over those of its experts that are named.

    Parameters
    ----------
    hidden
        [T, H].
    token, expert, weight
        [n], one entry a (token, expert) named: a row of ``hidden``, an expert of the layer, and its
        gate weight. ``token`` ascends; no (token, expert) is named twice.

    Returns
    -------
    torch.Tensor
        [T, H] in :func:`sum_dtype`; 0 for a token that is not named.
    """
    wide = sum_dtype(hidden.dtype)
    total = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
    if len(hidden) == 1:  # decoding: every expert is called with the one token
        for at, one in enumerate(expert.tolist()):
            total += store.compute(layer_position, one, hidden).to(wide) * weight[at]
        return total
    order = torch.argsort(expert, stable=True)
    names, counts = torch.unique_consecutive(expert[order], return_counts=True)
    begin = 0
    for one, count in zip(names.tolist(), counts.tolist(), strict=True):
        rows = order[begin : begin + count]
        begin += count
        at = token[rows]
        out = store.compute(layer_position, one, hidden[at])
        total.index_add_(0, at, out.to(wide) * weight[rows, None].to(wide))
    return total


class LocalDispatcher:
    """All experts are in one store: a model in one process."""

    def __init__(self, store: Computes) -> None:
        self.store = store

    def run(
        self,
        layer_position: int,
        hidden: torch.Tensor,
        experts: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """See :class:`Dispatcher`."""
        tokens, top_k = experts.shape
        token = torch.arange(tokens, device=experts.device).repeat_interleave(top_k)
        total = weighted_sum(
            self.store, layer_position, hidden, token, experts.reshape(-1), weights.reshape(-1)
        )
        return total.to(hidden.dtype)


class PlacedExperts(torch.nn.Module):  # type: ignore[misc]
    """Stands where the experts module of a MoE layer was; has no weights."""

    def __init__(self, layer_position: int, dispatcher: Dispatcher) -> None:
        super().__init__()
        self.layer_position = layer_position
        self.dispatcher = dispatcher

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """What transformers' experts modules compute: [T, H] of hidden [T, H] and choices [T, K].

        Raises
        ------
        InputError
            The model is being trained: experts elsewhere have no gradients.
        """
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            raise InputError(
                "experts that are placed cannot be trained", remedy="run under torch.no_grad()"
            )
        return self.dispatcher.run(self.layer_position, hidden_states, top_k_index, top_k_weights)
