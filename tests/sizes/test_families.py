"""Every MoE family of the installed transformers: the same sizes every way, or the true reason."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from prism_plan.errors import InputError
from tests.sizes.families import NotBuilt, built, read_every_way, text_families, tiny_config

#: Families that are refused, and a part of the reason.
REFUSED = {
    "jetmoe": "attention is routed to experts too",
    "longcat_flash": "4 and 6 experts in a layer",
    "nllb-moe": "expected a model that decodes only",
    "switch_transformers": "expected a model that decodes only",
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    """No warnings of tiny vocabularies."""
    warnings.simplefilter("ignore")


def test_every_family(tmp_path: Path) -> None:
    """Loaded, from headers and from the configuration alone: layers, bytes, cache and FLOPs agree.

    Parts of multimodal models that are configured on their own have no class of a language model.
    """
    found: dict[str, str] = {}
    equal = 0
    for family in text_families():
        try:
            spec, *others = read_every_way(family, tmp_path / family)
        except NotBuilt:
            continue
        except InputError as error:
            found[family] = str(error)
            continue
        assert all(other == spec for other in others), family
        equal += bool(others)
    parts = {family for family, words in found.items() if "no class of a language model" in words}
    assert found.keys() - parts == REFUSED.keys() & found.keys()
    for family, words in REFUSED.items():
        assert words in found.get(family, words)
    assert equal >= 50


@pytest.mark.parametrize(
    "family",
    [
        *("qwen3_next", "qwen3_5_moe_text", "jamba", "lfm2_moe", "minimax", "kimi_linear"),
        *("granitemoehybrid", "nemotron_h", "bailing_hybrid", "lara_mini", "qwen3_moe"),
    ],
)
def test_layers_that_cache(family: str) -> None:
    """Layers of full attention, by the family's own list, are those that cache keys and values."""
    from prism_plan.sizes.loaded_model import spec_from_loaded_model

    config = tiny_config(family)
    spec = spec_from_loaded_model(built(config))
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    caching = sum("attention" in kind and "linear" not in kind for kind in kinds)
    rank = getattr(config, "kv_lora_rank", None)
    numbers = rank + config.qk_rope_head_dim if rank else 2 * 2 * 16
    assert spec.kv_bytes_per_token == 2 * caching * numbers
    assert 0 < caching <= spec.num_decoder_layers
