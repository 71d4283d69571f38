"""Tiny random models of every family that can be recorded."""

from __future__ import annotations

from typing import Any

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


def tiny_model(family: str, seed: int = 0) -> Any:
    """A random model of the family in float32, ready to run."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(SMALL | SPECIFIC[family]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "bias" in name:  # larger than default: selections are not ties
            torch.nn.init.normal_(parameter, std=0.3 if "embed" in name else 0.15)
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            torch.nn.init.normal_(buffer, std=0.1)
    model.generation_config.eos_token_id = None  # random models end at random
    return model.eval()
