"""Tests of the sizes computed from a Hugging Face config.json."""

from __future__ import annotations

import json
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from prism_plan.errors import InputError
from prism_plan.model import PRESETS, ModelSpec, load_model
from prism_plan.model_config import FAMILIES, spec_from_config, spec_from_config_file

# The size-relevant values of the config.json files on the Hugging Face Hub, in their spelling.
MIXTRAL_8X7B: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
DEEPSEEK_V2_LITE: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
DEEPSEEK_V2: dict[str, Any] = DEEPSEEK_V2_LITE | {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
}
DEEPSEEK_V3: dict[str, Any] = DEEPSEEK_V2 | {
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "vocab_size": 129280,
}
FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
QWEN15_MOE: dict[str, Any] = {  # Qwen1.5-MoE-A2.7B
    "model_type": "qwen2_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "shared_expert_intermediate_size": 5632,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
QWEN3_30B: dict[str, Any] = {  # Qwen3-30B-A3B
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
OLMOE: dict[str, Any] = {  # OLMoE-1B-7B
    "model_type": "olmoe",
    "attention_bias": False,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 50304,
}
GPT_OSS_20B: dict[str, Any] = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
MXFP4 = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}

FULL_SIZE = {
    "Mixtral-8x7B": MIXTRAL_8X7B,
    "DeepSeek-V2-Lite": DEEPSEEK_V2_LITE,
    "DeepSeek-V2": DEEPSEEK_V2,
    "DeepSeek-V3-bf16": DEEPSEEK_V3,
    "Qwen1.5-MoE-A2.7B": QWEN15_MOE,
    "Qwen3-30B-A3B": QWEN3_30B,
    "OLMoE-1B-7B": OLMOE,
    "gpt-oss-20b-bf16": GPT_OSS_20B,
}

# Sizes without a common factor, so that a swapped pair of them shows.
_SMALL = {"num_hidden_layers": 5, "vocab_size": 101, "intermediate_size": 33}
_SMALL_GROUPED = _SMALL | {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
_SMALL_LATENT = _SMALL | {
    "hidden_size": 28,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 15,
    "n_routed_experts": 10,
    "num_experts_per_tok": 3,
    "kv_lora_rank": 11,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
}
_SMALL_V2 = DEEPSEEK_V2_LITE | _SMALL_LATENT
_SMALL_V3 = DEEPSEEK_V3 | _SMALL_LATENT | {"q_lora_rank": 9, "n_group": 2, "topk_group": 1}
_SMALL_QWEN2 = QWEN15_MOE | _SMALL_GROUPED | {"moe_intermediate_size": 15, "num_experts": 7}
_SMALL_QWEN3 = QWEN3_30B | _SMALL_GROUPED | {"moe_intermediate_size": 15, "num_experts": 9}
_SMALL_OLMOE = OLMOE | _SMALL_GROUPED
_SMALL_MIXTRAL = MIXTRAL_8X7B | _SMALL_GROUPED
_SMALL_GPT_OSS = GPT_OSS_20B | _SMALL_GROUPED


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


VARIANTS = {
    "mixtral-tied": _SMALL_MIXTRAL | {"tie_word_embeddings": True},
    "mixtral-head-dim": _SMALL_MIXTRAL | {"head_dim": 10},
    "mixtral-head-dim-null": _SMALL_MIXTRAL | {"head_dim": None},
    "mixtral-defaults": without(
        _SMALL_MIXTRAL | {"num_attention_heads": 8}, "num_key_value_heads", "tie_word_embeddings"
    ),
    "v2-no-dense-layer": _SMALL_V2 | {"first_k_dense_replace": 0},
    "v2-biases": _SMALL_V2 | {"attention_bias": True, "mlp_bias": True, "q_lora_rank": 9},
    "v2-biases-no-rank": _SMALL_V2 | {"attention_bias": True},
    "v2-tied": _SMALL_V2 | {"tie_word_embeddings": True, "first_k_dense_replace": 3},
    "v3-small": _SMALL_V3,
    "v3-no-rank": _SMALL_V3 | {"q_lora_rank": None, "attention_bias": True},
    "v3-shared-3": _SMALL_V3 | {"n_shared_experts": 3, "first_k_dense_replace": 0},
    "qwen2-steps": _SMALL_QWEN2 | {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "qwen2-defaults": without(
        _SMALL_QWEN2 | {"num_attention_heads": 16, "hidden_size": 32, "num_experts_per_tok": 2},
        "decoder_sparse_step",
        "num_key_value_heads",
        "tie_word_embeddings",
    ),
    "qwen2-no-bias": _SMALL_QWEN2 | {"qkv_bias": False, "head_dim": 10},
    "qwen3-steps": _SMALL_QWEN3 | {"decoder_sparse_step": 3, "mlp_only_layers": [0]},
    "qwen3-bias": _SMALL_QWEN3 | {"attention_bias": True, "mlp_only_layers": [0, 4]},
    "qwen3-defaults": without(
        _SMALL_QWEN3, "head_dim", "num_key_value_heads", "attention_bias", "mlp_only_layers"
    ),
    "qwen3-new-spelling": without(_SMALL_QWEN3, "num_experts", "torch_dtype")
    | {"num_local_experts": 9, "dtype": "bfloat16"},
    "olmoe-grouped-bias": _SMALL_OLMOE | {"attention_bias": True},
    "olmoe-defaults": without(_SMALL_OLMOE, "num_key_value_heads", "attention_bias"),
    "olmoe-nulls": _SMALL_OLMOE | {"num_key_value_heads": None},
    "gpt-oss-small": _SMALL_GPT_OSS,
    "gpt-oss-no-bias": _SMALL_GPT_OSS | {"attention_bias": False, "head_dim": 10},
    "gpt-oss-defaults": without(
        _SMALL_GPT_OSS | {"num_attention_heads": 8},
        "head_dim",
        "num_key_value_heads",
        "attention_bias",
    ),
}


def built_on_meta(values: dict[str, Any]) -> Any:
    """The model that transformers builds from the config, without memory for its weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    given = without(values, "model_type", "torch_dtype", "dtype")
    config = transformers.AutoConfig.for_model(values["model_type"], **given)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def stored_bytes(model: Any) -> int:
    """Bytes of all parameters, and of the router's correction biases, in float32.

    Routers count in the model's dtype, as checkpoints store them: since transformers 5.24 some are
    float32 in memory.
    """
    total = 0
    for name, p in model.named_parameters():
        router = name.endswith("mlp.gate.weight")
        total += p.numel() * (model.dtype.itemsize if router else p.element_size())
    corrections = [b for name, b in model.named_buffers() if "e_score_correction" in name]
    return total + sum(4 * b.numel() for b in corrections)


# ---------------------------------------------------------------------------- reference numbers


def test_mixtral_8x7b_gives_the_preset() -> None:
    """Mixtral-8x7B's config gives the documented expert, dense and cache bytes exactly."""
    spec = spec_from_config(MIXTRAL_8X7B, name="mixtral-8x7b")
    assert spec == PRESETS["mixtral-8x7b"]
    assert (spec.expert_bytes, spec.dense_bytes) == (352_321_536, 3_211_272_192)
    assert spec.kv_bytes_per_token == 131_072


def test_deepseek_v2_lite_gives_the_preset() -> None:
    """DeepSeek-V2-Lite's config gives the documented bytes, layers 1..26 and the latent cache."""
    spec = spec_from_config(DEEPSEEK_V2_LITE, name="deepseek-v2-lite")
    assert spec == PRESETS["deepseek-v2-lite"]
    assert (spec.expert_bytes, spec.dense_bytes) == (17_301_504, 2_623_265_792)
    assert spec.kv_bytes_per_token == 27 * (512 + 64) * 2 == 31_104


# ----------------------------------------------------------------------- against transformers


@pytest.mark.parametrize("case", [*FULL_SIZE, *VARIANTS])
def test_sizes_equal_those_of_the_transformers_model(case: str) -> None:
    """Layers, expert bytes and total bytes are those of the model that transformers builds."""
    values = (FULL_SIZE | VARIANTS)[case]
    model = built_on_meta(values)
    spec = spec_from_config(values)
    blocks = {
        index: layer.mlp.experts
        for index, layer in enumerate(model.model.layers)
        if hasattr(layer.mlp, "experts")
    }
    assert spec.moe_layers == tuple(blocks)
    for experts in blocks.values():
        assert stored_bytes(experts) == spec.num_experts * spec.expert_bytes_by_layer[0]
    routed = sum(spec.expert_bytes_by_layer) * spec.num_experts
    assert routed + spec.dense_bytes == stored_bytes(model)


@pytest.mark.parametrize("case", [*FULL_SIZE, *VARIANTS])
def test_cache_bytes_equal_the_widths_of_the_key_value_projections(case: str) -> None:
    """A token adds what the projections into keys and values (or the latent) put out."""
    values = (FULL_SIZE | VARIANTS)[case]
    numbers = 0
    for layer in built_on_meta(values).model.layers:
        attention = layer.self_attn
        if hasattr(attention, "kv_a_proj_with_mqa"):
            numbers += attention.kv_a_proj_with_mqa.out_features
        else:
            numbers += attention.k_proj.out_features + attention.v_proj.out_features
    assert spec_from_config(values).kv_bytes_per_token == 2 * numbers


@pytest.mark.parametrize("case", VARIANTS)
def test_a_config_saved_by_transformers_reads_the_same(case: str, tmp_path: Path) -> None:
    """What transformers saves again, in its newer spelling, gives the same spec."""
    model = built_on_meta(VARIANTS[case])
    model.config.save_pretrained(tmp_path)
    saved = spec_from_config_file(tmp_path / "config.json")
    assert saved == spec_from_config(VARIANTS[case], name=saved.name)


def test_absent_keys_have_the_defaults_of_transformers() -> None:
    """The defaults used for absent keys are those of the configuration classes."""
    transformers = pytest.importorskip("transformers")
    for family in FAMILIES:
        defaults = transformers.AutoConfig.for_model(family)
        assert defaults.tie_word_embeddings is False, family
        assert getattr(defaults, "mlp_layer_types", None) is None, family
    kv_heads = {"mixtral": 8, "qwen2_moe": 16, "qwen3_moe": 4, "gpt_oss": 8}
    for family, count in kv_heads.items():
        assert transformers.AutoConfig.for_model(family).num_key_value_heads == count
    assert transformers.AutoConfig.for_model("gpt_oss").head_dim == 64
    assert transformers.AutoConfig.for_model("gpt_oss").attention_bias is True
    assert transformers.AutoConfig.for_model("qwen2_moe").qkv_bias is True
    assert transformers.AutoConfig.for_model("qwen2_moe").decoder_sparse_step == 1


# -------------------------------------------------------------------------------- quantisation


def fp8_bytes(out: int, into: int) -> int:
    return out * into + 4 * ceil(out / 128) * ceil(into / 128)


def test_deepseek_v3_fp8_equals_the_list_of_its_matrices() -> None:
    """DeepSeek-V3's fp8 sizes are the sums over its matrices, written out."""
    spec = spec_from_config(DEEPSEEK_V3 | {"quantization_config": FP8})
    expert = 2 * fp8_bytes(2048, 7168) + fp8_bytes(7168, 2048)
    attention = (
        fp8_bytes(1536, 7168)  # q_a
        + fp8_bytes(128 * 192, 1536)  # q_b
        + fp8_bytes(576, 7168)  # kv_a, 4.5 blocks high
        + fp8_bytes(128 * 256, 512)  # kv_b
        + fp8_bytes(7168, 128 * 128)  # o
    )
    norms = 2 * (7168 + 7168 + 1536 + 512)
    dense_mlp = 2 * fp8_bytes(18432, 7168) + fp8_bytes(7168, 18432)
    gate = 2 * 256 * 7168 + 4 * 256
    embeddings = 2 * 2 * 129280 * 7168 + 2 * 7168
    assert spec.expert_bytes == expert
    assert spec.dense_bytes == (
        embeddings + 61 * (attention + norms) + 3 * dense_mlp + 58 * (expert + gate)
    )
    assert spec.dtype_bytes == 2
    assert spec.kv_bytes_per_token == 61 * 576 * 2


def test_deepseek_v3_fp8_equals_the_published_tensor_counts() -> None:
    """With its prediction layer, DeepSeek-V3 has the bytes that the Hub counts in its files.

    The Hub's count for deepseek-ai/DeepSeek-V3 (safetensors metadata): 3,918,786,560 numbers of
    BF16, 680,571,043,840 of F8_E4M3 and 41,555,600 of F32. They include layer 61, which predicts
    a second token: a decoder layer with its own copies of embeddings and head.
    """
    spec = spec_from_config(DEEPSEEK_V3 | {"quantization_config": FP8})
    one_layer_more = spec_from_config(
        DEEPSEEK_V3 | {"quantization_config": FP8, "num_hidden_layers": 62}
    )

    def total(spec: ModelSpec) -> int:
        return sum(spec.expert_bytes_by_layer) * spec.num_experts + spec.dense_bytes

    copies = 2 * 2 * 129280 * 7168
    joined = 2 * 7168 * (2 * 7168)  # eh_proj, bf16
    norms = 3 * 2 * 7168  # enorm, hnorm, shared_head.norm
    published = 2 * 3_918_786_560 + 680_571_043_840 + 4 * 41_555_600
    assert total(one_layer_more) + copies + joined + norms == published
    assert total(spec) < published


def test_gpt_oss_20b_mxfp4_equals_the_published_tensor_counts() -> None:
    """gpt-oss-20b has the bytes of the Hub's count: 1,804,459,584 BF16 and the MXFP4 weights.

    19,110,297,600 weights at 4 bits, with one byte of scale for each 32; the two files are
    13,761,316,904 bytes long, headers of some 50 kB included.
    """
    spec = spec_from_config(GPT_OSS_20B | {"quantization_config": MXFP4})
    total = 24 * 32 * spec.expert_bytes_by_layer[0] + spec.dense_bytes
    assert total == 2 * 1_804_459_584 + 19_110_297_600 // 2 + 19_110_297_600 // 32
    assert 0 < 13_761_316_904 - total < 100_000
    matrices = 3 * 2880 * 2880
    assert spec.expert_bytes == matrices // 2 + matrices // 32 + 2 * 3 * 2880
    assert spec.dense_bytes == spec_from_config(GPT_OSS_20B).dense_bytes


def _fp8_on_meta(values: dict[str, Any], spared: list[str]) -> int:
    torch = pytest.importorskip("torch")
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    transformers = pytest.importorskip("transformers")
    model = built_on_meta(values)
    config = transformers.FineGrainedFP8Config(weight_block_size=(128, 128))
    with torch.device("meta"):
        fp8.replace_with_fp8_linear(model, [*spared, "lm_head"], config)
    return stored_bytes(model)


@pytest.mark.parametrize(
    ("values", "spared"),
    [
        (DEEPSEEK_V3 | {"num_hidden_layers": 5}, []),
        (QWEN3_30B | {"num_hidden_layers": 4}, ["model.layers.1.mlp.experts", "k_proj"]),
        (QWEN3_30B | {"num_hidden_layers": 12}, ["model.layers.1", r"model.layers.\d.self_attn"]),
        (QWEN15_MOE | {"num_hidden_layers": 2, "qkv_bias": False}, ["mlp.shared_expert_gate"]),
        (MIXTRAL_8X7B | {"num_hidden_layers": 2}, ["model.layers.0.self_attn.o_proj"]),
    ],
    ids=["v3", "qwen3-experts", "qwen3-regex", "qwen2", "mixtral"],
)
def test_fp8_equals_the_modules_of_transformers(values: dict[str, Any], spared: list[str]) -> None:
    """Block fp8 gives the bytes of transformers' fp8 modules, spared modules and all."""
    quantisation = FP8 | {"modules_to_not_convert": spared}
    spec = spec_from_config(values | {"quantization_config": quantisation})
    total = sum(spec.expert_bytes_by_layer) * spec.num_experts + spec.dense_bytes
    assert total == _fp8_on_meta(values, spared)


def test_layers_with_spared_experts_have_sizes_of_their_own() -> None:
    """Experts left in bf16 in one layer make expert_bytes a list, one size a layer."""
    quantisation = FP8 | {"modules_to_not_convert": ["model.layers.2.mlp.experts"]}
    spec = spec_from_config(QWEN3_30B | {"quantization_config": quantisation})
    assert isinstance(spec.expert_bytes, tuple)
    small = 3 * fp8_bytes(768, 2048)
    assert spec.expert_bytes == (small, small, 3 * 768 * 2048 * 2, *[small] * 45)


def test_power_of_two_scales_of_deepseek_v3_1_are_float32() -> None:
    """DeepSeek-V3.1 (scale_fmt ue8m0) stores float32 scales: the same bytes as V3."""
    newer = FP8 | {"scale_fmt": "ue8m0"}
    assert spec_from_config(DEEPSEEK_V3 | {"quantization_config": newer}) == spec_from_config(
        DEEPSEEK_V3 | {"quantization_config": FP8}
    )


def test_a_null_quantisation_is_none() -> None:
    """quantization_config null means an unquantised checkpoint."""
    assert spec_from_config(OLMOE | {"quantization_config": None}) == spec_from_config(OLMOE)


# ----------------------------------------------------------------------------- dtypes and names


@pytest.mark.parametrize(
    ("keys", "number"),
    [
        ({"torch_dtype": "float32"}, 4),
        ({"torch_dtype": "float16"}, 2),
        ({"torch_dtype": "torch.bfloat16"}, 2),
        ({"dtype": "float32"}, 4),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, 4),
        ({"dtype": None, "torch_dtype": "float32"}, 4),
        ({}, 2),
    ],
)
def test_dtype_sets_the_bytes_of_a_number(keys: dict[str, Any], number: int) -> None:
    """Both spellings of the dtype are read, the newer first; without one a number has 2 bytes."""
    spec = spec_from_config(without(MIXTRAL_8X7B, "torch_dtype") | keys)
    assert spec.dtype_bytes == number
    assert spec.expert_bytes == number * 176_160_768
    assert spec.dense_bytes == number * 1_605_636_096
    assert spec.kv_bytes_per_token == number * 65_536


def test_the_name_is_the_last_part_of_the_path_in_the_config(tmp_path: Path) -> None:
    """_name_or_path names the model, by its last part; an explicit name wins."""
    values = OLMOE | {"_name_or_path": "allenai/OLMoE-1B-7B/"}
    assert spec_from_config(values).name == "OLMoE-1B-7B"
    assert spec_from_config(values, name="mine").name == "mine"
    assert spec_from_config(OLMOE | {"_name_or_path": "C:\\models\\x"}).name == "x"
    assert spec_from_config(OLMOE | {"_name_or_path": None}).name == "olmoe"


@pytest.mark.parametrize("empty", [{}, {"_name_or_path": ""}, {"_name_or_path": "./"}])
def test_the_name_falls_back_to_folder_or_file(tmp_path: Path, empty: dict[str, Any]) -> None:
    """Without a name inside, config.json is called after its folder, other files after theirs."""
    folder = tmp_path / "olmoe-7b"
    folder.mkdir()
    for file in ("config.json", "other.name.json"):
        (folder / file).write_text(json.dumps(OLMOE | empty))
    assert spec_from_config_file(folder / "config.json").name == "olmoe-7b"
    assert spec_from_config_file(folder / "other.name.json").name == "other.name"


def test_a_relative_config_json_is_called_after_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder's name is found even where the path does not tell it."""
    folder = tmp_path / "olmoe-7b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(OLMOE))
    monkeypatch.chdir(folder)
    assert spec_from_config_file(Path("config.json")).name == "olmoe-7b"


def test_a_model_spec_of_ours_is_read_too(tmp_path: Path) -> None:
    """The remedy that the errors name works: a hand-written model spec is accepted as it is."""
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(PRESETS["deepseek-v2-lite"].to_json()))
    assert spec_from_config_file(path) == PRESETS["deepseek-v2-lite"]
    assert load_model(str(path)) == PRESETS["deepseek-v2-lite"]


def test_a_faulty_model_spec_of_ours_names_file_and_key(tmp_path: Path) -> None:
    """A hand-written spec with a wrong value is refused by file and key."""
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(PRESETS["deepseek-v2-lite"].to_json() | {"top_k": 0}))
    with pytest.raises(InputError, match=r"spec\.json: model\.top_k: 0; expected a whole number"):
        spec_from_config_file(path)


