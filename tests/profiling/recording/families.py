"""Tiny random models of every MoE family of the installed transformers.

``python -m tests.profiling.recording.families`` prints which families can be recorded, and why the
others cannot.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
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
    "unpadded_vocab_size": VOCABULARY,
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
    "mlp_dim": 32,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
HYBRID = ["linear_attention", "full_attention"] * 2
LOOP = {
    "n_layers_per_attn_res_block": 1,
    "loop_layer_index_start": 1,
    "loop_layer_index_end": 3,
    "loop_num_passes": 2,
}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
#: Families that are refused, and words of the reason.
REFUSED = {
    "diffusion_gemma": "its decoder takes decoder_input_ids",
    "doge": "its experts are no modules of their own",
    "ernie4_5_vl_moe": "2 experts modules: layers.1.mlp.text_moe.experts, layers.1.mlp.vision_moe",
    "inkling2_loop": "its experts module is called twice in one pass",
    "inkling2_loop_text": "its experts module is called twice in one pass",
    "jetmoe": "called with layer_input, not with the ids of the chosen experts",
    "llama4": "called with hidden_states, not with the ids of the chosen experts",
    "llama4_text": "called with hidden_states, not with the ids of the chosen experts",
    "nllb-moe": "has an encoder and a decoder",
    "qwen3_omni_moe": "has no forward pass of its own",
    "switch_transformers": "has an encoder and a decoder",
    "longcat_flash": "2 zero-computation experts beside the routed ones",
    "zaya": "so a token can skip them",
}

#: What a family needs besides; under ``text_config`` where its language model has one.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", *["sparse"] * 3]}},
    "doge": {"is_moe": True},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "text_config": {"num_key_value_heads": 4},
        "vision_config": {"num_hidden_layers": 42, "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "ernie4_5_vl_moe": {
        "text_config": {"moe_intermediate_size": [24, 16], "rope_parameters": MROPE}
    },
    "gemma4": {"text_config": {"enable_moe_block": True, "moe_intermediate_size": 24}},
    "gemma4_text": {"enable_moe_block": True, "moe_intermediate_size": 24},
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "qk_rope_head_dim": 0}},
    "glm4v_moe": {
        "text_config": {"rope_parameters": MROPE | {"partial_rotary_factor": 0.5}, "head_dim": 16}
    },
    "granitemoehybrid": {"layer_types": HYBRID},
    "hy_v4_vl": {"text_config": {"rope_parameters": MROPE}},
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "inkling2_loop": {"vision_config": {"text_hidden_size": 32}, "text_config": LOOP},
    "inkling2_loop_text": LOOP,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "qwen3_omni_moe": {"enable_audio_output": False},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 3},
    "zaya": {"num_experts_per_tok": 1},
}


@functools.cache
def moe_families() -> dict[str, str]:
    """Each ``model_type`` with experts in its code that generates text, and its class."""
    import transformers
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    models = Path(transformers.__file__).parent / "models"
    names = {
        **auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        **auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        **auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    }
    found = {}
    for family, architecture in sorted(names.items()):
        module = model_type_to_module_name(family)
        path = models / module / f"modeling_{module}.py"
        if path.is_file() and re.search(r"class \w*(Experts|MoE|Moe)\w*\(", path.read_text()):
            found[family] = architecture
    return found


def small_values(config_class: Any) -> dict[str, Any]:
    """Small sizes for a configuration class and those within it."""
    from transformers import CONFIG_MAPPING

    values: dict[str, Any] = {}
    if dataclasses.is_dataclass(config_class):
        names = [field.name for field in dataclasses.fields(config_class)]
    else:  # in the first releases of transformers 5
        names = list(inspect.signature(config_class).parameters)
    values |= {name: SIZES[name] for name in names if name in SIZES}
    if "kv_lora_rank" in values:  # latent attention has a key for every head
        values["num_key_value_heads"] = SIZES["num_attention_heads"]
    inner = getattr(config_class, "sub_configs_defaults", None) or config_class.sub_configs or {}
    for name, kind in inner.items():
        model_type = getattr(kind, "model_type", None)
        if not isinstance(kind, type):  # a class, with what its values are unless told otherwise
            kind = CONFIG_MAPPING[model_type] if model_type else kind.config_class
        values[name] = {"model_type": kind.model_type, **small_values(kind)}
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
    """A random model of a family in float32, ready to run: by its own sizes if it has some."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if family not in SPECIFIC:
        return family_model(family, seed)
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
        if name.endswith("tid2eid"):  # DeepSeek-V4: experts by token, all 0 without a checkpoint
            draws = torch.rand(len(buffer), 8)
            buffer.copy_(draws.argsort(dim=1)[:, : buffer.shape[1]])
    model.generation_config.eos_token_id = None  # random models end at random
    return model.eval()


def main() -> None:
    """Print what becomes of each family."""
    import tempfile

    import torch
    import transformers

    from prism_plan.errors import InputError
    from tests.profiling.recording.witness import require_right_recording

    torch.set_num_threads(1)  # more cost more than these models, much more on a busy machine
    transformers.logging.set_verbosity_error()
    print(f"transformers {transformers.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        for family in moe_families():
            try:
                require_right_recording(family, Path(folder) / "t.parquet")
                print(f"{family:24}recorded, equal to its routers in every row")
            except InputError as error:
                print(f"{family:24}refused: {error}")
            except AssertionError:
                print(f"{family:24}WRONG: rows differ from the routers'")
            except Exception as error:  # sizes above are made for the pinned release
                print(f"{family:24}not built: {type(error).__name__}: {str(error)[:90]!r}")


if __name__ == "__main__":
    main()
