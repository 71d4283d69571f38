"""Tiny models of every MoE family of the installed transformers.

python -m tests.sizes.families     # prints which are read, with their sizes, and why others not
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

from prism_plan.errors import InputError
from prism_plan.model_spec import ModelSpec

#: Attributes of configurations, and what they are in a tiny model, where the class has them.
TINY: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 64, "d_model": 64, "intermediate_size": 48},
    **{"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "ffn_hidden_size": 48},
    **{"num_hidden_layers": 4, "num_layers": 4, "n_layers": 4, "num_attention_heads": 4},
    **{"n_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2},
    **{"moe_topk": 2, "moe_k": 2, "n_routed_experts": 4, "num_local_experts": 4, "num_experts": 4},
    **{"moe_num_experts": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8},
    **{"qk_nope_head_dim": 16, "v_head_dim": 16, "n_group": 1, "topk_group": 1, "top_k_experts": 2},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2},
    **{"linear_num_value_heads": 4, "linear_head_dim": 8, "linear_num_heads": 4},
    **{"expert_ffn_hidden_size": 24, "zero_expert_num": 2, "shared_intermediate_size": 40},
    **{"moe_shared_expert_intermediate_size": 40, "mamba_num_heads": 4, "mamba_head_dim": 16},
    **{"ssm_state_size": 8, "n_groups": 2, "mamba_n_heads": 4, "mamba_d_head": 32},
    **{"mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2, "kv_channels": 16},
    **{"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8, "pad_token_id": 0},
    **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16},
    **{
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 96,
        "enable_moe_block": True,
    },
    **{"global_head_dim": 32, "max_position_embeddings": 128, "moe_num_shared_experts": 1},
    **{"sliding_window": 16, "share_expert_dim": 24, "router_hidden_size": 16, "num_mtp_layers": 0},
    **{"num_nextn_predict_layers": 0, "o_lora_rank": 16, "o_groups": 2, "num_kv_shared_layers": 0},
    **{"depth": 2, "num_heads": 4, "out_hidden_size": 64, "d_ff": 48, "num_decoder_layers": 4},
    **{"moe_hidden_size": 32, "moe_latent_size": None, "first_k_dense_replace": 1},
}
#: What single families need beside that.
MORE: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {
            **{"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
            "ffn_act_fn": {"name": "silu"},
        },
    },
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    **{
        key: {
            "layer_types": ["linear_attention", "full_attention"] * 2,
            **{"num_experts": 4, "num_experts_per_token": 2},
        }
        for key in ("kimi_linear", "bailing_hybrid")
    },
    **{
        key: {"moe_intermediate_size": [24, 24]}
        for key in ("ernie4_5_vl_moe_text", "ernie4_5_vl_moe")
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "glm5_next_text": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "index_topk": 16},
    "zaya": {"num_experts_per_tok": 1},
    "inkling2_text": {"unpadded_vocab_size": 96},
    "inkling2_loop_text": {"unpadded_vocab_size": 96},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 2,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
}


def text_families() -> list[str]:
    """Every model type of a language model whose code has a module of experts."""
    import importlib.util

    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    folder = Path(transformers.__file__).parent / "models"
    with_experts = {
        path.parent.name
        for path in folder.glob("*/modeling_*.py")
        if "self.experts = " in path.read_text(encoding="utf-8") or path.parent.name == "dbrx"
    }
    assert importlib.util.find_spec("transformers")
    found = []
    for family, name in CONFIG_MAPPING_NAMES.items():
        kind = getattr(transformers, name, None)
        home = kind.__module__.split(".")[-2] if kind is not None else ""
        if home in with_experts and not any(
            word in name for word in ("Vision", "Audio", "Talker", "Code2Wav", "Encoder")
        ):
            found.append(family)
    return sorted(found)


def tiny_config(family: str) -> Any:
    """The configuration of a tiny model; of a multimodal family that of its language model."""
    import transformers

    kind = transformers.CONFIG_MAPPING[family]
    inner = {
        name: tiny_of(part, part.model_type)
        for name, part in getattr(kind, "sub_configs", {}).items()
        if isinstance(part, type) and part is not transformers.AutoConfig
    }
    if "text_config" in inner or "thinker_config" in inner:
        return kind(**{name: part.to_dict() for name, part in inner.items()})
    return tiny_of(kind, family)


def tiny_of(kind: Any, family: str) -> Any:
    spellings = kind.attribute_map
    known = {spellings.get(key, key): value for key, value in TINY.items() if _has(kind, key)}
    return kind(**{**known, **MORE.get(family, {})})


def _has(kind: Any, key: str) -> bool:
    return hasattr(kind, kind.attribute_map.get(key, key))


def built(config: Any, device: str = "meta", dtype: str = "bfloat16") -> Any:
    """The model that transformers builds; small random weights, or none on the meta device."""
    import torch
    from transformers.models.auto import modeling_auto as auto

    from prism_plan.sizes.meta_device import TASKS

    for task in TASKS:
        mapping = getattr(auto, f"MODEL_FOR_{task}_MAPPING", {})
        if type(config) in mapping:
            torch.manual_seed(0)
            with torch.device(device):
                return mapping[type(config)]._from_config(config, dtype=getattr(torch, dtype))
    raise InputError(f"{config.model_type} has no class of a language model")


class NotBuilt(Exception):
    """The tiny configuration here is none that the family's code builds."""


def read_every_way(family: str, folder: Path) -> list[ModelSpec]:
    """Sizes of a tiny model as loaded, from its headers, and from its config.json alone.

    Of a large one (the towers for images of some families cannot be made small) as built on the
    meta device alone. A checkpoint is saved in float32, where routers have the model's dtype.
    """
    from prism_plan.sizes.load import load_model_spec
    from prism_plan.sizes.loaded_model import spec_from_loaded_model

    try:
        config = tiny_config(family)
        model = built(config)
        large = sum(one.numel() for one in model.parameters()) > 2e7
        model = model if large else built(config, "cpu", "float32")
    except InputError:
        raise
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {' '.join(str(error).split()):.150}") from error
    specs = [spec_from_loaded_model(model, folder.name)]
    if not large:
        model.save_pretrained(folder)
        specs.append(load_model_spec(folder))
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        specs.append(load_model_spec(folder))
    return specs


def main() -> None:
    """Print the list."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    for family in text_families():
        with tempfile.TemporaryDirectory() as folder:
            try:
                spec, *others = read_every_way(family, Path(folder) / "tiny")
                how = "loaded, headers and meta equal" if others else "loaded on meta"
                how = how if all(other == spec for other in others) else "DIFFER"
                sizes = f"expert {spec.expert_bytes:,}, dense {spec.dense_bytes:,}"
                layers = f"{spec.layers_text()} of {spec.num_decoder_layers}"
                print(f"{family}: {how}: layers {layers}, {sizes}, kv {spec.kv_bytes_per_token}")
            except InputError as error:
                print(f"{family}: refused: {error}")
            except NotBuilt as error:
                print(f"{family}: not built here: {error}")


if __name__ == "__main__":
    main()