# ------------------------------------------------------------------------------------ wrappers


def test_a_multimodal_config_is_read_for_its_text_model() -> None:
    """text_config of a known family is read; dtype and tying may stand outside it."""
    text = without(QWEN3_30B, "torch_dtype", "tie_word_embeddings")
    wrapper = {"model_type": "some_vl", "text_config": text, "torch_dtype": "float32"}
    assert spec_from_config(wrapper, name="x") == spec_from_config(
        QWEN3_30B | {"torch_dtype": "float32"}, name="x"
    )
    tied = spec_from_config(wrapper | {"tie_word_embeddings": True})
    assert tied.dense_bytes == spec_from_config(wrapper).dense_bytes - 4 * 151936 * 2048
    inner = wrapper | {"text_config": text | {"dtype": "bfloat16"}}
    assert spec_from_config(inner).dtype_bytes == 2


# -------------------------------------------------------------------------------------- errors


def refusal(values: Any) -> str:
    with pytest.raises(InputError) as caught:
        spec_from_config(values, source="some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json: ")
    assert "\n" not in message
    return message


REQUIRED = {
    "mixtral": (
        MIXTRAL_8X7B,
        "num_hidden_layers hidden_size num_local_experts num_experts_per_tok intermediate_size "
        "num_attention_heads vocab_size",
    ),
    "deepseek_v2": (
        DEEPSEEK_V2_LITE,
        "num_hidden_layers hidden_size n_routed_experts num_experts_per_tok intermediate_size "
        "moe_intermediate_size n_shared_experts first_k_dense_replace num_attention_heads "
        "kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim vocab_size",
    ),
    "deepseek_v3": (DEEPSEEK_V3, "q_lora_rank first_k_dense_replace n_shared_experts"),
    "qwen2_moe": (
        QWEN15_MOE,
        "num_experts num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size",
    ),
    "qwen3_moe": (QWEN3_30B, "num_experts num_experts_per_tok moe_intermediate_size"),
    "olmoe": (OLMOE, "num_experts num_experts_per_tok intermediate_size"),
    "gpt_oss": (GPT_OSS_20B, "num_local_experts intermediate_size num_hidden_layers"),
}


