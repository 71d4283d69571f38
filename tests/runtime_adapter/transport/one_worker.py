"""A worker's lanes behind a listener, in the process of a test."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch

from prism_plan.model_spec import ModelShape
from prism_plan.placement import Placement, SolveReport
from runtime_adapter.moe.router import uniform_network
from runtime_adapter.server_config import ServerConfig
from runtime_adapter.transport.listener import Listener
from runtime_adapter.transport.nccl_channel import ChannelConfig
from runtime_adapter.transport.rendezvous import Rendezvous
from runtime_adapter.transport.secrets import RunSecret
from runtime_adapter.transport.wire_kernels import compile_unpacking
from runtime_adapter.weights.expert_map import ExpertMap
from runtime_adapter.worker_lanes import WorkerLanes

MODEL = ModelShape("tiny", (1,), 8, 4, 1)
NAMES = ("s0", "s1", "s2")
WIDTH = 8
SECRET = RunSecret(b"a secret of this test", given=True)


def placement(*holders: int) -> Placement:
    """Servers with a GPU each; these hold every expert."""
    held = np.zeros((3, 1, 8), bool)
    held[list(holders)] = True
    return Placement(MODEL, NAMES, ((8,), (8,), (8,)), held, SolveReport("hand"))


class Scales:
    """Computes: expert e multiplies by e + 1. A test may hold computations up, and counts them."""

    def __init__(self) -> None:
        self.may_go = threading.Event()
        self.may_go.set()
        self.begun = threading.Semaphore(0)
        self.count = 0

    def use(self, expert_map: ExpertMap) -> None:
        """It needs no map."""

    def partial_sums(self, batch: Any) -> Any:
        """Σ over the calls of weight x (expert + 1) x hidden, [T, H]."""
        self.count += 1
        self.begun.release()
        self.may_go.wait()
        token = torch.from_numpy(batch.token)
        factor = torch.from_numpy(batch.weights * (batch.experts + 1).astype(np.float32))
        hidden = batch.hidden.to(torch.float32)
        sums = torch.zeros_like(hidden)
        return sums.index_add_(0, token, hidden[token] * factor[:, None])

    def dense(self, layer: int, tokens: int, context: int | None = None) -> None:
        """Is not asked for."""

    def apply(self, change: Any) -> None:
        """Is not asked for."""

    def held(self) -> list[tuple[int, int, int]]:
        """Is not asked for."""
        return []


class Worker:
    """The worker of server ``rank``; :meth:`close` ends it, and it may be made again on its port.

    ``lines`` are what its listener reports.
    """

    def __init__(
        self, rank: int, port: int = 0, *, holders: tuple[int, ...] = (1, 2),
        channels: ChannelConfig | None = None,
    ) -> None:  # fmt: skip
        compile_unpacking()
        self.compute = Scales()
        self.lines: list[str] = []
        self.finished = False
        held = placement(*holders)
        self.expert_map = ExpertMap(held)
        nothing: Any = None
        config = ServerConfig(
            rendezvous=Rendezvous(3, rank, timeout_s=20.0),
            placement=held,
            model=MODEL,
            network=uniform_network(3, 4 * WIDTH),
            compute=self.compute,
            facts={},
            dtype=torch.float32,
            width=WIDTH,
            max_tokens=16,
            migration=nothing,
            channels=channels,
        )
        self.lanes = WorkerLanes(config, self.expert_map, nothing, finished=lambda: self.finished)
        self.listener = Listener(
            "127.0.0.1", port, SECRET, self.lanes.handlers(), max_connections=64,
            report=self.lines.append,
        )  # fmt: skip
        self.listener.start()
        self.address: tuple[str, int] = self.listener.address

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End all connections."""
        self.compute.may_go.set()
        self.listener.close()


def step(tokens: int, seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """Hidden states, experts and weights of a step, and what comes of it; all exact in floats."""
    rng = np.random.default_rng(seed)
    experts = np.array([rng.permutation(8)[:4] for _ in range(tokens)])
    weights = rng.choice([0.25, 0.5, 1.0], (tokens, 4)).astype(np.float32)
    hidden = torch.from_numpy(rng.integers(1, 9, (tokens, WIDTH)).astype(np.float32))
    factor = torch.from_numpy((weights * (experts + 1)).sum(1))[:, None]
    return hidden, experts, weights, hidden * factor
