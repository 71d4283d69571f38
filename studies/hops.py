"""What a hop between two servers costs beside a raw round trip of the same bytes over TCP.

    python -m studies.hops -o studies/hops.json       # half a minute; prints a table

Two servers without any work on this machine's loopback, hidden states of DeepSeek-V2-Lite (4,096
bytes a token). A pass has the states sent to the second server and an id sent back: two hops. A raw
round trip sends as many bytes as these two messages have, headers included, to a process that does
nothing else and answers with plain blocking sockets. Both alternate, so that both see the same
machine. A round is the mean of so many passes, or round trips; the table has the median round.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import time
from statistics import median
from typing import Any

import numpy as np
import torch

from prism_plan.execution_table import Span
from prism_plan.io.file_writing import write_bytes
from prism_plan.simulate.network import BYTES_PER_TOKEN_ID
from runtime_adapter.calibrate import EmptySpans
from runtime_adapter.server import LocalServer
from runtime_adapter.spans.messages import HEADER_BYTES, RequestSetup
from runtime_adapter.transport.socket_io import receive_into
from studies.testbed.experiment import provenance
from studies.transport import MODEL, TOKEN_BYTES, free_port, idle_config

OUT, BACK = HEADER_BYTES + TOKEN_BYTES, HEADER_BYTES + BYTES_PER_TOKEN_ID
#: Passes of a round, after some that are not counted.
PASSES, WARM = 300, 20
PATIENCE_S = 120.0


def server(port: int, rank: int) -> LocalServer:
    """One of two servers; each holds what its layers need."""
    held = np.zeros((2, MODEL.num_layers, MODEL.num_experts), bool)
    held[0, 0], held[1, 1:] = True, True
    work = EmptySpans(TOKEN_BYTES)
    return LocalServer(idle_config(held, port, rank, 1), lambda text: None, work=work)


def serve(port: int) -> None:
    """The second server, until the first one has finished."""
    torch.set_num_threads(1)
    with server(port, 1) as second:
        second.agree_on_start()
        second.finish()


def echo(port: int) -> None:
    """Answer each message of the raw pair until it ends."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(None)
        buffer, answer = memoryview(bytearray(OUT)), bytes(BACK)
        while True:
            try:
                receive_into(connection, buffer)
            except OSError:
                return
            connection.sendall(answer)


def raw_round(connection: socket.socket) -> float:
    """Mean seconds of a raw round trip."""
    message, buffer = bytes(OUT), memoryview(bytearray(BACK))
    begin_s = 0.0
    for number in range(WARM + PASSES):
        if number == WARM:
            begin_s = time.perf_counter()
        connection.sendall(message)
        receive_into(connection, buffer)
    return (time.perf_counter() - begin_s) / PASSES


def hop_round(first: LocalServer) -> float:
    """Mean seconds of a pass of two hops."""
    path = (Span(0, 0, 0), Span(1, MODEL.num_layers - 1, 1))
    setup = RequestSetup(0, path, WARM + PASSES + 1, WARM + PASSES + 2)
    times: list[float] = []
    first.path_requests.run(0, setup, [0], lambda token: times.append(time.perf_counter()))
    return (times[-1] - times[WARM]) / PASSES


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("-o", "--output", help="Write the figures as JSON.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    port = free_port()
    listener = socket.create_server(("127.0.0.1", 0))
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(target=echo, args=(listener.getsockname()[1],), daemon=True),
        context.Process(target=serve, args=(port,)),
    ]
    for process in others:
        process.start()
    raw: list[float] = []
    hops: list[float] = []
    with server(port, 0) as first:
        first.agree_on_start()
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection:
            for _ in range(given.rounds):
                raw.append(raw_round(connection))
                hops.append(hop_round(first))
        first.finish()
    for process in others:
        process.join(PATIENCE_S)
    listener.close()
    figures: dict[str, Any] = {
        "bytes": [OUT, BACK],
        "raw_round_trip_ms": round(1e3 * median(raw), 4),
        "pass_ms": round(1e3 * median(hops), 4),
        "hop_ms": round(1e3 * median(hops) / 2, 4),
        "ratio": round(median(hop / one for hop, one in zip(hops, raw, strict=True)), 2),
        "load": round(os.getloadavg()[0], 1),
    }
    print(figures)
    if given.output:
        values = {"provenance": provenance(), "rounds": given.rounds, **figures}
        write_bytes(given.output, (json.dumps(values, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
