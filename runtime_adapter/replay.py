"""Recorded routing driven through the real machinery: real messages, work as timed waits."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from prism_plan.cluster import Cluster
from prism_plan.errors import PrismError
from prism_plan.evaluate.simulation_checks import require_supported_migration
from prism_plan.evaluate.simulation_options import SimulationOptions
from prism_plan.model import ModelSpec
from prism_plan.placement import Placement
from prism_plan.simulate.network import Network
from prism_plan.simulate.requests import Requests
from prism_plan.simulate.routing_policies import Route
from prism_plan.simulate.scenario import Scenario
from runtime_adapter.control.migration_executor import TimedLoader
from runtime_adapter.control.rules import rules_of
from runtime_adapter.control.scheduler import SchedulerConfig
from runtime_adapter.moe.compute import TimedCompute
from runtime_adapter.moe.dispatch import Dispatcher
from runtime_adapter.moe.emulated_gpu import GpuClock, sharp_timers, wait_until
from runtime_adapter.server import MigrationConfig, Server, ServerConfig
from runtime_adapter.transport.rendezvous import Rendezvous


@dataclass
class Timings:
    """What happened to one request, in seconds since the run began."""

    request: int
    server: str
    task: str
    arrival_s: float
    start_s: float | None = None
    first_token_s: float | None = None
    done_s: float | None = None
    error: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A line of the results."""
        values = {key: value for key, value in vars(self).items() if key != "extra"}
        return {**values, **self.extra}


def replay_config(
    placement: Placement,
    requests: Requests,
    cluster: Cluster,
    model: ModelSpec,
    rendezvous: Rendezvous,
    facts: dict[str, Any],
    *,
    route: Route = "cover",
    rtt_s: float = 0.0,
    options: SimulationOptions | None = None,
    placements_dir: str | None = None,
) -> ServerConfig:
    """The configuration of one server of a replay; work takes what the cluster file says.

    With ``options`` experts may move: by their reviews, and where the command `move` says.

    Raises
    ------
    InputError, WrongModel
        As :meth:`prism_plan.simulate.scenario.Scenario.build`.
    """
    scenario = Scenario.build(placement, requests, cluster, model, route=route)
    rank = rendezvous.rank
    first, end = int(scenario.gpu_start[rank]), int(scenario.gpu_start[rank + 1])
    compute = TimedCompute(
        scenario.timing, GpuClock(end - first), model.num_experts, first,
        int(scenario.dense_gpu[rank]), rank,
    )  # fmt: skip
    prompts, own = requests.prompts, requests.prompt[requests.home == rank]
    most = max(int(prompts.prefill_tokens[own].max(initial=1)), 1)
    lanes = list(scenario.concurrency)
    movable = None
    if options is not None:
        rules = rules_of(placement, cluster, model)
        if options.migrate != "never":
            require_supported_migration(rules, options)
        gpus = cluster.servers[rank].gpus
        loader = TimedLoader(
            compute, _load_seconds(cluster, model, rank), [gpu.load_blocks_compute for gpu in gpus]
        )
        movable = MigrationConfig(
            loader,
            SchedulerConfig(rendezvous, placement, rules, model, cluster, options, placements_dir),
        )
    return ServerConfig(
        rendezvous=rendezvous,
        placement=placement,
        model=model.shape(),
        network=Network.of(cluster, model),
        compute=compute,
        facts={**facts, "lanes": lanes},
        states=torch.uint8,
        width=model.hidden_size * model.dtype_bytes,
        most_tokens=most,
        route=route,
        lanes=lanes[rank],
        rtt_s=rtt_s,
        movable=movable,
    )


def _load_seconds(cluster: Cluster, model: ModelSpec, server: int) -> list[list[float]]:
    """Seconds to load an expert, by GPU of the server and layer position."""
    return [
        [size / (1e9 * gpu.load_gbs) for size in model.expert_bytes_by_layer]
        for gpu in cluster.servers[server].gpus
    ]


def replay(
    server: Server,
    requests: Requests,
    begin_s: float,
    done: Callable[[Timings], None] = lambda timings: None,
) -> list[Timings]:
    """Serve this server's requests at their times; ``begin_s`` is when time zero is."""
    own = np.flatnonzero(requests.home == server.rank)
    waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    results: dict[int, Timings] = {}

    def serve(dispatcher: Dispatcher) -> None:
        sharp_timers()
        while (number := waiting.get()) is not None:
            timings = results[number]
            try:
                _serve(dispatcher, requests, number, timings, begin_s, server.config.width)
            except PrismError as error:
                timings.error = str(error)
            done(timings)

    threads = [threading.Thread(target=serve, args=(lane,), daemon=True) for lane in server.lanes]
    for thread in threads:
        thread.start()
    prompts = requests.prompts
    for number in own.tolist():
        arrival_s = float(requests.arrival_s[number])
        task = prompts.tasks[int(prompts.task[requests.prompt[number]])]
        results[number] = Timings(number, server.name, task, arrival_s)
        wait_until(begin_s + arrival_s)
        waiting.put(number)
    for _ in threads:
        waiting.put(None)
    for thread in threads:
        thread.join()
    return [results[number] for number in own.tolist()]


def _serve(
    dispatcher: Dispatcher, requests: Requests, number: int, timings: Timings, begin_s: float,
    width: int,
) -> None:  # fmt: skip
    prompts, prompt = requests.prompts, int(requests.prompt[number])
    prefill, decode = int(prompts.prefill_tokens[prompt]), int(prompts.decode_tokens[prompt])
    row = int(prompts.first_row[prompt])
    dispatcher.request = number
    timings.start_s = time.monotonic() - begin_s
    for tokens in [prefill] * (prefill > 0) + [1] * decode:
        step(dispatcher, prompts.experts[row : row + tokens].astype(np.int64), width)
        row += tokens
        if timings.first_token_s is None:
            timings.first_token_s = time.monotonic() - begin_s
    timings.done_s = time.monotonic() - begin_s


def step(dispatcher: Dispatcher, experts: Any, width: int) -> None:
    """All layers of one step; ``experts`` [T, L, K] are the recorded selections."""
    tokens, layers, top_k = experts.shape
    hidden = torch.zeros((tokens, width), dtype=torch.uint8)
    weights = np.full((tokens, top_k), 1.0 / top_k, np.float32)
    for layer in range(layers):
        dispatcher.compute.dense(tokens)
        dispatcher.run(layer, hidden, experts[:, layer], weights)
