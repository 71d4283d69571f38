"""What a call to another server costs beside a raw gloo round trip of the same bytes.

    python -m studies.transport -o studies/transport.json       # a minute; prints a table

Servers without experts' arithmetic on this machine's loopback, states of DeepSeek-V2-Lite
(hidden size 2048, bfloat16, top-6 of 64). Calls and raw round trips alternate, so that both see the
same machine. A raw round trip is a send and a receive on a group of its own, to a process that
does nothing else. The last row is of a server that a third one calls with 128 tokens all the time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from prism_plan.io.file_writing import write_bytes
from prism_plan.model import PRESETS
from prism_plan.placement import Placement, SolveReport
from runtime_adapter.driver import even_network
from runtime_adapter.moe.compute import Batch
from runtime_adapter.moe.dispatch import Dispatcher
from runtime_adapter.server import Server, ServerConfig
from runtime_adapter.transport.messages import HEADER_BYTES, call_bytes
from runtime_adapter.transport.parallel import in_parallel
from runtime_adapter.transport.rendezvous import FOREVER, Rendezvous, group, receive, send
from runtime_adapter.weights.expert_store import Change
from studies.testbed.experiment import provenance

MODEL = PRESETS["deepseek-v2-lite"]
STATES = torch.bfloat16
TOKEN_BYTES = MODEL.hidden_size * STATES.itemsize
#: Of the calls that keep a server busy.
BUSY_TOKENS = 128
#: The raw pair, beside those of servers.
RAW_FRONT, RAW_ECHO = 100, 101


class NoCompute:
    """Answers at once, with zeros."""

    def partial_sums(self, batch: Batch) -> torch.Tensor:
        """Nothing is computed."""
        return torch.zeros_like(batch.hidden)

    def dense(self, tokens: int) -> None:
        """Nothing is computed."""

    def apply(self, change: Change) -> None:
        """Nothing moves."""


def echo(rendezvous: Rendezvous, sizes: list[tuple[int, int]], times: int) -> None:
    """Receive and send back so many bytes, in the order in which they are measured."""
    torch.set_num_threads(1)
    made = group(rendezvous, RAW_FRONT, RAW_ECHO, 1)
    for out, back in sizes:
        room, answer = (torch.zeros(n, dtype=torch.uint8) for n in (out, back))
        for _ in range(times):
            receive(made, room, 0, 0).wait(FOREVER)
            send(made, answer, 0, 0).wait(FOREVER)


def server(port: int, rank: int, most_tokens: int) -> Server:
    """One of three servers; the second one holds all experts of the first layer."""
    shape = (MODEL.num_layers, MODEL.num_experts)
    held = np.zeros((3, *shape), bool)
    held[0, 1:], held[1, 0] = True, True
    capacity = ((MODEL.num_pairs,),) * 3
    placement = Placement(MODEL.shape(), ("a", "b", "c"), capacity, held, SolveReport("hand"))
    config = ServerConfig(
        rendezvous=Rendezvous(3, rank, port=port),
        placement=placement,
        model=MODEL.shape(),
        network=even_network(3, TOKEN_BYTES),
        compute=NoCompute(),
        facts={},
        states=STATES,
        width=MODEL.hidden_size,
        most_tokens=most_tokens,
    )
    return Server(config, lambda text: None)


def bother(port: int, most_tokens: int, go: Any, stop: Any) -> None:
    """The third server calls the second one with long steps, one after the other."""
    torch.set_num_threads(1)
    with server(port, 2, most_tokens) as one:
        go.wait()
        step = a_step(BUSY_TOKENS)
        while not stop.is_set():
            one.lanes[0].run(0, *step)
        one.finish()


def seconds(work: Callable[[], Any]) -> float:
    """How long it takes."""
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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    top_k, warm = MODEL.top_k, 20
    # the answer's header counts as well: these are the bytes on the wire
    sizes = [
        (HEADER_BYTES + call_bytes(t, t * top_k, TOKEN_BYTES), HEADER_BYTES + t * TOKEN_BYTES)
        for t in [*given.tokens, 1]
    ]
    most = max(*given.tokens, BUSY_TOKENS)
    both = [server(port, rank, most) for rank in (0, 1)]
    rendezvous = both[0].config.rendezvous
    context = multiprocessing.get_context("spawn")
    go, stop = context.Event(), context.Event()
    times = given.repeats + warm
    others = [
        context.Process(target=echo, args=(rendezvous, sizes, times), daemon=True),
        context.Process(target=bother, args=(port, most, go, stop)),
    ]
    for one in others:
        one.start()
    rows = []
    try:
        in_parallel([one.__enter__ for one in both])
        made = group(rendezvous, RAW_FRONT, RAW_ECHO, 0)
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; quantiles 0.1 and 0.5")
        print(
            f"{'tokens':>6} {'bytes':>9} {'raw ms':>15} {'call ms':>15} {'ratio':>12} {'MB/s':>11}"
        )
        for busy, tokens, (out, back) in zip(
            [False] * len(given.tokens) + [True], [*given.tokens, 1], sizes, strict=True
        ):
            if busy:
                go.set()
                time.sleep(0.5)
            call, raw = one_size(both[0].lanes[0], made, tokens, out, back, given.repeats, warm)
            rows.append(
                {"tokens": tokens, "bytes": out + back, "busy": busy, "raw_s": raw, "call_s": call}
            )
            low, mid = zip(raw, call, strict=True)
            print(
                f"{tokens:6} {out + back:9,} {1e3 * low[0]:7.3f} {1e3 * mid[0]:7.3f} "
                f"{1e3 * low[1]:7.3f} {1e3 * mid[1]:7.3f} "
                f"{low[1] / low[0]:6.2f}{mid[1] / mid[0]:6.2f} "
                f"{(out + back) / low[1] / 1e6:6.0f}{(out + back) / mid[1] / 1e6:5.0f}"
                + (" busy" if busy else "")
            )
        stop.set()
        in_parallel([one.finish for one in both])
    finally:
        stop.set()
        go.set()
        others[0].terminate()
        for one in both:
            one.close()
    if given.output:
        values = {"provenance": provenance(), "quantiles": [0.1, 0.5], "rows": rows}
        write_bytes(given.output, (json.dumps(values, indent=1) + "\n").encode())


def a_step(tokens: int) -> tuple[torch.Tensor, Any, Any]:
    """Hidden states, experts and weights of a step."""
    generator = np.random.default_rng(0)
    rows = [generator.permutation(MODEL.num_experts)[: MODEL.top_k] for _ in range(tokens)]
    experts = np.array(rows, np.int64)
    weights = np.full(experts.shape, 1 / MODEL.top_k, np.float32)
    return torch.ones(tokens, MODEL.hidden_size, dtype=STATES), experts, weights


def one_size(
    lane: Dispatcher, made: Any, tokens: int, out: int, back: int, repeats: int, warm: int
) -> list[list[float]]:
    """Quantiles 0.1 and 0.5 of seconds of a call and of a raw round trip, in turns."""
    step = a_step(tokens)
    message, room = torch.zeros(out, dtype=torch.uint8), torch.zeros(back, dtype=torch.uint8)

    def raw() -> None:
        sending = send(made, message, 1, 0)
        receiving = receive(made, room, 1, 0)
        sending.wait(FOREVER)
        receiving.wait(FOREVER)

    calls, raws = [], []
    for _ in range(warm + repeats):
        calls.append(seconds(lambda: lane.run(0, *step)))
        raws.append(seconds(raw))
    return [np.quantile(found[warm:], (0.1, 0.5)).tolist() for found in (calls, raws)]


if __name__ == "__main__":
    main()
