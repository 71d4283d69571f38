"""Exports to llama.cpp, run with a real one: layers land as planned, the text is the model's."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")

from prism_plan.io.placement import write_placement  # noqa: E402
from prism_plan.placement import Placement, SolveReport  # noqa: E402
from tests.export.gguf_checkpoint import write_tiny_mixtral  # noqa: E402
from tests.limits import HANG_S  # noqa: E402
from tests.runtime_adapter.checkpoints import TRACES, committed, reference  # noqa: E402
from tests.runtime_adapter.replays import free_port  # noqa: E402
from tests.warm_processes import run_warm  # noqa: E402

NAMES = ("edge-0", "edge-1", "edge-2")
NEW_TOKENS = 12
#: The head, and the server of each of its four layers: at home, in one piece, with servers twice.
PLANS = [
    ("edge-0", (0, 0, 1, 2)),
    ("edge-1", (0, 0, 1, 2)),
    ("edge-2", (0, 1, 0, 1)),
    ("edge-0", (2, 1, 0, 2)),
    ("edge-1", (1, 1, 1, 1)),
    ("edge-2", (1, 0, 0, 0)),
]
#: The server of the experts of each layer; attention is at the head.
EXPERTS = [("edge-0", (0, 1, 2, 0)), ("edge-1", (0, 0, 1, 2))]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A llama-server and an rpc-server: of $LLAMACPP, or fetched; skips where there is none."""
    folder = Path(os.environ.get("LLAMACPP", tmp_path_factory.mktemp("llamacpp")))
    fetch = TRACES.parent.parent / "shared" / "tools" / "get_llamacpp.sh"
    if not (folder / "lx").exists():
        if not fetch.exists():
            pytest.skip(f"no llama.cpp: set LLAMACPP to a folder that {fetch.name} has made")
        found = subprocess.run(
            ["bash", str(fetch), str(folder)], capture_output=True, text=True, timeout=HANG_S
        )
        if found.returncode:
            pytest.skip(f"llama.cpp cannot be fetched: {found.stderr.strip()[-200:]}")
    made = {}
    for variable, program in (("LLAMA_SERVER", "llama-server"), ("RPC_SERVER", "ggml-rpc-server")):
        wrapper = tmp_path_factory.mktemp("bin") / program
        wrapper.write_text(f'#!/bin/sh\nexec {folder}/lx {program} "$@"\n')
        wrapper.chmod(0o755)
        made[variable] = str(wrapper)
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed tiny Mixtral as GGUF, in float32."""
    return write_tiny_mixtral(tmp_path_factory.mktemp("gguf") / "tiny-mixtral.gguf")


def plan_of(home: str, servers: tuple[int, ...], *, executed: bool) -> Placement:
    """A plan whose layers lie whole on these servers, and execute there or at the head."""
    shape = committed("mixtral").spec.shape()
    held = np.zeros((3, shape.num_layers, shape.num_experts), bool)
    for layer, server in enumerate(servers):
        held[server, layer] = True
    table = np.repeat(np.arange(3, dtype=np.int32)[:, None], shape.num_layers, axis=1)
    if executed:
        table[NAMES.index(home)] = servers
    return Placement(
        shape, NAMES, ((32,),) * 3, held, SolveReport("hand"), execution=table
    )  # fmt: skip


@functools.cache
def continued(prompt: str) -> str:
    """What transformers adds to a prompt, greedily."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TRACES / "tiny-mixtral")
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        found = reference("mixtral", torch.float32).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )
    text: str = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    return text


class Launch:
    """All processes of an exported script, each as its machine would start it."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = os.environ | environment
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *words: str, log: str) -> subprocess.Popen[bytes]:
        """Run the script with these words; what it says goes to a file."""
        with open(self.folder / log, "wb") as stream:
            process = subprocess.Popen(
                ["sh", "run.sh", *words], cwd=self.folder, env=self.environment,
                stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def close(self) -> None:
        """End whatever is left."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def launch(tmp_path: Path, programs: dict[str, str], model: Path) -> Iterator[Launch]:
    found = Launch(tmp_path, programs | {"MODEL": str(model)})
    yield found
    found.close()


def exported(folder: Path, home: str, plan: Placement) -> dict[str, Any]:
    """Export a plan to ``run.sh`` with free ports; gives the sidecar."""
    write_placement(folder / "p.json", plan)
    (folder / "model.json").write_text(json.dumps(committed("mixtral").spec.to_json()))
    tables = [
        f'[[server]]\nname = "{name}"\nhost = "127.0.0.1"\nport = {free_port()}\n' for name in NAMES
    ]
    (folder / "f.toml").write_text("".join(tables))
    words = ["export", "p.json", "--engine", "llamacpp", "--model", "model.json", "--home", home]
    words += ["--endpoints", "f.toml", "--ctx", "256", "-o", "run.sh"]
    result = run_warm(words, cwd=folder, timeout_s=HANG_S)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads((folder / "run.sh.export.json").read_text())
    return found


def completed(port: int, prompt: str) -> str:
    """What the server adds to a prompt; waits until it answers."""
    body = {"prompt": prompt, "n_predict": NEW_TOKENS, "temperature": 0, "cache_prompt": False}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/completion", json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    deadline = time.monotonic() + HANG_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=HANG_S) as answer:
                text: str = json.load(answer)["content"]
                return text
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("home", "servers", "executed"),
    [*((*one, True) for one in PLANS), *((*one, False) for one in EXPERTS)],
)
def test_layers_land_as_planned(
    home: str, servers: tuple[int, ...], executed: bool, launch: Launch
) -> None:
    """The log agrees with the export to the last layer and tensor; greedy text is transformers'.

    A log of another plan does not agree.
    """
    folder = launch.folder
    sidecar = exported(folder, home, plan_of(home, servers, executed=executed))
    port = free_port()
    for line in sidecar["launch"][:-1]:
        name = line.partition("run.sh ")[2].strip("'")
        launch.start(name, log=f"{name}.log")
    time.sleep(0.5)  # rpc-servers listen; one that is asked too early would end llama-server
    head = launch.start(home, "-v", "--port", str(port), log="head.log")
    for prompt in ("The ", "In the old town "):
        assert completed(port, prompt) == continued(prompt)
    head.terminate()
    verified = run_warm(["export-verify", "run.sh", "head.log"], cwd=folder, timeout_s=HANG_S)
    assert verified.returncode == 0, verified.stderr
    assert "as planned" in verified.stdout
    other = (1, 2, 0, 1) if servers != (1, 2, 0, 1) else (0, 0, 0, 0)
    exported(folder, home, plan_of(home, other, executed=True))
    verified = run_warm(["export-verify", "run.sh", "head.log"], cwd=folder, timeout_s=HANG_S)
    assert verified.returncode == 3
    assert "planned" in verified.stderr
