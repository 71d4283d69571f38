"""Configs of multimodal models, and values of Python's JSON that are no numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prism_plan.errors import InputError
from prism_plan.model import PRESETS
from prism_plan.model_config import FAMILIES, spec_from_config, spec_from_config_file
from tests.test_model_config import DEEPSEEK_V2_LITE, GPT_OSS_20B, QWEN3_30B, without

NESTED = ("text_config", "language_config", "llm_config", "thinker_config")
VISION = {"model_type": "siglip", "hidden_size": 1152, "num_hidden_layers": 27}

#: DeepSeek-VL2's language model, small: layers 1 and 2 with 4 experts of width 32.
LANGUAGE: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "vocab_size": 256,
}


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        spec_from_config(values, source="config.json")
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# ----------------------------------------------------------------------------------------- nested


def test_the_language_config_of_deepseek_vl2() -> None:
    """Sizes are those of the language model, written out; the dtype stands outside of it."""
    outer = {"model_type": "deepseek_vl_v2", "torch_dtype": "bfloat16", "vision_config": VISION}
    spec = spec_from_config(outer | {"language_config": LANGUAGE}, name="vl2")
    assert (spec.moe_layers, spec.num_experts, spec.top_k) == ((1, 2), 4, 2)
    assert spec.expert_bytes == 3 * 64 * 32 * 2
    assert spec.kv_bytes_per_token == 3 * (16 + 8) * 2
    attention = 4 * 24 * 64 + 24 * 64 + 16 + 4 * 32 * 16 + 64 * 4 * 16
    numbers = 2 * 256 * 64 + 64 + 3 * (attention + 2 * 64) + 3 * 64 * 128
    numbers += 2 * (4 * 64 + 3 * 64 * 32)  # gates and shared experts
    assert spec.dense_bytes == 2 * numbers


@pytest.mark.parametrize("inner", [DEEPSEEK_V2_LITE, QWEN3_30B, GPT_OSS_20B])
@pytest.mark.parametrize("key", NESTED)
def test_every_key_of_a_language_model_is_read(key: str, inner: dict[str, Any]) -> None:
    """Under each key the sizes are those of the language model alone."""
    outer = {"model_type": "some_vl", key: inner, "vision_config": VISION}
    assert spec_from_config(outer, name="x") == spec_from_config(inner, name="x")


def test_two_levels_down() -> None:
    """The Omni models hold it two levels down; dtype and ties may stand in any of the levels."""
    inner = without(QWEN3_30B, "torch_dtype", "tie_word_embeddings")
    thinker = {"model_type": "thinker", "text_config": inner, "tie_word_embeddings": True}
    outer = {"model_type": "omni", "thinker_config": thinker, "dtype": "float32"}
    whole = inner | {"tie_word_embeddings": True, "dtype": "float32"}
    assert spec_from_config(outer, name="x") == spec_from_config(whole, name="x")
    spoilt = outer | {"thinker_config": thinker | {"text_config": inner | {"vocab_size": -1}}}
    assert "thinker_config.text_config.vocab_size: -1" in refusal(spoilt)
    quantised = outer | {"thinker_config": thinker | {"quantization": {"bits": 4}}}
    assert "thinker_config.quantization: {'bits': 4}" in refusal(quantised)


def test_the_inner_sizes_count() -> None:
    """Where sizes stand inside and outside (DeepSeek-OCR), those of the language model count."""
    outer = without(QWEN3_30B, "torch_dtype") | {"model_type": "ocr", "hidden_size": 1280}
    spec = spec_from_config(outer | {"language_config": DEEPSEEK_V2_LITE}, name="deepseek-v2-lite")
    assert spec == PRESETS["deepseek-v2-lite"]


def test_a_known_family_is_read_for_itself() -> None:
    """A config of a known family is read at its top, whatever else it holds."""
    both = QWEN3_30B | {"text_config": DEEPSEEK_V2_LITE}
    assert spec_from_config(both) == spec_from_config(QWEN3_30B)


def test_a_language_model_without_model_type() -> None:
    """The class name tells the family where an inner config gives no model_type."""
    inner = without(LANGUAGE, "model_type") | {"architectures": ["DeepseekV2ForCausalLM"]}
    outer = {"model_type": "deepseek_vl_v2", "language_config": inner}
    assert spec_from_config(outer, name="x") == spec_from_config(LANGUAGE, name="x")
    unknown = outer | {"language_config": inner | {"architectures": ["JambaForCausalLM"]}}
    assert "language_config.model_type: key 'model_type' is missing" in refusal(unknown)


def test_the_class_names_are_those_of_transformers() -> None:
    """Each family's class name is the one under which transformers saves it."""
    names = pytest.importorskip("transformers.models.auto.modeling_auto")
    from prism_plan.model_config import _ARCHITECTURES

    assert set(_ARCHITECTURES.values()) == set(FAMILIES)
    for architecture, family in _ARCHITECTURES.items():
        assert names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family] == architecture


