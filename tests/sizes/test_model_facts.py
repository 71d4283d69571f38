"""A bare config.json: sizes from the meta device, and values that make no sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from prism_plan.errors import InputError
from prism_plan.model_spec import PRESETS
from prism_plan.sizes.load import load_model_spec
from prism_plan.sizes.meta_device import spec_from_config
from prism_plan.sizes.model_facts import read_facts

CONFIGS = Path(__file__).parent.parent / "golden" / "inputs" / "configs"


def config_of(name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((CONFIGS / name / "config.json").read_text())
    return values


MIXTRAL, V2_LITE = config_of("mixtral-8x7b"), config_of("deepseek-v2-lite")
QWEN3, OLMOE = config_of("qwen3-30b-a3b"), config_of("olmoe-1b-7b")


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def refusal(values: Any) -> str:
    with pytest.raises(InputError) as caught:
        spec_from_config(values, source="some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json: ")
    assert len(message.splitlines()) == 1
    return message


# --------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v2-lite"])
def test_a_config_gives_the_preset(name: str) -> None:
    """The configurations of the two first presets give their sizes, in bfloat16."""
    assert spec_from_config(config_of(name), name=name) == PRESETS[name]


def test_dtype_and_ties_count(tmp_path: Path) -> None:
    """float32 doubles every size; tied embeddings count once; some absent keys are the family's."""
    whole, double = spec_from_config(OLMOE), spec_from_config(OLMOE | {"torch_dtype": "float32"})
    assert double.expert_bytes == 2 * whole.expert_bytes_by_layer[0]
    assert (double.dense_bytes, double.dtype_bytes) == (2 * whole.dense_bytes, 4)
    assert double.kv_bytes_per_token == 2 * whole.kv_bytes_per_token
    tied = spec_from_config(OLMOE | {"tie_word_embeddings": True})
    assert tied.dense_bytes == whole.dense_bytes - 2 * 50304 * 2048
    assert spec_from_config(without(OLMOE, "torch_dtype", "num_key_value_heads")) == whole


@pytest.mark.parametrize("key", ["text_config", "language_config", "llm_config", "thinker_config"])
def test_the_language_model_of_a_multimodal_config(key: str) -> None:
    """It is read under each key, whatever stands outside; dtype and ties may stand there."""
    inner = without(OLMOE, "torch_dtype", "tie_word_embeddings")
    outer = {"model_type": "some_vl", "vision_config": {"hidden_size": 7}, "hidden_size": 1280}
    outside = {"torch_dtype": "float32", "tie_word_embeddings": True}
    found = spec_from_config(outer | outside | {key: inner}, name="x")
    assert found == spec_from_config(inner | outside, name="x")
    broken = outer | {key: {"model_type": "t", "text_config": inner | {"vocab_size": -1}}}
    assert f"{key}.text_config.vocab_size: -1" in refusal(broken)


def test_the_class_name_tells_the_family() -> None:
    """Where model_type is absent or the checkpoint's own (Kimi-K2), the architecture's counts."""
    named = {"architectures": ["OlmoeForCausalLM"]}
    whole = spec_from_config(OLMOE, name="x")
    assert spec_from_config(without(OLMOE, "model_type") | named, name="x") == whole
    assert spec_from_config(OLMOE | named | {"model_type": "kimi"}, name="x") == whole
    assert "key 'model_type' is missing" in refusal(without(OLMOE, "model_type"))
    assert "did you mean 'olmoe'?" in refusal(OLMOE | {"model_type": "olmoee"})
    assert "no language model" in refusal(
        OLMOE | {"model_type": "olmoee", "architectures": ["os.system"]}
    )


@pytest.mark.parametrize("word", ["Infinity", "-Infinity", "NaN"])
def test_a_key_that_no_size_needs_may_be_no_number(word: str, tmp_path: Path) -> None:
    """Python's words for what is no number do not stop the reading, but where a size needs it."""
    path = tmp_path / "config.json"
    text = json.dumps(OLMOE)
    path.write_text(f'{text[:-1]}, "time_step_limit": [0.0, {word}]}}')
    assert load_model_spec(path) == spec_from_config(OLMOE, name=tmp_path.name)
    path.write_text(text.replace("2048", word, 1))
    with pytest.raises(InputError, match=f"hidden_size: {word}; expected a whole number"):
        load_model_spec(path)


