"""Replays recorded routing through the real machinery: real messages, work as timed waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prism_plan.cluster import Cluster
from prism_plan.errors import PrismError
from prism_plan.evaluate.simulation_options import SimulationOptions
from prism_plan.model_spec import ModelSpec
from prism_plan.placement import Placement
from prism_plan.simulate.network import Network
from prism_plan.simulate.requests import Requests
from prism_plan.simulate.routing_policies import Route
from prism_plan.simulate.scenario import Scenario
from runtime_adapter.moe.emulated_gpu import GpuClock, set_sharp_timers
from runtime_adapter.moe.remote_dispatcher import RemoteDispatcher
from runtime_adapter.moe.timed_work import TimedCompute, TimedLoader
from runtime_adapter.request_lanes import run_in_lanes
from runtime_adapter.server import LocalServer
from runtime_adapter.server_config import ServerConfig, migration_config
from runtime_adapter.transport.rendezvous import Rendezvous


@dataclass
class ReplayResult:
    """The times of one request, in seconds since the run began."""

    request: int
    server: str
    task: str
    arrival_s: float
    start_s: float | None = None
    first_token_s: float | None = None
    done_s: float | None = None
    error: str | None = None


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
    movable: bool = False,
    **others: Any,
) -> ServerConfig:
    """The configuration of one server of a replay; work takes the time that the cluster file says.

    Experts move by the reviews of ``options`` and, if ``movable``, by the command `move`.
    ``others`` are fields of the configuration.

    Raises
    ------
    InputError, WrongModel
        As :meth:`prism_plan.simulate.scenario.Scenario.build`.
    """
    scenario = Scenario.build(placement, requests, cluster, model, route=route)
    rank = rendezvous.rank
    own_gpus = placement.gpus_of(rank)
    compute = TimedCompute(
        scenario.timing, GpuClock(len(own_gpus)), model.num_experts, int(own_gpus[0]),
        int(scenario.dense_gpu[rank]), rank,
    )  # fmt: skip
    prompts, own_prompts = requests.prompts, requests.prompt[requests.home == rank]
    lanes = list(scenario.concurrency)
    loader = TimedLoader(
        compute,
        scenario.timing.load_s[own_gpus].tolist(),
        scenario.load_blocks_compute[own_gpus].tolist(),
    )
    migration = migration_config(
        loader, placement, model, cluster, options or SimulationOptions(), rendezvous.timeout_s,
        movable=movable,
    )  # fmt: skip
    return ServerConfig(
        rendezvous=rendezvous,
        placement=placement,
        model=model.shape(),
        network=Network.of(cluster, model),
        compute=compute,
        migration=migration,
        facts={**facts, "lanes": lanes},
        dtype=torch.uint8,
        width=model.hidden_size * model.dtype_bytes,
        max_tokens=max(int(prompts.prefill_tokens[own_prompts].max(initial=1)), 1),
        route=route,
        num_lanes=lanes[rank],
        rtt_s=rtt_s,
        **others,
    )


def replay(
    server: LocalServer,
    requests: Requests,
    begin_s: float,
    on_result: Callable[[ReplayResult], None] = lambda result: None,
    from_s: float = 0.0,
) -> list[ReplayResult]:
    """Serve this server's requests at their times; ``begin_s`` is when time zero is.

    Those that arrive before ``from_s`` are left out: a server that comes back to a run serves, as
    in the simulator, what arrives from then on.
    """
    prompts = requests.prompts
    results: list[ReplayResult] = []

    def arrivals() -> Iterator[tuple[float, ReplayResult]]:
        for number in np.flatnonzero(requests.home == server.rank).tolist():
            arrival_s = float(requests.arrival_s[number])
            if arrival_s < from_s:
                continue
            task = prompts.tasks[int(prompts.task[requests.prompt[number]])]
            results.append(ReplayResult(number, server.name, task, arrival_s))
            yield begin_s + arrival_s, results[-1]

    def serve_one(lane: RemoteDispatcher, result: ReplayResult) -> None:
        set_sharp_timers()
        with server.requests.running_one():
            try:
                _serve(lane, requests, result, begin_s, server.config.width)
            except PrismError as error:
                result.error = str(error)
            on_result(result)
            server.requests.ended(result.error)

    run_in_lanes(server.lanes, arrivals(), serve_one)
    return results


def _serve(
    lane: RemoteDispatcher, requests: Requests, result: ReplayResult, begin_s: float, width: int
) -> None:
    prompts, prompt = requests.prompts, int(requests.prompt[result.request])
    prefill, decode = int(prompts.prefill_tokens[prompt]), int(prompts.decode_tokens[prompt])
    row = int(prompts.first_row[prompt])
    lane.request = result.request
    result.start_s = time.monotonic() - begin_s
    context = 0
    for tokens in [prefill] * (prefill > 0) + [1] * decode:
        experts = prompts.experts[row : row + tokens].astype(np.int64)
        is_prefill = context == 0 and prefill > 0
        _run_step(lane, experts, width, None if is_prefill else context)
        row += tokens
        context += tokens
        if result.first_token_s is None:
            result.first_token_s = time.monotonic() - begin_s
    result.done_s = time.monotonic() - begin_s


def _run_step(lane: RemoteDispatcher, experts: Any, width: int, context: int | None) -> None:
    """Run all layers of one step; ``experts`` [T, L, K] are the recorded selections.

    ``context`` counts the tokens before a decode step; a prompt has none.
    """
    tokens, layers, top_k = experts.shape
    hidden = torch.zeros((tokens, width), dtype=torch.uint8)
    weights = np.full((tokens, top_k), 1.0 / top_k, np.float32)
    for layer in range(layers):
        lane.compute.dense(layer, tokens, context)
        lane.run(layer, hidden, experts[:, layer], weights)
