"""Tiny random models of every MoE family of the installed transformers.

``python -m tests.profiling.families`` prints which families can be recorded, and why others cannot.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

#: The families whose sizes were known first; the tests of all that is not special to a family.
FAMILIES = ("mixtral", "deepseek_v2", "deepseek_v3", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss")
VOCABULARY = 97
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
SPECIFIC: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v2": LATENT,
    "deepseek_v3": {**LATENT, "num_attention_heads": 4},
    "qwen2_moe": {
        "num_experts": 12,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "decoder_sparse_step": 1,
    },
    "qwen3_moe": {
        "num_experts": 12,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 24,
        "head_dim": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
    },
    "olmoe": {"num_experts": 10, "num_experts_per_tok": 3},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 4, "head_dim": 8},
}

#: Sizes of every other family, by the name of the key wherever a configuration has it.
SIZES: dict[str, Any] = {
    **SMALL,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "moe_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "ffn_hidden_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_experts_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "dense_intermediate_size": 24,
    "prefix_dense_intermediate_size": 24,
    "share_expert_dim": 24,
    "intermediate_size_mlp": 24,
    "n_routed_experts": 8,
    "num_experts": 8,
    "num_local_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_top_k": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "decoder_sparse_step": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "o_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 16,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "sliding_window": 16,
    "sliding_window_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "swa_head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "router_hidden_size": 16,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "mamba_n_groups": 2,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "unpadded_vocab_size": None,
    # towers of multimodal models, which no test runs
    "depth": 1,
    "num_heads": 4,
    "out_hidden_size": 32,
    "image_size": 32,
    "patch_size": 8,
    "num_position_embeddings": 16,
    "encoder_layers": 1,
    "d_model": 32,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
}
#: Towers of multimodal models keep what they have under these keys.
TOWERS = ("vision_config", "audio_config")

#: What a family needs besides; under ``text_config`` where its language model has one.
OVERRIDES: dict[str, dict[str, Any]] = {}


@functools.cache
def moe_families() -> dict[str, str]:
    """Each ``model_type`` with experts in its code that generates text, and its class."""
    import transformers
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    models = Path(transformers.__file__).parent / "models"
    names = {
        **auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        **auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    found = {}
    for family, architecture in sorted(names.items()):
        module = model_type_to_module_name(family)
        path = models / module / f"modeling_{module}.py"
        if path.is_file() and re.search(r"class \w*(Experts|MoE|Moe)\w*\(", path.read_text()):
            found[family] = architecture
    return found


def small_values(config_class: Any, tower: bool = False) -> dict[str, Any]:
    """Small sizes for a configuration class and those within it."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        if field.name in SIZES:
            values[field.name] = SIZES[field.name]
    for name, inner in (config_class.sub_configs or {}).items():
        if dataclasses.is_dataclass(inner):
            values[name] = small_values(inner, name in TOWERS)
    return values


def small_config(family: str) -> Any:
    """The configuration of a tiny model of the family."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    return kind(**_merged(small_values(kind), OVERRIDES.get(family, {})))


def _merged(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in more.items():
        inner = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if inner else value
    return merged


def family_model(family: str, seed: int = 0) -> Any:
    """A tiny random model of any of :func:`moe_families`, in float32, ready to run."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, moe_families()[family])._from_config(
        small_config(family), dtype=torch.float32
    )
    return _randomised(model)


def tiny_model(family: str, seed: int = 0) -> Any:
    """A random model of one of :data:`FAMILIES` in float32, ready to run."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(SMALL | SPECIFIC[family]))
    return _randomised(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def _randomised(model: Any) -> Any:
    import torch

    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "bias" in name:  # larger than default: selections are not ties
            torch.nn.init.normal_(parameter, std=0.3 if "embed" in name else 0.15)
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            torch.nn.init.normal_(buffer, std=0.1)
    model.generation_config.eos_token_id = None  # random models end at random
    return model.eval()