@pytest.mark.parametrize(
    ("family", "key"), [(family, key) for family in REQUIRED for key in REQUIRED[family][1].split()]
)
def test_a_missing_size_is_named(family: str, key: str) -> None:
    """A key that the sizes depend on is never guessed: its absence is an error that names it."""
    message = refusal(without(REQUIRED[family][0], key))
    assert f"key {key!r} is missing" in message


NONSENSE: list[Any] = [0, -1, 1.5, 32.0, "32", True, False, [32], {}, 2**31]


@pytest.mark.parametrize("value", NONSENSE, ids=repr)
@pytest.mark.parametrize(
    ("family", "key"),
    [
        (family, key)
        for family in REQUIRED
        for key in REQUIRED[family][1].split()
        if key not in ("n_shared_experts", "first_k_dense_replace", "q_lora_rank")
    ],
)
def test_a_nonsense_size_is_named(family: str, key: str, value: Any) -> None:
    """Zero, negative, fractional, textual and boolean sizes are refused with key and value."""
    message = refusal(REQUIRED[family][0] | {key: value})
    assert f" {key}: " in message
    assert repr(value) in message


@pytest.mark.parametrize("value", [-1, 0.5, "1", None, True])
@pytest.mark.parametrize("key", ["n_shared_experts", "first_k_dense_replace"])
def test_a_nonsense_count_from_zero_is_named(key: str, value: Any) -> None:
    """Counts that may be zero are checked all the same."""
    assert f"{key}: " in refusal(DEEPSEEK_V2_LITE | {key: value})