# ------------------------------------------------------------------------------------ what is not


@pytest.mark.parametrize(
    "key",
    [
        *("hidden_size", "num_attention_heads", "vocab_size", "intermediate_size", "kv_lora_rank"),
        *("moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok"),
        *("first_k_dense_replace", "q_lora_rank", "qk_nope_head_dim", "v_head_dim"),
        "num_hidden_layers",
    ],
)
def test_a_missing_size_is_named(key: str) -> None:
    """A key that sizes depend on is never taken from the defaults of a class."""
    message = refusal(without(V2_LITE, key))
    assert key in message
    assert "missing" in message


def test_all_missing_sizes_are_named_at_once() -> None:
    """One line tells them all."""
    assert "missing: vocab_size, v_head_dim" in refusal(
        without(V2_LITE, "vocab_size", "v_head_dim")
    )


@pytest.mark.parametrize("value", [0, -1, 1.5, 32.0, "32", True, {}, 2**31, 10**5000], ids=type)
@pytest.mark.parametrize("key", ["hidden_size", "num_experts_per_tok", "num_hidden_layers"])
def test_a_nonsense_size_is_named(key: str, value: Any) -> None:
    """Zero, negative, fractional, textual, boolean and huge sizes: key, value, expectation."""
    message = refusal(MIXTRAL | {key: value})
    assert f" {key}: " in message
    assert "expected a whole number" in message


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (MIXTRAL | {"num_key_value_heads": 5}, "num_key_value_heads: 5"),
        (MIXTRAL | {"num_experts_per_tok": 9}, "num_experts_per_tok: 9; expected at most the 8"),
        (MIXTRAL | {"num_local_experts": 2**31}, "num_local_experts: 2147483648"),
        (MIXTRAL | {"num_hidden_layers": 1_001}, "num_hidden_layers: 1,001 layers"),
        (MIXTRAL | {"num_hidden_layers": 10_001}, "num_hidden_layers: 10001"),
        (MIXTRAL | {"tie_word_embeddings": "no"}, "tie_word_embeddings: 'no'"),
        (MIXTRAL | {"torch_dtype": "float8_e4m3fn"}, "torch_dtype: 'float8_e4m3fn'"),
        (MIXTRAL | {"dtype": 2}, "dtype: 2"),
        (MIXTRAL | {"_name_or_path": 7}, "_name_or_path: 7"),
        (MIXTRAL | {"is_encoder_decoder": True}, "expected a model that decodes only"),
        (MIXTRAL | {"hidden_act": "no such thing"}, "transformers cannot build the model"),
        (OLMOE | {"text_config": 7}, "text_config: 7; expected an object"),
        (OLMOE | {"text_config": OLMOE, "llm_config": OLMOE}, "one language model"),
        ([], "expected a JSON object"),
        (None, "expected a JSON object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_value_is_named(values: Any, words: str) -> None:
    """Values that contradict others, or have the wrong kind, are refused by key."""
    assert words in refusal(values)


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32},
        V2_LITE | {"first_k_dense_replace": 27},
        QWEN3 | {"mlp_only_layers": list(range(48))},
        {"model_type": "llava", "vision_config": {}, "language_config": {"model_type": "llama"}},
    ],
    ids=["llama", "all-dense", "mlp-only", "multimodal"],
)
def test_a_dense_model_is_refused(values: dict[str, Any]) -> None:
    """A model without MoE layers is refused in those words, and no MoE model is."""
    assert "has no MoE layers" in refusal(values)
    assert "num_hidden_layers" in refusal(
        {"model_type": "x", "ffn_config": {"moe_num_experts": 16}}
    )


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
def test_quantised_without_weights(key: str) -> None:
    """Sizes of quantised weights are not told by a config: both remedies are."""
    message = refusal(OLMOE | {key: {"quant_method": "awq", "bits": 4}})
    assert f"{key}: " in message
    assert "the weights are quantised" in message
    assert "give the checkpoint (its folder or hub id), or write the sizes by hand" in message


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the extra and the other ways."""
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    message = refusal(OLMOE)
    assert "transformers is not installed" in message
    assert "pip install 'prism-plan[hf]', give the checkpoint" in message


# ------------------------------------------------------------------------------------------- facts


@pytest.mark.parametrize(
    ("more", "numbers", "flops"),
    [
        ({"num_key_value_heads": 2, "head_dim": 64}, 2 * 2 * 64, 2 * 4 * 128),
        ({"num_key_value_heads": None}, 2 * 4 * 16, 2 * 4 * 32),
        ({"num_key_value_heads": 2, "v_head_dim": 8}, 2 * (16 + 8), 2 * 4 * 24),
        (
            {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 4},
            32 + 8,
            2 * 4 * (16 + 8 + 4),
        ),
        ({"kv_lora_rank": 32, "qk_rope_head_dim": 8, "index_head_dim": 5}, 32 + 8 + 5, None),
        (
            {"kv_lora_rank": 32, "use_mla": False, "num_key_value_heads": 4, "head_dim": 8},
            2 * 4 * 8,
            2 * 4 * 16,
        ),
    ],
    ids=["grouped", "null", "narrow values", "latent", "indexer", "no latent"],
)
def test_cache_and_attention(more: dict[str, Any], numbers: int, flops: int | None) -> None:
    """Numbers a token adds in a layer, and FLOPs of a token pair, written out."""
    base = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "num_experts": 4}
    facts = read_facts(base | {"num_experts_per_tok": 1} | more)
    assert facts.kv_numbers == (numbers, numbers)
    assert facts.attention_flops_by_layer == (None if flops is None else (flops, flops))


def test_layers_with_heads_of_their_own() -> None:
    """Windows with other heads (MiMo), and whole layers with larger ones (Gemma 4)."""
    base = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "num_experts": 4}
    base |= {"num_experts_per_tok": 1, "num_key_value_heads": 1, "head_dim": 10}
    mimo = {"hybrid_layer_pattern": [0, 1], "swa_num_key_value_heads": 2, "v_head_dim": 5}
    assert read_facts(base | mimo).kv_numbers == (15, 30)
    kinds = {"layer_types": ["sliding_attention", "full_attention"]}
    gemma = kinds | {"global_head_dim": 50, "num_global_key_value_heads": 2}
    assert read_facts(base | gemma).kv_numbers == (20, 200)
    saved = kinds | {"per_layer_config": {"1": {"head_dim": 50, "num_key_value_heads": 2}}}
    assert read_facts(base | saved).kv_numbers == (20, 200)


def test_spellings() -> None:
    """DBRX nests its keys; Hunyuan gives one top-k a layer, which must be one number."""
    dbrx = {
        **{"model_type": "dbrx", "d_model": 64, "n_layers": 2, "n_heads": 4},
        "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4},
        "attn_config": {"kv_n_heads": 2},
    }
    facts = read_facts(dbrx)
    assert (facts.num_experts, facts.top_k, facts.kv_numbers) == ((16,), 4, (64, 64))
    hunyuan = without(OLMOE, "num_experts_per_tok") | {"moe_topk": [2] * 16}
    assert read_facts(hunyuan).top_k == 2
    with pytest.raises(InputError, match="moe_topk"):
        read_facts(hunyuan | {"moe_topk": [2, 3]})
    with pytest.raises(InputError, match="key 'num_key_value_heads' is missing"):
        read_facts(without(MIXTRAL, "num_key_value_heads"))


@pytest.mark.parametrize(
    ("more", "numbers"),
    [
        (
            {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
            | {"linear_value_head_dim": 16, "linear_conv_kernel_dim": 4},
            4 * 8 * 16 + (2 * 2 * 8 + 4 * 16) * 3,
        ),
        ({"linear_attn_config": {"num_heads": 4, "head_dim": 8}}, 4 * 8 * 8 + 3 * 4 * 8 * 3),
        (
            {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 16, "n_groups": 2},
            4 * 8 * 16 + (4 * 8 + 2 * 2 * 16) * 3,
        ),
        ({"mamba_d_state": 16, "mamba_expand": 2, "mamba_d_conv": 3}, 2 * 64 * (16 + 2)),
        ({"conv_L_cache": 3}, 64 * 2),
        ({}, 0),
    ],
    ids=["delta rule", "Kimi", "Mamba 2", "Mamba", "convolution", "none"],
)
def test_states_of_layers_without_keys(more: dict[str, Any], numbers: int) -> None:
    """Recurrent state and the inputs that a convolution still needs, written out."""
    base = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "num_experts": 4}
    base |= {"num_experts_per_tok": 1, "num_key_value_heads": 1}
    assert read_facts(base | more).state_numbers == numbers
