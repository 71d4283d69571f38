"""Small models with layers without experts among their layers."""

from __future__ import annotations

import numpy as np

from prism_plan.model_spec import ModelSpec


def model_of(moe_layers: tuple[int, ...], num_experts: int, num_layers: int) -> ModelSpec:
    """A model of so many decoder layers, these of them with experts of 10 bytes."""
    return ModelSpec(
        name="small", moe_layers=moe_layers, num_experts=num_experts, top_k=1, hidden_size=8,
        dtype_bytes=2, expert_bytes=10, dense_bytes=10, kv_bytes_per_token=0,
        num_decoder_layers=num_layers,
    )  # fmt: skip


def drawn_model(rng: np.random.Generator) -> ModelSpec:
    """Up to eight decoder layers, some of them dense, and two to six experts."""
    decoder = int(rng.integers(1, 9))
    moe = sorted(rng.choice(decoder, int(rng.integers(1, decoder + 1)), replace=False).tolist())
    return model_of(tuple(moe), int(rng.integers(2, 7)), decoder)
