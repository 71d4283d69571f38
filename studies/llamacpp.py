"""Tokens a second of llama.cpp with an exported plan, beside its own split by memory.

    python -m studies.llamacpp LLAMACPP_FOLDER -o studies/llamacpp.json      # root; a few minutes

Three boxes with room for 8, 4 and 3 of twelve layers on lines of 500 Mbit/s with 1 ms of round
trip (:mod:`studies.delay_proxy`), requests of the largest one. A random model of Mixtral's form,
small, so that the network decides and two cores carry three boxes. The exported script and the same
one with llama.cpp's split in its place run in turn; the log of the first one is verified.
LLAMACPP_FOLDER has ``lx``, which runs a program of llama.cpp by name.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from prism_plan.export import llamacpp
from prism_plan.export.llamacpp_log import verify_log
from prism_plan.export.shell_script import parse_script
from prism_plan.export.stages import Stage
from prism_plan.export.whole_layers import ExportRequest, export_whole_layers
from prism_plan.instance import Instance
from prism_plan.io.cluster import parse_cluster
from prism_plan.io.endpoints import EndpointTable
from prism_plan.io.file_writing import write_bytes
from prism_plan.model_spec import ModelSpec
from prism_plan.solvers import solve
from prism_plan.trace import TokenBatch, Trace, trace_from_batches
from studies.testbed.experiment import provenance
from studies.testbed.testbed import Testbed

LAYERS, EXPERTS, HIDDEN, WIDTH, TOP_K, WORDS = 12, 8, 128, 256, 2, 259
ROOM = (8, 4, 3)
NAMES = ("big", "middle", "small")
TOKENS, ROUNDS, PORT, HTTP_PORT, RTT_MS = 48, 7, 50052, 8080, 1.0
PATIENCE_S = 120.0


def write_model(path: Path) -> None:
    """A random model of Mixtral's form as GGUF, with a vocabulary of bytes."""
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // 4)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(TOP_K)
    writer.add_vocab_size(WORDS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    words = ["<pad>", "<bos>", "<eos>", *(chr(0x100 + n) for n in range(WORDS - 3))]
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3, *([1] * (WORDS - 3))])
    writer.add_token_merges([f"{words[3]} {words[4]}"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {
        "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (HIDDEN, HIDDEN), "attn_v": (HIDDEN, HIDDEN), "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate_inp": (EXPERTS, HIDDEN), "ffn_gate_exps": (EXPERTS, WIDTH, HIDDEN),
        "ffn_up_exps": (EXPERTS, WIDTH, HIDDEN), "ffn_down_exps": (EXPERTS, HIDDEN, WIDTH),
    }  # fmt: skip
    tensors = {"token_embd": (WORDS, HIDDEN), "output_norm": (HIDDEN,), "output": (WORDS, HIDDEN)}
    tensors |= {f"blk.{n}.{name}": shape for n in range(LAYERS) for name, shape in shapes.items()}
    for name, shape in tensors.items():
        weights = rng.normal(0, 0.05, shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", weights + ("norm" in name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def problem() -> tuple[Trace, Any]:
    """Random routing of the model, and the cluster of the three boxes."""
    model = ModelSpec(
        name="random", moe_layers=tuple(range(LAYERS)), num_experts=EXPERTS, top_k=TOP_K,
        hidden_size=HIDDEN, dtype_bytes=4, expert_bytes=12 * HIDDEN * WIDTH,
        dense_bytes=4 * WORDS * HIDDEN * 2, kv_bytes_per_token=0,
    )  # fmt: skip
    rng = np.random.default_rng(1)
    rows = np.argsort(rng.random((64, LAYERS, EXPERTS)), axis=2)[:, :, :TOP_K].astype(np.uint16)
    batch = TokenBatch(
        request=np.repeat(np.arange(4, dtype=np.int32), 16),
        position=np.tile(np.arange(16, dtype=np.int32), 4),
        phase=np.tile(np.array([0] * 4 + [1] * 12, np.int8), 4),
        task=np.zeros(64, np.int32), experts=rows,
    )  # fmt: skip
    trace = trace_from_batches(model, ("any",), [batch])
    text = ['name = "boxes"', "[link]", "bandwidth_mbps = 500", f"rtt_ms = {RTT_MS}"]
    for name, layers in zip(NAMES, ROOM, strict=True):
        text += ["[[server]]", f'name = "{name}"', "tasks = { any = 1.0 }"]
        text += ["arrival_interval_s = 60.0", "[[server.gpu]]", f"slots = {layers * EXPERTS}"]
    return trace, parse_cluster("\n".join(text) + "\n")


def own_split(endpoints: dict[str, EndpointTable]) -> str:
    """The script in which llama.cpp splits all layers over all boxes by their memory."""
    gpus = [(n, 0) for n in range(len(NAMES))]
    devices = llamacpp.devices_of(
        [(name, 0) for name in NAMES], NAMES[0],
        {name: endpoints[name].host for name in NAMES}, dict.fromkeys(NAMES, PORT), None,
        dict.fromkeys(NAMES, 1),
    )  # fmt: skip
    text = llamacpp.layers_script(
        [Stage(n, 0, n, n) for n in range(len(NAMES))], dict(zip(gpus, devices, strict=True)),
        NAMES, NAMES[0], LAYERS, 256, ["split by memory"],
    )  # fmt: skip
    return text.replace("-ts 1,1,2", f"-ts {','.join(map(str, ROOM))}")


def write_programs(folder: Path, llamacpp_folder: Path) -> dict[str, str]:
    """Wrappers of the programs; what other boxes reach answers over the delay of a long line."""
    lx, here = llamacpp_folder.resolve() / "lx", Path(__file__).resolve().parents[1]
    server, rpc = folder / "llama-server", folder / "rpc-server"
    server.write_text(f'#!/bin/sh\nexec {lx} llama-server "$@"\n')
    rpc.write_text(
        f"""#!/bin/sh
# as the export calls it: --host HOST --port PORT
if [ "$2" = 127.0.0.1 ]; then exec {lx} ggml-rpc-server "$@"; fi
behind=$(($4 + 100))
cd {here}
{sys.executable} -m studies.delay_proxy "$2:$4" "127.0.0.1:$behind" {RTT_MS} &
exec {lx} ggml-rpc-server --host 127.0.0.1 --port $behind
"""
    )
    for program in (server, rpc):
        program.chmod(0o755)
    return {"LLAMA_SERVER": str(server), "RPC_SERVER": str(rpc)}


def answered(testbed: Testbed) -> dict[str, Any]:
    """One answer of the head; waits until it serves. The request is made in its own namespace."""
    body = json.dumps(
        {"prompt": "\u0110\u0120", "n_predict": TOKENS, "temperature": 0, "ignore_eos": True,
         "cache_prompt": False}
    )  # fmt: skip
    script = (
        "import json,sys,urllib.request as u;"
        f"r=u.Request('http://127.0.0.1:{HTTP_PORT}/completion',sys.argv[1].encode(),"
        "{'Content-Type':'application/json'});sys.stdout.write(u.urlopen(r).read().decode())"
    )
    deadline = time.monotonic() + PATIENCE_S
    while True:
        done = subprocess.run(
            ["ip", "netns", "exec", testbed.namespace(0), "python3", "-c", script, body],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            found: dict[str, Any] = json.loads(done.stdout)
            return found
        if time.monotonic() > deadline:
            raise SystemExit(f"llama-server does not answer: {done.stderr[-300:]}")
        time.sleep(0.2)


def measure(
    testbed: Testbed, folder: Path, script: str, environment: dict[str, str], log: str
) -> list[float]:
    """Tokens a second of some rounds under a script, from a fresh launch."""
    path = folder / "run.sh"
    path.write_text(script)
    running = []
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    commands = parse_script(script, "run.sh").commands
    for n, name in enumerate(NAMES):
        part = name if n else f"{name} rpc"
        if part in commands:
            running.append(testbed.run(n, ["sh", str(path), part], environment, **quiet))
    time.sleep(1.0)
    with open(folder / log, "wb") as stream:
        head = testbed.run(
            0, ["sh", str(path), NAMES[0], "-v", "--port", str(HTTP_PORT), "-t", "1"],
            environment, stdout=stream, stderr=stream,
        )  # fmt: skip
    answered(testbed)
    found = [answered(testbed)["timings"]["predicted_per_second"] for _ in range(ROUNDS)]
    for process in (head, *running):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE_S)
    return found


def main() -> None:
    """Measure both, verify the log, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("llamacpp", type=Path)
    parser.add_argument("-o", "--output", required=True)
    given = parser.parse_args()
    trace, cluster = problem()
    plan = solve(Instance.build(trace, cluster), "exact")
    with tempfile.TemporaryDirectory() as made, Testbed(3, 500.0, names=NAMES) as testbed:
        folder = Path(made)
        write_model(folder / "model.gguf")
        environment = {"MODEL": str(folder / "model.gguf")}
        environment |= write_programs(folder, given.llamacpp)
        endpoints = {
            box: EndpointTable(name=box, host=testbed.address(n), port=PORT)
            for n, box in enumerate(NAMES)
        }
        text, sidecar, _ = export_whole_layers(
            ExportRequest(
                "llamacpp", plan, "plan", "", trace.model, "run.sh", NAMES[0], trace, cluster,
                endpoints, 256,
            )
        )  # fmt: skip
        scripts = {"plan": text, "own": own_split(endpoints)}
        rounds: dict[str, list[float]] = {name: [] for name in scripts}
        for turn in range(2):
            for name, script in scripts.items():
                log = f"{name}-{turn}.log"
                rounds[name] += measure(testbed, folder, script, environment, log)
        placing = llamacpp.read_placing(text, "run.sh")
        lines = (folder / "plan-0.log").read_text(errors="replace").splitlines()
        problems = verify_log(lines, placing, LAYERS, "log")
    values = {
        **provenance(),
        "llamacpp": llamacpp.CHECKED_WITH,
        "boxes": dict(zip(NAMES, ROOM, strict=True)),
        "stages": [stage.model_dump() for stage in sidecar.stages],
        "verified": not problems,
        "problems": problems,
        "tokens_per_s": rounds,
        "median": {name: median(found) for name, found in rounds.items()},
        "ratio": median(rounds["plan"]) / median(rounds["own"]),
    }
    write_bytes(given.output, (json.dumps(values, indent=1) + "\n").encode())
    print(
        json.dumps(
            {key: values[key] for key in ("stages", "verified", "median", "ratio")}, indent=1
        )
    )


if __name__ == "__main__":
    main()