def test_two_language_models_are_refused() -> None:
    """Which of two is meant is not guessed."""
    both = {"model_type": "some_vl", "text_config": QWEN3_30B, "llm_config": LANGUAGE}
    assert "llm_config: " in (message := refusal(both))
    assert "one language model, and there is text_config too" in message
    assert "has no MoE layers" not in message


def test_ordinary_attention_is_no_latent_attention() -> None:
    """DeepSeek-OCR's language model says that it has no latent attention: refused by that key."""
    inner = LANGUAGE | {"use_mla": False, "kv_lora_rank": None, "qk_rope_head_dim": 0}
    message = refusal({"model_type": "deepseek_vl_v2", "language_config": inner})
    assert "language_config.use_mla: False" in message
    assert spec_from_config(LANGUAGE | {"use_mla": True}) == spec_from_config(LANGUAGE)


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "dbrx", "ffn_config": {"moe_num_experts": 16}},
        {"model_type": "x", "language_model": LANGUAGE},
        {"model_type": "x", "language_config": {"model_type": "y", "ffn": {"num_experts": 8}}},
        {"model_type": "some_moe", "hidden_size": 64},
        {"model_type": "omni", "thinker_config": {"model_type": "t", "text_config": QWEN3_30B}}
        | {"talker_config": {"num_experts": 8}, "text_config": {"model_type": "llama"}},
    ],
    ids=["dbrx", "another key", "two levels", "by its name", "several"],
)
def test_experts_at_any_depth_are_not_denied(values: dict[str, Any]) -> None:
    """A config that speaks of experts anywhere is refused without calling the model dense."""
    message = refusal(values)
    assert "has no MoE layers" not in message
    assert "model spec" in message


def test_a_dense_multimodal_model_is_called_dense() -> None:
    """A wrapper in which nothing speaks of experts has no MoE layers."""
    dense = {"model_type": "llama", "hidden_size": 4096}
    for values in ({"vision_config": VISION}, {"language_config": dense}):
        assert "has no MoE layers" in refusal({"model_type": "llava"} | values)


# ------------------------------------------------------------------------------------- non-finite


@pytest.mark.parametrize("word", ["Infinity", "-Infinity", "NaN"])
@pytest.mark.parametrize("place", ["%s", "[0.0, %s]", '{"limit": [%s]}'])
def test_a_key_that_no_size_needs_may_be_no_number(word: str, place: str, tmp_path: Path) -> None:
    """Python's words for what is no number do not stop the reading of a config.json."""
    path = tmp_path / "config.json"
    text = json.dumps(DEEPSEEK_V2_LITE)
    path.write_text(f'{text[:-1]}, "time_step_limit": {place % word}}}')
    assert spec_from_config_file(path) == spec_from_config(DEEPSEEK_V2_LITE, name=tmp_path.name)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(
    "key", ["hidden_size", "moe_layer_freq", "n_routed_experts", "tie_word_embeddings", "dtype"]
)
def test_a_key_that_sizes_need_is_named(key: str, value: float, tmp_path: Path) -> None:
    """Where a size depends on it, the message names the key and the word in the file."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(DEEPSEEK_V2_LITE | {key: value}))
    with pytest.raises(InputError) as caught:
        spec_from_config_file(path)
    assert str(caught.value).startswith(f"{path}: {key}: {json.dumps(value)}; expected")


@pytest.mark.parametrize("key", ["expert_bytes", "dense_bytes", "top_k"])
def test_a_model_spec_of_ours_holds_numbers(key: str, tmp_path: Path) -> None:
    """Sizes by hand are of our format: a word that is no number is refused by its key."""
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(PRESETS["mixtral-8x7b"].to_json() | {key: float("inf")}))
    with pytest.raises(InputError, match=rf"spec\.json: model\.{key}: inf"):
        spec_from_config_file(path)
