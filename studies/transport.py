"""What a call to another server costs beside a raw gloo round trip of the same bytes.

    python -m studies.transport            # a minute; prints a table, writes nothing

Two servers without experts' arithmetic on this machine's loopback, states of DeepSeek-V2-Lite
(hidden size 2048, bfloat16, top-6 of 64). Calls and raw round trips alternate, so that both see the
same machine. A raw round trip is a send and a receive on a group of its own, to a process that
does nothing else.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from prism_plan.model import PRESETS
from prism_plan.placement import Placement, Plan
from runtime_adapter.compute import Batch
from runtime_adapter.dispatch import Dispatcher
from runtime_adapter.experts import Change
from runtime_adapter.links import FOREVER, Meeting, group, join_store, receive, send
from runtime_adapter.serve import even_network
from runtime_adapter.server import Server, ServerConfig
from runtime_adapter.wire import HEADER_BYTES, call_bytes
from runtime_adapter.worker import in_parallel

MODEL = PRESETS["deepseek-v2-lite"]
STATES = torch.bfloat16
TOKEN_BYTES = MODEL.hidden_size * STATES.itemsize
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


def echo(meeting: Meeting, sizes: list[tuple[int, int]], times: int) -> None:
    """Receive and send back so many bytes, in the order in which they are measured."""
    torch.set_num_threads(1)
    made = group(join_store(meeting, host_it=False), meeting, RAW_FRONT, RAW_ECHO, 1)
    for out, back in sizes:
        room, answer = (torch.zeros(n, dtype=torch.uint8) for n in (out, back))
        for _ in range(times):
            receive(made, room, 0, 0).wait(FOREVER)
            send(made, answer, 0, 0).wait(FOREVER)


def servers(port: int, most_tokens: int) -> list[Server]:
    """Two servers; the second one holds all experts of the first layer."""
    shape = (MODEL.num_layers, MODEL.num_experts)
    held = np.zeros((2, *shape), bool)
    held[0, 1:], held[1, 0] = True, True
    capacity = ((MODEL.num_pairs,), (MODEL.num_pairs,))
    placement = Placement(MODEL.shape(), ("a", "b"), capacity, held, Plan("hand"))
    return [
        Server(
            ServerConfig(
                meeting=Meeting(2, me, port=port),
                placement=placement,
                model=MODEL.shape(),
                network=even_network(2, TOKEN_BYTES),
                compute=NoCompute(),
                facts={},
                states=STATES,
                width=MODEL.hidden_size,
                most_tokens=most_tokens,
            ),
            lambda text: None,
        )
        for me in (0, 1)
    ]


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
    given = parser.parse_args()
    torch.set_num_threads(1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    top_k, warm = MODEL.top_k, 20
    # the answer's header counts as well: these are the bytes on the wire
    sizes = [
        (HEADER_BYTES + call_bytes(t, t * top_k, TOKEN_BYTES), HEADER_BYTES + t * TOKEN_BYTES)
        for t in given.tokens
    ]
    both = servers(port, max(given.tokens))
    meeting = both[0].config.meeting
    context = multiprocessing.get_context("spawn")
    raw_end = context.Process(target=echo, args=(meeting, sizes, given.repeats + warm), daemon=True)
    raw_end.start()
    try:
        in_parallel([one.__enter__ for one in both])
        made = group(join_store(meeting, host_it=False), meeting, RAW_FRONT, RAW_ECHO, 0)
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; quantiles 0.1 and 0.5")
        print(
            f"{'tokens':>6} {'bytes':>9} {'raw ms':>15} {'call ms':>15} {'ratio':>12} {'MB/s':>11}"
        )
        for tokens, (out, back) in zip(given.tokens, sizes, strict=True):
            call, raw = one_size(both[0].lanes[0], made, tokens, out, back, given.repeats, warm)
            low, mid = zip(raw, call, strict=True)
            print(
                f"{tokens:6} {out + back:9,} {1e3 * low[0]:7.3f} {1e3 * mid[0]:7.3f} "
                f"{1e3 * low[1]:7.3f} {1e3 * mid[1]:7.3f} "
                f"{low[1] / low[0]:6.2f}{mid[1] / mid[0]:6.2f} "
                f"{(out + back) / low[1] / 1e6:6.0f}{(out + back) / mid[1] / 1e6:5.0f}"
            )
        in_parallel([one.finish for one in both])
    finally:
        raw_end.terminate()
        for one in both:
            one.close()


def one_size(
    lane: Dispatcher, made: Any, tokens: int, out: int, back: int, repeats: int, warm: int
) -> list[list[float]]:
    """Quantiles 0.1 and 0.5 of seconds of a call and of a raw round trip, in turns."""
    generator = np.random.default_rng(0)
    rows = [generator.permutation(MODEL.num_experts)[: MODEL.top_k] for _ in range(tokens)]
    experts = np.array(rows, np.int64)
    weights = np.full(experts.shape, 1 / MODEL.top_k, np.float32)
    hidden = torch.ones(tokens, MODEL.hidden_size, dtype=STATES)
    message, room = torch.zeros(out, dtype=torch.uint8), torch.zeros(back, dtype=torch.uint8)

    def raw() -> None:
        sending = send(made, message, 1, 0)
        receiving = receive(made, room, 1, 0)
        sending.wait(FOREVER)
        receiving.wait(FOREVER)

    calls, raws = [], []
    for _ in range(warm + repeats):
        calls.append(seconds(lambda: lane.run(0, hidden, experts, weights)))
        raws.append(seconds(raw))
    return [np.quantile(found[warm:], (0.1, 0.5)).tolist() for found in (calls, raws)]


if __name__ == "__main__":
    main()
