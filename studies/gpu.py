"""Servers that share one card: tokens a second of a large model, with and without spans.

    python -m studies.gpu -o studies/gpu.json           # on a machine with a card; ten minutes
    python -m studies.gpu --small --device cpu          # tries the script, half a minute

Runs the tests that need a card, makes a checkpoint of DeepSeek-V2-Lite's shape with random weights
(31 GB; the tokenizer is that of a committed model), and serves it by three servers on loopback.
Each holds the experts of a third of the layers; requests execute at home and call experts, or go
from server to server where the layers are. One server with all experts is beside them. Random
weights are good for times alone: tokens are compared by the tests.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from prism_plan.io.file_writing import write_bytes
from prism_plan.io.placement import write_placement
from prism_plan.model_spec import ModelShape
from prism_plan.placement import Placement, SolveReport
from studies.testbed.experiment import provenance

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "traces" / "tiny-deepseek-v2"
#: DeepSeek-V2-Lite's own figures (its config.json), and those of a model that a laptop serves.
LARGE: dict[str, Any] = {
    "num_hidden_layers": 27, "n_routed_experts": 64, "hidden_size": 2048,
    "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_attention_heads": 16,
    "num_key_value_heads": 16, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "head_dim": 64, "qk_head_dim": 192,
}  # fmt: skip
SMALL: dict[str, Any] = {"num_hidden_layers": 7, "n_routed_experts": 8}
PROMPT = "2 + 2 = 4; 17 + 5 = 22; 31 + 11 = 42; 8 + 9 = "
PATIENCE_S = 540


def make_checkpoint(folder: Path, figures: dict[str, Any]) -> ModelShape:
    """Write random weights of these figures, and a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(TOKENIZER, folder, ignore=shutil.ignore_patterns("*.safetensors", "training*"))
    config = AutoConfig.from_pretrained(TOKENIZER, **figures)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    values = json.loads((TOKENIZER / "config.json").read_text()) | figures
    first, layers = values["first_k_dense_replace"], values["num_hidden_layers"]
    expert_bytes = 3 * 2 * values["hidden_size"] * values["moe_intermediate_size"]
    return ModelShape(
        folder.name, tuple(range(first, layers)), values["n_routed_experts"],
        values["num_experts_per_tok"], expert_bytes,
    )  # fmt: skip


def plan(shape: ModelShape, servers: int, *, spans: bool) -> Placement:
    """Each server holds the experts of its part of the layers, and executes them with ``spans``."""
    layers = shape.num_layers
    holder = np.arange(layers) * servers // layers
    held = np.zeros((servers, layers, shape.num_experts), bool)
    held[holder, np.arange(layers)] = True
    table = np.repeat(holder[None, :], servers, axis=0).astype(np.int32)
    return Placement(
        shape, tuple(f"s{n}" for n in range(servers)), ((shape.num_pairs,),) * servers, held,
        SolveReport("hand"), execution=table if spans else None,
    )  # fmt: skip


def serve(
    folder: Path, checkpoint: Path, placement: Placement, device: str, requests: int, tokens: int
) -> dict[str, Any]:
    """Let all servers have requests at once; their tokens a second, and seconds of a request."""
    folder.mkdir()
    write_placement(folder / "p.json", placement)
    lines = "".join(json.dumps({"prompt": PROMPT, "id": i}) + "\n" for i in range(requests))
    (folder / "requests.jsonl").write_text(lines)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        store = f"127.0.0.1:{probe.getsockname()[1]}"
    begin_s = time.monotonic()
    words = [
        sys.executable, "-m", "runtime_adapter", "serve", "--placement", "p.json", "--checkpoint",
        str(checkpoint), "--store", store, "--device", device, "--dtype", "bfloat16",
        "--max-new-tokens", str(tokens), "--requests", "requests.jsonl",
    ]  # fmt: skip
    processes = []
    for name in placement.servers:
        with open(folder / f"{name}.err", "wb") as errors:
            own = ["--server", name, "-o", f"{name}.jsonl", "--stats", f"{name}.json"]
            processes.append(
                subprocess.Popen([*words, *own], cwd=folder, stdout=errors, stderr=errors)
            )
    codes = [process.wait(PATIENCE_S) for process in processes]
    if any(codes):
        raise SystemExit(f"{codes}: " + "".join(p.read_text() for p in folder.glob("*.err")))
    answers = [
        json.loads(line)
        for name in placement.servers
        for line in (folder / f"{name}.jsonl").read_text().splitlines()
    ]
    stats = [json.loads((folder / f"{name}.json").read_text()) for name in placement.servers]
    # the first request of each server is not counted: kernels are loaded
    counted = [answer for answer in answers if answer["id"] > 0]
    made = sum(len(answer["tokens"]) for answer in counted)
    whole_s = max(a["done_s"] for a in counted) - min(a["start_s"] for a in counted)
    return {
        "tokens_per_s": round(made / whole_s, 1),
        "request_s": round(sum(a["done_s"] - a["start_s"] for a in counted) / len(counted), 3),
        "tokens": made,
        "start_s": round(time.monotonic() - begin_s - whole_s, 1),
        "hops": sum(one["hops"] for one in stats),
        "messages": sum(one["messages"] for one in stats),
    }


def main() -> None:
    """Test, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--small", action="store_true", help="A small model, to try the script.")
    parser.add_argument("--requests", type=int, default=8, help="Of each server.")
    parser.add_argument("--tokens", type=int, default=32, help="Made for each request.")
    parser.add_argument("-o", "--output", help="Write the figures as JSON.")
    given = parser.parse_args()
    found: dict[str, Any] = {"provenance": provenance(), "device": given.device}
    if given.device.startswith("cuda"):
        tests = [str(ROOT / "tests" / "runtime_adapter" / "cli" / "test_cuda.py")]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *tests], capture_output=True, text=True, cwd=ROOT
        )
        found["tests"] = done.stdout.strip().splitlines()[-1]
        print(found["tests"], flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = make_checkpoint(folder / "model", SMALL if given.small else LARGE)
        for label, servers, spans in (
            ("at home, one server", 1, False),
            ("at home, three servers", 3, False),
            ("spans, three servers", 3, True),
        ):
            placement = plan(shape, servers, spans=spans)
            found[label] = serve(
                folder / f"run{len(found)}", folder / "model", placement, given.device,
                given.requests, given.tokens,
            )  # fmt: skip
            print(label, found[label], flush=True)
            if given.output:  # what there is: time may end before the rest
                write_bytes(given.output, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
