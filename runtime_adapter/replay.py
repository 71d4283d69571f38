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
from prism_plan.execution_table import Span
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
from runtime_adapter.request_repeats import MAX_REPEATS, may_pass
from runtime_adapter.server import LocalServer
from runtime_adapter.server_config import ServerConfig, kv_tokens_of_run, migration_config
from runtime_adapter.spans.messages import RequestSetup
from runtime_adapter.spans.timed_spans import RecordedRequest, run_layers
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
        kv_tokens=kv_tokens_of_run(placement, cluster),
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
        recorded = RecordedRequest.of(requests, result.request)
        with server.requests.running_one():
            try:
                _serve(server, lane, recorded, result, begin_s)
            except PrismError as error:
                result.error = str(error)
            on_result(result)
            server.requests.ended(result.error)

    run_in_lanes(server.lanes, arrivals(), serve_one)
    return results


def _serve(
    server: LocalServer, lane: RemoteDispatcher, recorded: RecordedRequest, result: ReplayResult,
    begin_s: float,
) -> None:  # fmt: skip
    lane.request = result.request
    passes = recorded.passes_after(0)
    with server.path_requests.room(server.lanes.index(lane), sum(passes)):
        _serve_in_room(server, lane, recorded, result, begin_s)


def _serve_in_room(
    server: LocalServer, lane: RemoteDispatcher, recorded: RecordedRequest, result: ReplayResult,
    begin_s: float,
) -> None:  # fmt: skip
    result.start_s = time.monotonic() - begin_s
    paths = server.path_requests
    path = paths.path()
    made = 0

    def add(token: int) -> None:
        nonlocal made
        made += 1
        result.done_s = time.monotonic() - begin_s
        if result.first_token_s is None:
            result.first_token_s = result.done_s

    for repeat in range(MAX_REPEATS + 1):
        if paths.is_home(path):
            past = 0
            for tokens in recorded.passes_after(made):
                last = server.config.model.num_layers - 1
                run_layers(lane, recorded, past, tokens, server.config.width, 0, last)
                past += tokens
                add(0)
            return
        try:
            _run_path(server, lane, result.request, path, recorded, made, add)
            return
        except Exception as error:
            if not may_pass(error) or repeat == MAX_REPEATS:
                raise
            path = paths.path()


def _run_path(
    server: LocalServer, lane: RemoteDispatcher, number: int, path: tuple[Span, ...],
    recorded: RecordedRequest, made: int, add: Callable[[int], None],
) -> None:  # fmt: skip
    """Run the passes that are left along a path; what there is of tokens is prefilled again."""
    passes = recorded.passes_after(made)
    setup = RequestSetup(number, path, len(passes), sum(passes))
    ids = [0] * passes[0]
    server.path_requests.run(server.lanes.index(lane), setup, ids, add)
