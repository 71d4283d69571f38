"""A GGUF file of the committed tiny Mixtral, as llama.cpp's own converter would write it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests.runtime_adapter.checkpoints import TRACES

Weights = npt.NDArray[np.float32]


def write_tiny_mixtral(path: Path) -> Path:
    """Write the model in float32; needs the packages gguf, torch and safetensors."""
    import gguf
    from safetensors.torch import load_file

    folder = TRACES / "tiny-mixtral"
    config = json.loads((folder / "config.json").read_text())
    stored = load_file(folder / "model.safetensors")
    tensors: dict[str, Weights] = {name: t.float().numpy() for name, t in stored.items()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    layers, experts = config["num_hidden_layers"], config["num_local_experts"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny-mixtral")
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, folder)
    writer.add_tensor("token_embd.weight", tensors["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", tensors["model.norm.weight"])
    writer.add_tensor("output.weight", tensors["lm_head.weight"])
    for layer in range(layers):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        attention = f"{ours}.self_attn"
        moe = f"{ours}.block_sparse_moe"
        own = {
            "attn_norm": tensors[f"{ours}.input_layernorm.weight"],
            "ffn_norm": tensors[f"{ours}.post_attention_layernorm.weight"],
            "attn_q": _interleaved(tensors[f"{attention}.q_proj.weight"], heads),
            "attn_k": _interleaved(tensors[f"{attention}.k_proj.weight"], kv_heads),
            "attn_v": tensors[f"{attention}.v_proj.weight"],
            "attn_output": tensors[f"{attention}.o_proj.weight"],
            "ffn_gate_inp": tensors[f"{moe}.gate.weight"],
        }
        for part, name in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            own[f"ffn_{part}_exps"] = np.stack(
                [tensors[f"{moe}.experts.{e}.{name}.weight"] for e in range(experts)]
            )
        for name, weights in own.items():
            writer.add_tensor(f"{theirs}.{name}.weight", np.ascontiguousarray(weights))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _interleaved(weights: Weights, heads: int) -> Weights:
    """Rows of queries or keys in the order in which llama.cpp rotates pairs of them."""
    rows = weights.reshape(heads, 2, -1, weights.shape[1]).swapaxes(1, 2)
    return rows.reshape(weights.shape)


def _add_tokenizer(writer: object, folder: Path) -> None:
    """Bytes and three special tokens: llama.cpp's "gpt2" reads them alike.

    It wants one merge at least; this one is of two bytes that no text has.
    """
    import gguf

    assert isinstance(writer, gguf.GGUFWriter)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    assert not tokenizer["model"]["merges"]
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    words = {number: word for word, number in vocabulary.items()} | special
    numbers = sorted(words)
    control, normal = int(gguf.TokenType.CONTROL), int(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([words[number] for number in numbers])
    writer.add_token_types([control if number in special else normal for number in numbers])
    writer.add_token_merges(["\u0100 \u0101"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
