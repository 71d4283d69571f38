"""What a call to another server costs beside raw round trips of the same bytes.

    python -m studies.transport -o studies/transport.json       # a minute; prints a table

Servers without experts' arithmetic on this machine's loopback, states of DeepSeek-V2-Lite (hidden
size 2048, bfloat16, top-6 of 64). Calls and raw round trips alternate, so that both see the same
machine. Calls go over the runtime's own connections, which are TCP; a raw round trip is of plain
blocking sockets, or a send and a receive on a gloo group of torch.distributed, to a process that
does nothing else. The last row is of a server that a third one calls with 128 tokens all the time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from prism_plan.io.file_writing import write_bytes
from prism_plan.model_spec import PRESETS
from prism_plan.placement import Placement, SolveReport
from runtime_adapter.moe.compute import Batch
from runtime_adapter.moe.remote_dispatcher import RemoteDispatcher
from runtime_adapter.moe.router import uniform_network
from runtime_adapter.server import LocalServer
from runtime_adapter.server_config import MigrationConfig, ServerConfig
from runtime_adapter.torch_private import gloo_device, gloo_pair
from runtime_adapter.transport.call_threads import run_in_parallel
from runtime_adapter.transport.peer import Peer
from runtime_adapter.transport.rendezvous import Rendezvous
from runtime_adapter.transport.socket_io import receive_into
from runtime_adapter.transport.wire_format import HEADER_BYTES, call_bytes
from runtime_adapter.weights.expert_map import ExpertMap
from runtime_adapter.weights.expert_store import Change
from studies.testbed.experiment import provenance

MODEL = PRESETS["deepseek-v2-lite"]
STATES = torch.bfloat16
TOKEN_BYTES = MODEL.hidden_size * STATES.itemsize
#: Tokens of the calls that keep a server busy.
BUSY_TOKENS = 128
#: For the raw pair: a process may be late, but never so late.
PATIENCE_S = 600.0
PATIENCE = datetime.timedelta(seconds=PATIENCE_S)


class NoCompute:
    """Answers at once, with zeros."""

    def use(self, expert_map: ExpertMap) -> None:
        """It needs no map."""

    def partial_sums(self, batch: Batch) -> torch.Tensor:
        """Nothing is computed."""
        return torch.zeros_like(batch.hidden)

    def dense(self, tokens: int) -> None:
        """Nothing is computed."""

    def apply(self, change: Change) -> None:
        """Nothing moves."""

    def held(self) -> list[tuple[int, int, int]]:
        """The placement says what is held."""
        return self._held

    def __init__(self, held: list[tuple[int, int, int]]) -> None:
        self._held = held


class NoLoader(NoCompute):
    """Loads nothing; the run has no scheduler."""

    def connect(
        self, rendezvous: Rendezvous, expert_map: ExpertMap, peers: Mapping[int, Peer]
    ) -> None:
        """It needs no peers."""

    def load(self, pair: int, gpu: int) -> Change:
        """Nothing moves: whoever asks for it has found a scheduler where there is none."""
        raise AssertionError(f"pair {pair} is to be loaded in a run without a scheduler")

    def drop(self, pair: int, gpu: int) -> None:
        """Nothing moves."""


def raw_group(port: int, rank: int) -> dist.ProcessGroupGloo:
    """One side of the raw pair; rank 0 hosts its store."""
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timeout=PATIENCE)
    return gloo_pair(store, rank, gloo_device("lo"), PATIENCE_S)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def echo(port: int, tcp_port: int, sizes: list[tuple[int, int]], times: int) -> None:
    """Receive and send back so many bytes, in the order in which they are measured."""
    torch.set_num_threads(1)
    group = raw_group(port, 1)
    with socket.create_connection(("127.0.0.1", tcp_port), PATIENCE_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(None)
        for out, back in sizes:
            buffer, answer = (torch.zeros(n, dtype=torch.uint8) for n in (out, back))
            for _ in range(times):
                receive_into(connection, memoryview(buffer.numpy()))
                connection.sendall(memoryview(answer.numpy()))
                group.recv([buffer], 0, 0).wait(PATIENCE)
                group.send([answer], 0, 0).wait(PATIENCE)


def idle_config(held: Any, port: int, rank: int, max_tokens: int) -> ServerConfig:
    """One of several servers that compute nothing; ``held`` is bool [N, L, E]."""
    capacity = ((MODEL.num_pairs,),) * len(held)
    own = [(0, pair, 0) for pair in np.flatnonzero(held[rank].reshape(-1)).tolist()]
    return ServerConfig(
        rendezvous=Rendezvous(len(held), rank, port=port),
        placement=Placement(
            MODEL.shape(), tuple("abc"[: len(held)]), capacity, held, SolveReport("hand")
        ),
        model=MODEL.shape(),
        network=uniform_network(len(held), TOKEN_BYTES),
        compute=NoCompute(own),
        migration=MigrationConfig(NoLoader(own)),
        facts={},
        dtype=STATES,
        width=MODEL.hidden_size,
        max_tokens=max_tokens,
    )


def server(port: int, rank: int, max_tokens: int) -> LocalServer:
    """One of three servers; the second one holds all experts of the first layer."""
    held = np.zeros((3, MODEL.num_layers, MODEL.num_experts), bool)
    held[0, 1:], held[1, 0] = True, True
    return LocalServer(idle_config(held, port, rank, max_tokens), lambda text: None)


def keep_busy(port: int, max_tokens: int, go: Any, stop: Any) -> None:
    """The third server calls the second one with long steps, one after the other."""
    torch.set_num_threads(1)
    with server(port, 2, max_tokens) as caller:
        caller.agree_on_start()
        go.wait()
        step = random_step(BUSY_TOKENS)
        while not stop.is_set():
            caller.lanes[0].run(0, *step)
        caller.finish()


def seconds(work: Callable[[], Any]) -> float:
    """Time a call."""
    begin_s = time.perf_counter()
    work()
    return time.perf_counter() - begin_s


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 512])
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("-o", "--output", help="Write the figures as JSON.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    port, raw_port = free_port(), free_port()
    listener = socket.create_server(("127.0.0.1", 0))
    tcp_port = listener.getsockname()[1]
    top_k, warm = MODEL.top_k, 20
    # the answer's header counts as well: these are the bytes on the wire
    sizes = [
        (HEADER_BYTES + call_bytes(t, t * top_k, TOKEN_BYTES), HEADER_BYTES + t * TOKEN_BYTES)
        for t in [*given.tokens, 1]
    ]
    max_tokens = max(*given.tokens, BUSY_TOKENS)
    servers = [server(port, rank, max_tokens) for rank in (0, 1)]
    context = multiprocessing.get_context("spawn")
    go, stop = context.Event(), context.Event()
    times = given.repeats + warm
    others = [
        context.Process(target=echo, args=(raw_port, tcp_port, sizes, times), daemon=True),
        context.Process(target=keep_busy, args=(port, max_tokens, go, stop)),
    ]
    for process in others:
        process.start()
    rows = []
    try:
        run_in_parallel([one.__enter__ for one in servers])
        group = raw_group(raw_port, 0)
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        servers[0].agree_on_start()
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; quantiles 0.1 and 0.5")
        print(
            f"{'tokens':>6} {'bytes':>9} {'call ms':>15} {'TCP ms':>15} {'ratio':>11} "
            f"{'gloo ms':>15} {'ratio':>11}"
        )
        for busy, tokens, (out, back) in zip(
            [False] * len(given.tokens) + [True], [*given.tokens, 1], sizes, strict=True
        ):
            if busy:
                go.set()
                time.sleep(0.5)
            call, tcp, gloo = measure_size(
                servers[0].lanes[0], connection, group, tokens, out, back, given.repeats, warm
            )
            rows.append(
                {"tokens": tokens, "bytes": out + back, "busy": busy, "call_s": call,
                 "tcp_s": tcp, "gloo_s": gloo}
            )  # fmt: skip
            text = f"{tokens:6} {out + back:9,} " + _both(call, 1e3, 3)
            for raw in (tcp, gloo):
                ratio = [one / other for one, other in zip(call, raw, strict=True)]
                text += f" {_both(raw, 1e3, 3)} {_both(ratio, 1.0, 2)}"
            print(text + (" busy" if busy else ""))
        stop.set()
        run_in_parallel([one.finish for one in servers])
    finally:
        stop.set()
        go.set()
        others[0].terminate()
        for one in servers:
            one.close()
    if given.output:
        values = {"provenance": provenance(), "quantiles": [0.1, 0.5], "rows": rows}
        write_bytes(given.output, (json.dumps(values, indent=1) + "\n").encode())


def random_step(tokens: int) -> tuple[torch.Tensor, Any, Any]:
    """Hidden states, experts and weights of a step."""
    generator = np.random.default_rng(0)
    rows = [generator.permutation(MODEL.num_experts)[: MODEL.top_k] for _ in range(tokens)]
    experts = np.array(rows, np.int64)
    weights = np.full(experts.shape, 1 / MODEL.top_k, np.float32)
    return torch.ones(tokens, MODEL.hidden_size, dtype=STATES), experts, weights


def _both(values: list[float], scale: float, digits: int) -> str:
    """Two numbers of a table."""
    return " ".join(f"{scale * value:{digits + 4}.{digits}f}" for value in values)


def measure_size(
    lane: RemoteDispatcher, connection: socket.socket, group: Any, tokens: int, out: int, back: int,
    repeats: int, warm: int,
) -> list[list[float]]:  # fmt: skip
    """Quantiles 0.1 and 0.5 of seconds of a call and of raw round trips (TCP, gloo), in turns."""
    step = random_step(tokens)
    message, buffer = torch.zeros(out, dtype=torch.uint8), torch.zeros(back, dtype=torch.uint8)

    def tcp() -> None:
        connection.sendall(memoryview(message.numpy()))
        receive_into(connection, memoryview(buffer.numpy()))

    def gloo() -> None:
        sending = group.send([message], 1, 0)
        receiving = group.recv([buffer], 1, 0)
        sending.wait(PATIENCE)
        receiving.wait(PATIENCE)

    works: list[Callable[[], Any]] = [lambda: lane.run(0, *step), tcp, gloo]
    times: list[list[float]] = [[], [], []]
    for _ in range(warm + repeats):
        for work, found in zip(works, times, strict=True):
            found.append(seconds(work))
    return [np.quantile(found[warm:], (0.1, 0.5)).tolist() for found in times]


if __name__ == "__main__":
    main()
