"""Replays of several servers, each a launch of its own, on one machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.errors import PrismError
from prism_plan.io.cluster import read_cluster
from prism_plan.io.placement import write_placement
from prism_plan.io.trace_reader import read_trace
from prism_plan.io.trace_writer import write_trace
from prism_plan.model_spec import ModelSpec
from prism_plan.placement import Placement, SolveReport
from prism_plan.trace import Trace
from runtime_adapter.cli.options import address
from runtime_adapter.control.store.client import StoreAddress, StoreClient
from tests.limits import HANG_S
from tests.profiling.synthetic import SyntheticSpread, synthetic_trace
from tests.warm_processes import WarmProcess, start_warm

#: Starting Python with PyTorch many times takes minutes on a machine that does other work.
PATIENCE_S = HANG_S

#: Of the system's resolver: PyTorch asks it for the name of every address that connects, and waits.
RESOLVER = "timeout:1 attempts:1"

SPEC = ModelSpec(
    name="tiny",
    moe_layers=(1, 2, 4),
    num_experts=8,
    top_k=2,
    hidden_size=64,
    dtype_bytes=2,
    expert_bytes=1_000_000,
    dense_bytes=5_000_000,
    kv_bytes_per_token=0,
)


def cluster_text(
    servers: int = 3, *, slots: int = 14, interval_s: float = 0.05, load_s: float = 0.01
) -> str:
    """Servers s0, s1 ... with a task and a GPU each, the last one with two half as large."""
    parts = ['name = "small"', "[link]", "bandwidth_mbps = 1000", "rtt_ms = 0"]
    for n in range(servers):
        parts += [
            "[[server]]",
            f'name = "s{n}"',
            f"arrival_interval_s = {interval_s}",
            f"tasks = {{ t{n} = 1.0 }}",
        ]
        halves = 2 if n == servers - 1 else 1
        for _ in range(halves):
            parts += [
                "[[server.gpu]]",
                f"slots = {slots // halves}",
                f"load_gbs = {SPEC.expert_bytes / load_s / 1e9}",
            ]
    return "\n".join(parts) + "\n"


class Material:
    """Files of a run, and what they hold."""

    def __init__(self, folder: Path, cluster: str, spec: ModelSpec = SPEC, **changes: Any) -> None:
        self.folder = folder
        self.spec = spec
        self.cluster_path = folder / "cluster.toml"
        self.cluster_path.write_text(cluster)
        self.cluster: Cluster = read_cluster(self.cluster_path)
        values: dict[str, Any] = {
            "requests": 6,
            "prompt_tokens": 5,
            "decode_tokens": 6,
            "spread": SyntheticSpread(task=1.5),
            "seed": 1,
            **changes,
        }
        tasks = [f"t{n}" for n in range(self.cluster.num_servers)]
        self.trace_path = folder / "trace.parquet"
        write_trace(self.trace_path, synthetic_trace(spec, tasks, **values))
        self.trace: Trace = read_trace(self.trace_path)

    def placement(self, name: str, held: npt.ArrayLike, **changes: Any) -> Placement:
        """Write a placement from bool [G, J]; returns it."""
        servers = self.cluster.servers
        values: dict[str, Any] = {
            "model": self.spec.shape(),
            "servers": tuple(server.name for server in servers),
            "gpu_capacity": tuple(
                tuple(gpu.slots or 0 for gpu in server.gpus) for server in servers
            ),
            "on_gpu": np.asarray(held, bool).reshape(-1, SPEC.num_layers, SPEC.num_experts),
            "plan": SolveReport("hand"),
            **changes,
        }
        made = Placement(**values)
        write_placement(self.folder / name, made)
        return made


def striped(gpus: int, shift: int) -> npt.NDArray[np.bool_]:
    """Pair j on GPU (j + shift) modulo the GPUs, bool [G, J]."""
    pairs = np.arange(SPEC.num_pairs)
    return np.array([(pairs + shift) % gpus == g for g in range(gpus)])


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Replays:
    """One launch of ``replay`` for each server; whatever is left of them ends with the block."""

    def __init__(self, material: Material, placement: str, *options: str) -> None:
        self.folder = material.folder
        self.store = f"127.0.0.1:{free_port()}"
        self.names = [server.name for server in material.cluster.servers]
        self.processes: dict[str, WarmProcess] = {}
        self._asking: list[subprocess.Popen[str]] = []
        self._arguments = [
            *("--placement", placement, "--trace", "trace.parquet", "--cluster", "cluster.toml"),
            *("--store", self.store, "--join", str(PATIENCE_S)),
            *options,
        ]

    def __enter__(self) -> Self:
        for name in self.names:
            own = ["--server", name, "-o", f"{name}.jsonl", "--stats", f"{name}.json"]
            with open(self.folder / f"{name}.err", "wb") as errors:
                words = ["replay", *self._arguments, *own]
                self.processes[name] = start_warm(
                    words, cwd=self.folder, env=environment(), stdin=False, output=errors
                )
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for asking in self._asking:  # one that is left behind would fail a later test
            if asking.poll() is None:
                asking.kill()
            asking.communicate()

    def errors(self, name: str) -> str:
        """What a server has said so far."""
        return (self.folder / f"{name}.err").read_text()

    def results(self, name: str) -> list[dict[str, Any]]:
        """Results of a server's requests so far."""
        path = self.folder / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]

    def stats(self, name: str) -> dict[str, Any]:
        """What a server that has ended has counted."""
        values: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
        return values

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something to happen."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            said = {name: self.errors(name)[-2000:] for name in self.names}
            ended = all(process.poll() is not None for process in self.processes.values())
            assert not ended, f"{what} did not happen: {said}"
            assert time.monotonic() < deadline, f"{what} did not happen: {said}"
            time.sleep(0.02)

    def until_served(self, name: str, requests: int) -> None:
        """Wait until a server has ended so many requests."""
        path = self.folder / f"{name}.jsonl"
        self.until(lambda: path.exists() and len(self.results(name)) >= requests, f"{name} serves")

    def status(self) -> dict[str, Any]:
        """What the store knows of the run; empty where it does not answer."""
        return status_of(StoreAddress(*address(self.store)))

    def migrates(self) -> bool:
        """Whether experts are being moved."""
        return bool(self.status().get("open_plans"))

    def wait(self) -> dict[str, int]:
        """Exit codes of all servers."""
        return {name: process.wait(timeout=PATIENCE_S) for name, process in self.processes.items()}

    def kill(self, name: str) -> None:
        """A server's driver is gone at once; what it started has to notice by itself."""
        self.processes[name].kill()

    def move(self, placement: str, *options: str) -> subprocess.Popen[str]:
        """Ask the run for another placement."""
        asking = subprocess.Popen(
            [
                *(sys.executable, "-m", "runtime_adapter", "move"),
                *("--store", self.store, "--placement", placement, *options),
            ],
            cwd=self.folder,
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        self._asking.append(asking)
        return asking


def status_of(store: StoreAddress) -> dict[str, Any]:
    """What a store knows of its run; empty where it does not answer."""
    client = StoreClient(store, "status")
    try:
        return client.status(5.0)
    except PrismError:
        return {}
    finally:
        client.close()


def environment() -> dict[str, str]:
    """Of the launches: they run elsewhere, and find the packages all the same."""
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "RES_OPTIONS": RESOLVER}


def experts_of(placement: Placement, server: str) -> list[dict[str, list[int]]]:
    """A server's GPUs as a placement file has them."""
    layers = placement.model.moe_layers
    return [
        {
            str(layer): np.flatnonzero(row).tolist()
            for layer, row in zip(layers, placement.on_gpu[g], strict=True)
            if row.any()
        }
        for g in placement.gpus_of(placement.servers.index(server))
    ]