@pytest.mark.parametrize(
    ("values", "key"),
    [
        (DEEPSEEK_V2 | {"q_lora_rank": 0}, "q_lora_rank"),
        (DEEPSEEK_V2 | {"q_lora_rank": False}, "q_lora_rank"),
        (DEEPSEEK_V2 | {"moe_layer_freq": 2}, "moe_layer_freq"),
        (DEEPSEEK_V2 | {"moe_layer_freq": True}, "moe_layer_freq"),
        (DEEPSEEK_V2 | {"mlp_bias": None}, "mlp_bias"),
        (DEEPSEEK_V2 | {"num_experts": 3}, "num_experts"),
        (MIXTRAL_8X7B | {"num_key_value_heads": 0}, "num_key_value_heads"),
        (MIXTRAL_8X7B | {"num_key_value_heads": 5}, "num_key_value_heads"),
        (MIXTRAL_8X7B | {"num_key_value_heads": None}, "num_key_value_heads"),
        (GPT_OSS_20B | {"head_dim": None}, "head_dim"),
        (MIXTRAL_8X7B | {"num_attention_heads": 24}, "num_attention_heads"),
        (MIXTRAL_8X7B | {"head_dim": 0}, "head_dim"),
        (MIXTRAL_8X7B | {"head_dim": 128.0}, "head_dim"),
        (MIXTRAL_8X7B | {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        (MIXTRAL_8X7B | {"num_local_experts": 65537}, "num_local_experts"),
        (MIXTRAL_8X7B | {"num_hidden_layers": 10_001}, "num_hidden_layers"),
        (MIXTRAL_8X7B | {"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        (MIXTRAL_8X7B | {"tie_word_embeddings": 0}, "tie_word_embeddings"),
        (MIXTRAL_8X7B | {"torch_dtype": "float8_e4m3fn"}, "torch_dtype"),
        (MIXTRAL_8X7B | {"dtype": 2}, "dtype"),
        (MIXTRAL_8X7B | {"_name_or_path": 7}, "_name_or_path"),
        (MIXTRAL_8X7B | {"model_type": 7}, "model_type"),
        (MIXTRAL_8X7B | {"per_layer_config": {"0": {}}}, "per_layer_config"),
        (MIXTRAL_8X7B | {"mlp_layer_types": ["dense"] * 32}, "mlp_layer_types"),
        (QWEN15_MOE | {"num_key_value_heads": None}, "num_key_value_heads"),
        (QWEN15_MOE | {"qkv_bias": 1}, "qkv_bias"),
        (QWEN15_MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        (QWEN15_MOE | {"mlp_only_layers": [24]}, "mlp_only_layers"),
        (QWEN15_MOE | {"mlp_only_layers": [-1]}, "mlp_only_layers"),
        (QWEN15_MOE | {"mlp_only_layers": [True]}, "mlp_only_layers"),
        (QWEN15_MOE | {"mlp_only_layers": 3}, "mlp_only_layers"),
        (QWEN3_30B | {"num_local_experts": 64}, "num_local_experts"),
        (OLMOE | {"head_dim": 64}, "head_dim"),
        (GPT_OSS_20B | {"experts_per_token": 8}, "experts_per_token"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_value_is_named(values: dict[str, Any], key: str) -> None:
    """Values that contradict others, or have the wrong kind, are refused by key."""
    message = refusal(values)
    assert f" {key}: " in message
    assert "expected" in message


def test_a_number_too_long_to_print_is_refused() -> None:
    """Even a number that Python does not print gives an error of one line."""
    message = refusal(MIXTRAL_8X7B | {"hidden_size": 10**5000})
    assert " hidden_size: a number of thousands of digits; expected" in message


def test_keys_that_a_family_does_not_read_are_ignored() -> None:
    """intermediate_size matters only where there are dense layers, other families' keys never."""
    assert spec_from_config(without(QWEN3_30B, "intermediate_size")) == spec_from_config(QWEN3_30B)
    assert spec_from_config(MIXTRAL_8X7B | {"qkv_bias": True}) == spec_from_config(MIXTRAL_8X7B)
    message = refusal(without(QWEN3_30B, "intermediate_size") | {"mlp_only_layers": [3]})
    assert "key 'intermediate_size' is missing" in message


def test_layer_types_that_agree_are_accepted() -> None:
    """mlp_layer_types that say what the family's own keys say change nothing."""
    kinds = ["dense"] + ["sparse"] * 26
    same = spec_from_config(DEEPSEEK_V2_LITE | {"mlp_layer_types": kinds})
    assert same == spec_from_config(DEEPSEEK_V2_LITE)


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32},
        DEEPSEEK_V2_LITE | {"n_routed_experts": None},
        DEEPSEEK_V2_LITE | {"first_k_dense_replace": 27},
        QWEN3_30B | {"num_experts": 0},
        QWEN3_30B | {"mlp_only_layers": list(range(48))},
        QWEN3_30B | {"decoder_sparse_step": 49},
    ],
    ids=["llama", "null-experts", "all-dense", "zero-experts", "mlp-only", "step"],
)
def test_a_dense_model_is_refused(values: dict[str, Any]) -> None:
    """A model without MoE layers is refused in those words."""
    assert "has no MoE layers" in refusal(values)


def test_an_unknown_family_lists_the_known_ones() -> None:
    """An unknown MoE family is refused with the families that are known, and a remedy."""
    message = refusal({"model_type": "jamba", "num_experts": 16})
    assert "unknown MoE family 'jamba'" in message
    assert all(family in message for family in FAMILIES)
    assert "model spec" in message
    close = refusal(QWEN3_30B | {"model_type": "qwen3_mo"})
    assert "did you mean 'qwen3_moe'?" in close


def test_a_config_without_model_type_is_refused() -> None:
    """Without model_type nothing is assumed."""
    assert "key 'model_type' is missing" in refusal(without(MIXTRAL_8X7B, "model_type"))


@pytest.mark.parametrize("values", [[], "x", None, 3])
def test_something_else_than_an_object_is_refused(values: Any) -> None:
    """A JSON file that holds no object is refused."""
    assert "expected a JSON object" in refusal(values)


@pytest.mark.parametrize(
    ("text_config", "words"),
    [
        ({"model_type": "llama"}, "text_config.model_type: 'llama' has no MoE layers"),
        ({"model_type": "dbrx", "moe_num_experts": 16}, "unknown MoE family 'dbrx'"),
        (7, "text_config: 7; expected an object"),
        (without(QWEN3_30B, "hidden_size"), "text_config: key 'hidden_size' is missing"),
        (QWEN3_30B | {"hidden_size": -1}, "text_config.hidden_size: -1"),
    ],
)
def test_a_wrapper_of_something_unknown_is_refused(text_config: Any, words: str) -> None:
    """text_config is read only where its family is known; its errors say where they are."""
    assert words in refusal({"model_type": "some_vl", "text_config": text_config})


def test_a_quantised_wrapper_is_refused() -> None:
    """Which part of a multimodal checkpoint is quantised is not guessed."""
    wrapper = {"model_type": "some_vl", "text_config": QWEN3_30B, "quantization_config": FP8}
    assert "quantization_config: " in refusal(wrapper)


def test_contradicting_ties_are_refused() -> None:
    """Embeddings tied outside text_config and untied inside are not guessed about."""
    wrapper = {"model_type": "some_vl", "text_config": QWEN3_30B, "tie_word_embeddings": True}
    assert "text_config.tie_word_embeddings: False" in refusal(wrapper)


@pytest.mark.parametrize(
    "method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp4", "modelopt", ""]
)
def test_other_quantisations_are_refused(method: str) -> None:
    """A quantisation whose sizes are not known is named and refused with a remedy."""
    message = refusal(QWEN3_30B | {"quantization_config": {"quant_method": method, "bits": 4}})
    assert f"quantization_config.quant_method: quantisation {method!r}" in message
    assert "write the sizes by hand as a model spec" in message


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (without(FP8, "weight_block_size"), "weight_block_size: null"),
        (FP8 | {"weight_block_size": None}, "weight_block_size: null"),
        (FP8 | {"weight_block_size": [128]}, "weight_block_size: [128]"),
        (FP8 | {"weight_block_size": [128, 0]}, "weight_block_size: [128, 0]"),
        (FP8 | {"weight_block_size": [128, "128"]}, "weight_block_size: [128, '128']"),
        (FP8 | {"activation_scheme": "static"}, "activation_scheme: 'static'"),
        (FP8 | {"scale_fmt": "ue8m0"}, "scale_fmt: 'ue8m0'"),
        (FP8 | {"expert_dtype": "fp4"}, "expert_dtype: 'fp4'"),
        (FP8 | {"dequantize": True}, "dequantize: True"),
        (FP8 | {"modules_to_convert": ["embed"]}, "modules_to_convert: ['embed']"),
        (FP8 | {"kv_cache_scheme": {}}, "unknown key 'kv_cache_scheme'"),
        (FP8 | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert: 'lm_head'"),
        (FP8 | {"modules_to_not_convert": ["("]}, "modules_to_not_convert: '('"),
        (FP8 | {"ignored_layers": [3]}, "ignored_layers: [3]"),
        (
            FP8 | {"modules_to_not_convert": ["model.layers.1.mlp.experts.5.up_proj"]},
            "experts of a layer all alike",
        ),
        (FP8 | {"modules_to_not_convert": ["gate_proj"]}, "experts spared whole or not"),
        ([], "quantization_config: []; expected an object"),
        ({"quant_method": 8}, "quant_method: 8; expected a text"),
    ],
)
def test_other_forms_of_fp8_are_refused(values: Any, words: str) -> None:
    """fp8 in a form whose sizes are not known is refused, by key and value."""
    assert words in refusal(QWEN3_30B | {"quantization_config": values})


def test_the_older_name_of_compressed_tensors_is_refused() -> None:
    """compression_config marks a quantised checkpoint as well."""
    compressed = OLMOE | {"compression_config": {"quant_method": "compressed-tensors"}}
    assert "compression_config: " in refusal(compressed)


def test_fp8_of_gpt_oss_and_mxfp4_of_odd_widths_are_refused() -> None:
    """gpt-oss is known in MXFP4 only, and only in whole groups of 32."""
    assert "quantisation 'fp8'" in refusal(GPT_OSS_20B | {"quantization_config": FP8})
    odd = GPT_OSS_20B | {"intermediate_size": 2890, "quantization_config": MXFP4}
    assert "intermediate_size: 2890; expected a multiple of 32" in refusal(odd)


def test_mxfp4_spared_experts_stay_in_bfloat16() -> None:
    """An entry of modules_to_not_convert that names the experts leaves them whole."""
    spared = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.experts"]}
    assert spec_from_config(GPT_OSS_20B | {"quantization_config": spared}) == spec_from_config(
        GPT_OSS_20B
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object"),
        ('{"a": NaN}', "key 'model_type' is missing"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, content: str, words: str) -> None:
    """Errors of a file start with its path."""
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        spec_from_config_file(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A path that does not exist is an input error, not a traceback."""
    with pytest.raises(InputError, match="no such file"):
        spec_from_config_file(tmp_path / "config.json")
