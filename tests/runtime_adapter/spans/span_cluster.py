"""Several servers' spans in one process, over real connections, with a model that they share."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import torch

from prism_plan.execution_table import spans
from runtime_adapter.driver import greedy_config
from runtime_adapter.moe.counters import Counters
from runtime_adapter.moe.thread_local_dispatcher import ThreadLocalDispatcher
from runtime_adapter.spans.messages import RequestSetup
from runtime_adapter.spans.model_work import ModelWork
from runtime_adapter.spans.path_requests import PathRequests
from runtime_adapter.spans.span_server import SpanServer
from runtime_adapter.transport.listener import Listener
from runtime_adapter.transport.peer import Peer
from runtime_adapter.transport.secrets import RunSecret
from runtime_adapter.transport.send_queue import SendQueue

SECRET = RunSecret(b"a secret of this test", given=True)
TIMEOUT_S = 20.0


class Lane:
    """Stands for a dispatcher: the shared model computes its experts itself."""

    max_tokens = 1 << 20

    def __init__(self) -> None:
        self.request = 0
        self.connections: dict[int, Any] = {}


class Peers:
    """The other servers, as a server sees them; tests say who is down."""

    incarnation = 1

    def __init__(self, own: str, others: dict[int, str]) -> None:
        self.peers = {n: Peer(own, name, SECRET, TIMEOUT_S) for n, name in others.items()}
        self.down: set[int] = set()

    def wait_for_address(self, n: int, limit_s: float | None = None) -> None:
        """They are all known from the start."""

    def is_down(self, n: int) -> bool:
        """Whether a test says so."""
        return n in self.down


class SpanCluster:
    """``num_servers`` servers with ``lanes`` lanes each; ``table`` int [N, L] may be replaced."""

    def __init__(
        self, model: Any, moe_layers: Sequence[int], num_servers: int, *, lanes: int = 2,
        chunk_tokens: int = 0, kv_tokens: int = 0,
    ) -> None:  # fmt: skip
        decoder_layers = len(model.get_decoder().layers)
        self.spec: Any = SimpleNamespace(
            moe_layers=tuple(moe_layers), num_layers=len(moe_layers), num_experts=4,
            num_decoder_layers=decoder_layers,
        )  # fmt: skip
        self.names = [f"s{n}" for n in range(num_servers)]
        self.said: list[str] = []
        self.table = np.zeros((num_servers, len(moe_layers)), np.int64)
        self._numbers = itertools.count()
        self.servers: list[SpanServer] = []
        self.homes: list[PathRequests] = []
        self.peers: list[Any] = []
        self.listeners: list[Listener] = []
        self.counters: list[Counters] = []
        work = ModelWork(model, self.spec, ThreadLocalDispatcher(), greedy_config(model))
        kv = dict.fromkeys(self.names, kv_tokens) if kv_tokens else {}
        for n, name in enumerate(self.names):
            others = {m: other for m, other in enumerate(self.names) if m != n}
            config: Any = SimpleNamespace(
                rendezvous=SimpleNamespace(rank=n, timeout_s=TIMEOUT_S), name=name, model=self.spec,
                placement=SimpleNamespace(
                    servers=self.names, execution_table=self.table, model=self.spec
                ),
                width=model.config.hidden_size, dtype=torch.float32, chunk_tokens=chunk_tokens,
                request_timeout_s=60.0, rtt_s=0.0, kv_tokens=kv,
            )  # fmt: skip
            peers: Any = Peers(name, others)
            # every server holds every expert
            gpu_of = np.zeros((num_servers, self.spec.num_layers * 4), np.int32)
            experts: Any = SimpleNamespace(gpu_of=gpu_of, lost=lambda n: False)
            counters = Counters(self.spec.num_layers, 4)
            home = PathRequests(config, peers, experts, counters)
            home.spans = SpanServer(
                config, peers, work, [lanes] * num_servers, lambda *_: Lane(),  # type: ignore[arg-type,return-value]
                home.deliver, self.said.append, SendQueue(),
            )  # fmt: skip
            self.peers.append(peers)
            self.homes.append(home)
            self.counters.append(counters)
            self.servers.append(home.spans)
            self.listeners.append(self.listen(n))

    def listen(self, n: int, port: int = 0) -> Listener:
        """Let a server accept connections, at a new port."""

        def serve(connection: Any, session: Any) -> None:
            self.servers[n].accept(connection.dup(), session.claim.server)

        listener = Listener(
            "127.0.0.1", port, SECRET, {"spans": serve}, max_connections=1000,
            report=self.said.append,
        )  # fmt: skip
        listener.start()
        return listener

    def __enter__(self) -> Self:
        for n, listener in enumerate(self.listeners):
            self.set_address(n, listener.address)
            self.servers[n].start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.close()
        for listener in self.listeners:
            listener.close()

    def set_address(self, n: int, address: tuple[str, int] | None, incarnation: int = 1) -> None:
        """All others see a server at an address, or none."""
        for m, peers in enumerate(self.peers):
            if m != n:
                peers.peers[n].set_address(address, incarnation)

    def run(
        self, home: int, ids: list[int], new_tokens: int, lane: int = 0, row: Any = None
    ) -> list[int]:
        """Run a request of a home on its row of the table; returns its tokens."""
        tokens: list[int] = []
        path = tuple(spans(np.array(self.table[home] if row is None else row)))
        setup = RequestSetup(next(self._numbers), path, new_tokens, len(ids) + new_tokens)
        self.homes[home].run(lane, setup, ids, tokens.append)
        return tokens

    def forget(self, n: int) -> None:
        """A server has nothing of any request any more, as after a restart."""
        lanes = self.servers[n]._lanes
        for lane in lanes.values():
            for connection in lane.connections.values():
                connection.close()
        lanes.clear()

    def cached(self) -> int:
        """Tokens in caches of all servers."""
        return sum(server.cached_tokens() for server in self.servers)


def run_at_once(jobs: Sequence[Any]) -> list[Any]:
    """Results of jobs that run at once; their exceptions are results as well."""
    results: list[Any] = [None] * len(jobs)

    def run(i: int) -> None:
        try:
            results[i] = jobs[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
