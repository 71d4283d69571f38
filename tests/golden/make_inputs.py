"""Makes the inputs of the golden cases, everything in ``tests/golden/inputs`` but ``clusters``.

    python -m tests.golden.make_inputs PRISM_PLAN

``PRISM_PLAN`` is the installed command of the commit that the values are golden of; it makes the
inputs that have a format of ours. Needs PyTorch and safetensors, for two engines write their
recordings with them. The inputs are committed and this script is their origin: to run it again is
needed only for further inputs, and changes the old ones in nothing but dates and compression.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
INPUTS = Path(__file__).resolve().parent / "inputs"

#: The model of most recordings: layer 0 is dense, as in DeepSeek.
TOY: dict[str, Any] = {
    "name": "toy",
    "moe_layers": [1, 2, 3],
    "num_experts": 6,
    "top_k": 2,
    "hidden_size": 8,
    "dtype_bytes": 2,
    "expert_bytes": 100_000_000,
    "dense_bytes": 1_000_000_000,
    "kv_bytes_per_token": 4_096,
}
#: Experts of mixed precision: bytes differ by layer.
UNEQUAL = TOY | {"name": "unequal", "expert_bytes": [100_000_000, 60_000_000, 30_000_000]}
DECODER_LAYERS = TOY["moe_layers"][-1] + 1

#: What the config.json files on the Hugging Face Hub say of sizes, in their spelling. The last
#: two families are not read at 41342e8 and the last model has no experts: to refuse them is
#: golden as well.
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "vocab_size": 32000,
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2", "attention_bias": False, "first_k_dense_replace": 1,
        "hidden_size": 2048, "intermediate_size": 10944, "kv_lora_rank": 512,
        "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_routed_experts": 64,
        "n_shared_experts": 2, "num_attention_heads": 16, "num_experts_per_tok": 6,
        "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 102400,
    },
    "deepseek-v2": {
        "model_type": "deepseek_v2", "attention_bias": False, "first_k_dense_replace": 1,
        "hidden_size": 5120, "intermediate_size": 12288, "kv_lora_rank": 512,
        "moe_intermediate_size": 1536, "moe_layer_freq": 1, "n_group": 8,
        "n_routed_experts": 160, "n_shared_experts": 2, "num_attention_heads": 128,
        "num_experts_per_tok": 6, "num_hidden_layers": 60, "num_key_value_heads": 128,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "tie_word_embeddings": False, "topk_group": 3, "torch_dtype": "bfloat16",
        "v_head_dim": 128, "vocab_size": 102400,
    },
    "deepseek-v3-fp8": {
        "model_type": "deepseek_v3", "attention_bias": False, "first_k_dense_replace": 3,
        "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512,
        "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
        "n_routed_experts": 256, "n_shared_experts": 1, "num_attention_heads": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "tie_word_embeddings": False, "topk_group": 4,
        "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 129280,
        "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
    },
    "qwen1.5-moe-a2.7b": {
        "model_type": "qwen2_moe", "decoder_sparse_step": 1, "hidden_size": 2048,
        "intermediate_size": 5632, "moe_intermediate_size": 1408, "num_attention_heads": 16,
        "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "num_key_value_heads": 16, "shared_expert_intermediate_size": 5632,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 151936,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1,
        "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144, "mlp_only_layers": [],
        "moe_intermediate_size": 768, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 151936,
    },
    "olmoe-1b-7b": {
        "model_type": "olmoe", "attention_bias": False, "hidden_size": 2048,
        "intermediate_size": 1024, "num_attention_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 50304,
    },
    "gpt-oss-20b-mxfp4": {
        "model_type": "gpt_oss", "attention_bias": True, "experts_per_token": 4, "head_dim": 64,
        "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64,
        "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
        "num_local_experts": 32, "tie_word_embeddings": False, "vocab_size": 201088,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
    },
    "phi-3.5-moe": {
        "model_type": "phimoe", "attention_bias": True, "hidden_size": 4096,
        "intermediate_size": 6400, "lm_head_bias": True, "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "num_local_experts": 16, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "vocab_size": 32064,
    },
    "glm-4.5-air": {
        "model_type": "glm4_moe", "attention_bias": True, "first_k_dense_replace": 1,
        "head_dim": 128, "hidden_size": 4096, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 128,
        "n_shared_experts": 1, "num_attention_heads": 96, "num_experts_per_tok": 8,
        "num_hidden_layers": 46, "num_key_value_heads": 8, "num_nextn_predict_layers": 1,
        "tie_word_embeddings": False, "topk_group": 1, "torch_dtype": "bfloat16",
        "use_qk_norm": False, "vocab_size": 151552,
    },
    "llama-3.1-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 128256,
    },
}  # fmt: skip


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n")


def routing(tokens: int, seed: int) -> list[list[list[int]]]:
    """Selections [T, MoE layers, K] of the toy model, some experts called more than others."""
    rng = random.Random(seed)
    experts = range(TOY["num_experts"])

    def one() -> list[int]:
        drawn = {e: rng.random() ** (1 + (e + seed) % 4) for e in experts}
        return sorted(experts, key=lambda e: -drawn[e])[: TOY["top_k"]]

    return [[one() for _ in TOY["moe_layers"]] for _ in range(tokens)]


def with_dense(experts: Sequence[Sequence[Sequence[int]]], dtype: str) -> Any:
    """The array [T, decoder layers, K] as engines return it: zeros in the columns of layer 0."""
    array = np.zeros((len(experts), DECODER_LAYERS, TOY["top_k"]), dtype)
    array[:, TOY["moe_layers"]] = experts
    return array


def counted(experts: Sequence[Sequence[Sequence[int]]]) -> Any:
    """Calls [decoder layers, E] of selections."""
    calls = np.zeros((DECODER_LAYERS, TOY["num_experts"]), np.int64)
    for token in experts:
        for layer, chosen in zip(TOY["moe_layers"], token, strict=True):
            calls[layer, chosen] += 1
    return calls


# ------------------------------------------------------------------------------- models and counts


def make_models() -> None:
    """Model specs, configs, and for each a counts CSV of one token."""
    write_json(INPUTS / "toy.json", TOY)
    write_json(INPUTS / "unequal.json", UNEQUAL)
    for name, config in CONFIGS.items():
        folder = INPUTS / "configs" / name
        write_json(folder / "config.json", config)
        first = config.get("first_k_dense_replace", 0)
        layers = range(first, config["num_hidden_layers"])
        top_k = config.get("num_experts_per_tok", 2)
        rows = [f"one,{layer},{expert},1" for layer in layers for expert in range(top_k)]
        (folder / "counts.csv").write_text("\n".join(["task,layer,expert,count", *rows]) + "\n")


def counts_csv(
    path: Path, layers: Iterable[int], experts: int, top_k: int, tokens: dict[str, int]
) -> None:
    """Counts of so many tokens a task, some experts called much more than others."""
    rng = random.Random(11)
    lines = ["task,layer,expert,count"]
    for task, number in tokens.items():
        for layer in layers:
            wanted = [rng.random() ** 3 + 0.02 for _ in range(experts)]
            total = sum(wanted)
            counts = [min(number, int(number * top_k * w / total)) for w in wanted]
            at = 0
            while sum(counts) < number * top_k:  # what rounding left over
                counts[at % experts] += counts[at % experts] < number
                at += 1
            lines += [f"{task},{layer},{e},{count}" for e, count in enumerate(counts)]
    path.write_text("\n".join(lines) + "\n")


# --------------------------------------------------------------------------------------- recordings


def make_recordings() -> None:
    """A small recording of each format that ``profile`` reads, of the toy model."""
    folder = INPUTS / "recordings"
    folder.mkdir(parents=True, exist_ok=True)
    toy = (TOY["moe_layers"], TOY["num_experts"], TOY["top_k"])
    counts_csv(folder / "counts.csv", *toy, {"chat": 40, "code": 30, "law": 55})
    _esft(folder / "esft")
    _vllm(folder)
    _sglang(folder)
    _trtllm(folder / "trtllm")


def _esft(folder: Path) -> None:
    rng = random.Random(5)
    for number, task in enumerate(("chat", "code")):
        requests = [routing(3 + 2 * r, 10 * number + r) for r in range(4)]
        (folder / task).mkdir(parents=True, exist_ok=True)
        for at, layer in enumerate(TOY["moe_layers"]):
            lines = []
            for request in requests:
                ids = [str(e) for token in request for e in token[at]]
                gates = [f"{rng.uniform(0.05, 0.4):.6f}" for _ in ids]
                lines.append("\t".join(ids) + "\t\t" + "\t".join(gates))
            (folder / task / f"expert_weights_{layer}.txt").write_text("\n".join(lines) + "\n")


def _npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _vllm(folder: Path) -> None:
    lines: list[dict[str, Any]] = []
    for seed, (prompt, tokens) in enumerate([(4, 9), (7, 12), (2, 3)]):
        text = base64.b64encode(_npy(with_dense(routing(tokens, seed), "uint8"))).decode()
        usage = {"prompt_tokens": prompt, "completion_tokens": tokens + 1 - prompt}
        lines.append({"id": str(seed), "choices": [{"index": 0, "routed_experts": text}]})
        lines[-1]["usage"] = usage
    nested = with_dense(routing(5, 8), "int32").tolist()
    lines.append({"routed_experts": nested, "task": "code", "prompt_tokens": 3})
    (folder / "vllm.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "vllm.npy").write_bytes(_npy(with_dense(routing(20, 9), "uint16")))


def _sglang(folder: Path) -> None:
    import torch

    lines = []
    for seed, (prompt, tokens) in enumerate([(5, 11), (3, 8)]):
        data = with_dense(routing(tokens, 20 + seed), "<i4").tobytes()
        meta = {"prompt_tokens": prompt, "completion_tokens": tokens + 1 - prompt}
        meta["routed_experts"] = base64.b64encode(data).decode()
        lines.append({"text": "", "meta_info": meta})
    (folder / "sglang.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    rng = random.Random(3)
    physical = 9
    spare = physical - TOY["num_experts"]
    table = []
    for _ in range(DECODER_LAYERS):
        row = [*range(TOY["num_experts"]), *rng.choices(range(TOY["num_experts"]), k=spare)]
        rng.shuffle(row)
        table.append(row)

    def record(number: int, seed: int, mode: int, positions: list[int], pieces: Any) -> Any:
        ids = np.full((DECODER_LAYERS, len(positions), 8), -1, np.int32)
        for token, of_layer in enumerate(routing(len(positions), seed)):
            for layer, chosen in zip(TOY["moe_layers"], of_layer, strict=True):
                for at, expert in enumerate(chosen):
                    copies = [p for p in range(physical) if table[layer][p] == expert]
                    ids[layer, token, at] = rng.choice(copies)
        called = np.stack([np.bincount(r[r >= 0], minlength=physical) for r in ids]).astype("i4")
        return {
            "forward_pass_id": number, "rank": 0, "gatherer_key": "primary",
            "input_ids": [1000 * number + t for t in range(len(positions))],
            "positions": positions, "extend_seq_lens": pieces, "forward_mode": mode,
            "topk_ids_of_layer": torch.from_numpy(ids), "misc_objects": [],
            "global_physical_count": torch.from_numpy(called),
        }  # fmt: skip

    extend, decode = 1, 2
    records = [
        record(1, 30, extend, [0, 1, 2, 3, 0, 1], [4, 2]),
        record(2, 31, decode, [4, 2], None),
        record(3, 32, decode, [5, 3], None),
        record(4, 33, extend, [0, 1, 2], [3]),
        record(5, 34, decode, [6, 4, 3], None),
    ]
    keys = ("forward_pass_id", "rank", "gatherer_key", "global_physical_count")
    maps = {"last_physical_to_logical_map": torch.tensor(table)}
    torch.save({"records": records, **maps}, str(folder / "sglang-token.pt"))
    passes = [{key: one[key] for key in keys} for one in records]
    torch.save({"records": passes, **maps}, str(folder / "sglang-pass.pt"))
    rows = np.zeros((6, DECODER_LAYERS, TOY["num_experts"]), np.int32)
    rows[0], rows[1] = counted(routing(12, 40)), counted(routing(7, 41))
    stat = {"rank": 0, "logical_count": torch.from_numpy(rows)}
    stat["average_utilization_rate_over_window"] = None
    torch.save(stat, str(folder / "sglang-stat.pt"))


def _trtllm(folder: Path) -> None:
    from safetensors.numpy import save_file

    shape = {"num_experts": TOY["num_experts"], "num_experts_per_token": TOY["top_k"]}
    write_json(folder / "meta_info.json", shape)
    for rank in range(2):
        calls = [counted(routing(4 + rank, 50 + 2 * rank + i)) for i in range(2)]
        tensors = {
            f"{100 + i}_{layer}": np.ascontiguousarray(of_layers[layer])
            for i, of_layers in enumerate(calls)
            for layer in TOY["moe_layers"]
        }
        save_file(tensors, folder / f"rank{rank}.safetensors")


def make_arrivals() -> None:
    """Fixed arrivals at the tiny cluster, some with their task or request."""
    rng = random.Random(7)
    tasks = ("arithmetic", "ascii-word", "narrative")
    lines = []
    for number in range(24):
        line: dict[str, Any] = {"server": f"edge-{number % 3}", "at_s": number * rng.uniform(0, 1)}
        if number % 2:
            line["task"] = tasks[number % 5 % 3]
        lines.append(json.dumps(line) + "\n")
    (INPUTS / "arrivals.jsonl").write_text("".join(lines))


# ---------------------------------------------------------------------------- files of our formats


def make_ours(command: str) -> None:
    """Traces, placements, reports and tables, made by the command of the golden commit."""

    def run(*words: str) -> None:
        environment = os.environ | {"SOURCE_DATE_EPOCH": "1764288000"}
        subprocess.run([command, *words], cwd=INPUTS, env=environment, check=True)

    (INPUTS / "ours").mkdir(exist_ok=True)
    (INPUTS / "placements").mkdir(exist_ok=True)
    csv = INPUTS / "v2lite.csv"
    counts_csv(csv, range(1, 27), 64, 6, {"intent": 900, "law": 3100, "translation": 1700})
    run("profile", "v2lite.csv", "--format", "counts", "--model", "deepseek-v2-lite",
        "-o", "ours/v2lite.parquet")  # fmt: skip
    csv.unlink()
    for model in ("toy", "unequal"):
        run("profile", "recordings/counts.csv", "--format", "counts", "--model", f"{model}.json",
            "-o", f"ours/{model}.parquet")  # fmt: skip
    traces = {
        "v2": ("../../../traces/tiny-deepseek-v2.parquet", "../../../traces/tiny-cluster.toml"),
        "busy": ("../../../traces/tiny-deepseek-v2.parquet", "clusters/busy.toml"),
        "mixtral": ("../../../traces/tiny-mixtral.parquet", "clusters/tight.toml"),
        "v2lite": ("ours/v2lite.parquet", "../../../traces/paper-v2lite.toml"),
        "unequal": ("ours/unequal.parquet", "clusters/bytes.toml"),
    }
    wanted = {
        "v2": ("eplb", "prism", "exact", "layer-partition"),
        "busy": ("eplb",),
        "mixtral": ("uniform", "exact"),
        "v2lite": ("smartmoe", "exact"),
        "unequal": ("ilp",),
    }
    for name, solvers in wanted.items():
        trace, cluster = traces[name]
        for solver in solvers:
            run("solve", trace, "--cluster", cluster, "--solver", solver,
                "-o", f"placements/{name}-{solver}.json")  # fmt: skip
    trace, cluster = traces["v2"]
    on = ("--cluster", cluster)
    run("compare", trace, *on, "--solvers", "eplb,prism,exact", "--holdout", "0.5",
        "-o", "ours/comparison.json")  # fmt: skip
    run("simulate", "placements/v2-prism.json", "placements/v2-eplb.json", "--trace", trace, *on,
        "--requests", "30", "--offload", "--migrate", "partial", "--migrate-every", "60",
        "-o", "ours/simulation.json", "--per-request", "ours/requests.parquet")  # fmt: skip
    run("migrate", "placements/v2-prism.json", "placements/v2-exact.json", *on,
        "-o", "ours/migration.json")  # fmt: skip
    for kind in ("parquet", "csv"):
        run("simulate", "--trace", trace, *on, "--sweep", "bandwidth_mbps=100,500",
            "--sweep", "solver=eplb,exact", "--requests", "5", "--jobs", "1",
            "-o", f"ours/sweep.{kind}")  # fmt: skip


def main() -> None:
    """Make all of them."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.golden.make_inputs PRISM_PLAN")
    make_models()
    make_recordings()
    make_arrivals()
    make_ours(str(Path(sys.argv[1]).resolve()))


if __name__ == "__main__":
    main()
