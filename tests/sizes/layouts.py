"""Tiny checkpoints in the layouts of quantising tools, written tensor by tensor.

A linear layer [out, in] becomes the tensors that the tool stores for it; everything else stays in
bfloat16. Sources of the layouts, as of the releases named:

* AWQ: AutoAWQ 0.2, ``WQLinear_GEMM``; GPTQ and AutoRound's default: AutoGPTQ 0.7, ``QuantLinear``;
  AutoRound 0.5 packs alike, without ``g_idx``.
* compressed-tensors 0.9: ``pack-quantized`` and ``float-quantized``; block fp8: DeepSeek-V3's
  ``weight_scale_inv``; NVFP4: ModelOpt 0.33 (``weight_scale_2`` and ``input_scale`` beside it).
* MXFP4: gpt-oss (``_blocks``, ``_scales``); MLX: mlx-lm 0.25, ``QuantizedSwitchLinear``.
* bitsandbytes 0.45: ``Params4bit`` with its quant state, and int8 with ``SCB``; HQQ 0.2.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, WIDTH, EXPERTS, LAYERS, VOCABULARY = 128, 64, 4, 3, 160

#: A Qwen3-MoE whose first layer is dense.
CONFIG: dict[str, Any] = {
    **{"model_type": "qwen3_moe", "hidden_size": HIDDEN, "intermediate_size": 192},
    **{"moe_intermediate_size": WIDTH, "num_experts": EXPERTS, "num_experts_per_tok": 2},
    **{"num_hidden_layers": LAYERS, "mlp_only_layers": [0], "decoder_sparse_step": 1},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    **{"vocab_size": VOCABULARY, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
}

Tensors = dict[str, torch.Tensor]
#: Makes the tensors of one linear layer: its name, rows (out) and columns (in).
Layout = Callable[[str, int, int], Tensors]


def _bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


def _int32(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int32)


def plain(name: str, out: int, into: int) -> Tensors:
    return {f"{name}.weight": _bf16(out, into)}


def awq(name: str, out: int, into: int) -> Tensors:
    groups = into // 32
    return {
        f"{name}.qweight": _int32(into, out // 8),
        f"{name}.qzeros": _int32(groups, out // 8),
        f"{name}.scales": torch.zeros(groups, out, dtype=torch.float16),
    }


def gptq(name: str, out: int, into: int) -> Tensors:
    return autoround(name, out, into) | {f"{name}.g_idx": _int32(into)}


def autoround(name: str, out: int, into: int) -> Tensors:
    groups = into // 32
    return {
        f"{name}.qweight": _int32(into // 8, out),
        f"{name}.qzeros": _int32(groups, out // 8),
        f"{name}.scales": torch.zeros(groups, out, dtype=torch.float16),
    }


def packed(name: str, out: int, into: int) -> Tensors:
    return {
        f"{name}.weight_packed": _int32(out, into // 8),
        f"{name}.weight_scale": _bf16(out, into // 32),
        f"{name}.weight_shape": torch.tensor([out, into]),
    }


def fp8_channels(name: str, out: int, into: int) -> Tensors:
    return {
        f"{name}.weight": torch.zeros(out, into).to(torch.float8_e4m3fn),
        f"{name}.weight_scale": _bf16(out, 1),
    }


def fp8_blocks(name: str, out: int, into: int) -> Tensors:
    return {
        f"{name}.weight": torch.zeros(out, into).to(torch.float8_e4m3fn),
        f"{name}.weight_scale_inv": torch.zeros(-(-out // 128), -(-into // 128)),
    }


def nvfp4(name: str, out: int, into: int) -> Tensors:
    return {
        f"{name}.weight": torch.zeros(out, into // 2, dtype=torch.uint8),
        f"{name}.weight_scale": torch.zeros(out, into // 16).to(torch.float8_e4m3fn),
        f"{name}.weight_scale_2": torch.zeros(()),
        f"{name}.input_scale": torch.zeros(()),
    }


def bnb_nf4(name: str, out: int, into: int) -> Tensors:
    # The state is JSON, and its length differs with the digits of a number in it.
    digits = "0.0123456" if "experts.1." in name else "0.01"
    state = json.dumps({"quant_type": "nf4", "shape": [out, into], "nested_offset": digits})
    return {
        f"{name}.weight": torch.zeros(out * into // 2, 1, dtype=torch.uint8),
        f"{name}.weight.absmax": torch.zeros(out * into // 64, dtype=torch.uint8),
        f"{name}.weight.quant_map": torch.zeros(16),
        f"{name}.weight.nested_absmax": torch.zeros(-(-out * into // (64 * 256))),
        f"{name}.weight.nested_quant_map": torch.zeros(256),
        f"{name}.weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(state.encode()), dtype=torch.uint8
        ),
    }


def bnb_int8(name: str, out: int, into: int) -> Tensors:
    return {
        f"{name}.weight": torch.zeros(out, into, dtype=torch.int8),
        f"{name}.SCB": torch.zeros(out),
        f"{name}.weight_format": torch.zeros((), dtype=torch.uint8),
    }


def hqq(name: str, out: int, into: int) -> Tensors:
    groups = out * into // 64
    return {
        f"{name}.W_q": torch.zeros(out * into // 2, dtype=torch.uint8),
        f"{name}.scale": torch.zeros(groups, 1, dtype=torch.float16),
        f"{name}.zero": torch.zeros(groups, 1, dtype=torch.float16),
        f"{name}.nbits": torch.tensor([4]),
    }


def mlx(name: str, out: int, into: int, *before: int) -> Tensors:
    return {
        f"{name}.weight": torch.zeros(*before, out, into // 8, dtype=torch.uint32),
        f"{name}.scales": _bf16(*before, out, into // 64),
        f"{name}.biases": _bf16(*before, out, into // 64),
    }


#: Layouts with experts one by one, and the keys of config.json that name the quantisation.
ONE_BY_ONE: dict[str, tuple[Layout, dict[str, Any]]] = {
    "unquantised": (plain, {}),
    "AWQ": (awq, {"quantization_config": {"quant_method": "awq", "bits": 4}}),
    "GPTQ": (gptq, {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    "AutoRound": (autoround, {"quantization_config": {"quant_method": "auto-round"}}),
    "compressed-tensors": (packed, {"quantization_config": {"format": "pack-quantized"}}),
    "compressed-tensors fp8": (fp8_channels, {"compression_config": {"format": "float-quantized"}}),
    "block fp8": (fp8_blocks, {"quantization_config": {"quant_method": "fp8"}}),
    "NVFP4": (nvfp4, {"quantization_config": {"quant_method": "modelopt"}}),
    "bitsandbytes nf4": (bnb_nf4, {"quantization_config": {"load_in_4bit": True}}),
    "bitsandbytes int8": (bnb_int8, {"quantization_config": {"load_in_8bit": True}}),
    "HQQ": (hqq, {"quantization_config": {"quant_method": "hqq"}}),
}


def _attention(layer: str, layout: Layout) -> Tensors:
    made: Tensors = {}
    for part, out, into in (("q", 128, HIDDEN), ("k", 64, HIDDEN), ("v", 64, HIDDEN)):
        made |= layout(f"{layer}.self_attn.{part}_proj", out, into)
    return made | layout(f"{layer}.self_attn.o_proj", HIDDEN, 128)


def _swiglu(module: str, width: int, layout: Layout) -> Tensors:
    made = layout(f"{module}.gate_proj", width, HIDDEN)
    return (
        made
        | layout(f"{module}.up_proj", width, HIDDEN)
        | layout(f"{module}.down_proj", HIDDEN, width)
    )


def _mlx_experts(module: str) -> Tensors:
    made = mlx(f"{module}.switch_mlp.gate_proj", WIDTH, HIDDEN, EXPERTS)
    made |= mlx(f"{module}.switch_mlp.up_proj", WIDTH, HIDDEN, EXPERTS)
    return made | mlx(f"{module}.switch_mlp.down_proj", HIDDEN, WIDTH, EXPERTS)


def _mxfp4_experts(module: str) -> Tensors:
    made: Tensors = {}
    for part, out, into in (("gate_up", 2 * WIDTH, HIDDEN), ("down", HIDDEN, WIDTH)):
        name = f"{module}.experts.{part}_proj"
        blocks = (EXPERTS, out, into // 32)
        made[f"{name}_blocks"] = torch.zeros(*blocks, 16, dtype=torch.uint8)
        made[f"{name}_scales"] = torch.zeros(*blocks, dtype=torch.uint8)
        made[f"{name}_bias"] = _bf16(EXPERTS, out)
    return made


def _stacked_experts(module: str) -> Tensors:
    return {
        f"{module}.experts.gate_up_proj": _bf16(EXPERTS, 2 * WIDTH, HIDDEN),
        f"{module}.experts.down_proj": _bf16(EXPERTS, HIDDEN, WIDTH),
    }


#: Layouts with all experts of a layer in one tensor: of the experts, of the rest, and the keys.
STACKED: dict[str, tuple[Callable[[str], Tensors], Layout, dict[str, Any]]] = {
    "MLX": (_mlx_experts, mlx, {"quantization": {"group_size": 64, "bits": 4}}),
    "MXFP4": (_mxfp4_experts, plain, {"quantization_config": {"quant_method": "mxfp4"}}),
    "stacked": (_stacked_experts, plain, {}),
}


def made(name: str) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """The dense tensors of a layout, those of its experts, and its config.json."""
    if name in STACKED:
        stack, layout, keys = STACKED[name]
    else:
        layout, keys = ONE_BY_ONE[name]
    dense = {
        "model.embed_tokens.weight": _bf16(VOCABULARY, HIDDEN),
        "model.norm.weight": _bf16(HIDDEN),
        "lm_head.weight": _bf16(VOCABULARY, HIDDEN),
    }
    experts: Tensors = {}
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        dense |= _attention(layer, layout)
        dense[f"{layer}.input_layernorm.weight"] = _bf16(HIDDEN)
        if number == 0:
            dense |= _swiglu(f"{layer}.mlp", 192, layout)
            continue
        dense[f"{layer}.mlp.gate.weight"] = _bf16(EXPERTS, HIDDEN)
        if name in STACKED:
            experts |= stack(f"{layer}.mlp")
            continue
        for expert in range(EXPERTS):
            experts |= _swiglu(f"{layer}.mlp.experts.{expert}", WIDTH, layout)
    return dense, experts, CONFIG | keys


def save(folder: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    """Write a checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def num_bytes(tensors: Tensors, words: str = "") -> int:
    """Bytes of the tensors with ``words`` in their names."""
    return sum(one.numel() * one.element_size() for name, one in tensors.items() if words in name)
