"""Sizes of a model in memory: what it would store, each tensor once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from prism_plan.sizes.load import load_model_spec  # noqa: E402
from prism_plan.sizes.loaded_model import spec_from_loaded_model  # noqa: E402

TRACES = Path(__file__).parents[2] / "traces"


def loaded(name: str, **more: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(TRACES / name, **more)


@pytest.mark.parametrize("name", ["tiny-mixtral", "tiny-deepseek-v2"])
def test_a_loaded_checkpoint_has_the_sizes_of_its_file(name: str) -> None:
    """Also where transformers holds routers in float32 (DeepSeek-V2)."""
    assert spec_from_loaded_model(loaded(name)) == load_model_spec(TRACES / name)


def test_the_dtype_in_memory_counts() -> None:
    """A model that was loaded in float32 has twice the bytes."""
    half, whole = (
        load_model_spec(TRACES / "tiny-mixtral"),
        spec_from_loaded_model(loaded("tiny-mixtral").float()),
    )
    assert (whole.dtype_bytes, whole.dense_bytes) == (4, 2 * half.dense_bytes)
    assert whole.expert_bytes_by_layer[0] == 2 * half.expert_bytes_by_layer[0]


def test_shared_parameters_count_once() -> None:
    """An output head that shares its weight with the embeddings."""
    model = loaded("tiny-mixtral")
    before = spec_from_loaded_model(model).dense_bytes
    model.lm_head.weight = model.model.embed_tokens.weight
    assert spec_from_loaded_model(model).dense_bytes == before - 2 * 259 * 64


class Quantised(torch.nn.Module):
    """A linear layer in 4 bits with a scale for each row, as quantising libraries hold them."""

    def __init__(self, out: int, into: int) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(out, into // 2, dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros(out, 1, dtype=torch.float16))


def test_quantised_modules_count_what_they_store() -> None:
    """Buffers of quantised modules, and parameters of whole numbers, in their own sizes."""
    model = loaded("tiny-mixtral")
    before = spec_from_loaded_model(model)
    model.model.layers[0].self_attn.q_proj = Quantised(64, 64)
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            numbers = getattr(layer.mlp.experts, name).data.to(torch.int8)
            setattr(layer.mlp.experts, name, torch.nn.Parameter(numbers, requires_grad=False))
    after = spec_from_loaded_model(model)
    assert after.dense_bytes == before.dense_bytes - 2 * 64 * 64 + 64 * 32 + 2 * 64
    assert 2 * after.expert_bytes_by_layer[0] == before.expert_bytes_by_layer[0]
