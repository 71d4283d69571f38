"""What a mean request takes under an expert map, with the replicas that the engine calls."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from prism_plan.execution_table import home_execution
from prism_plan.export.expert_maps.replica_rules import Bools, called_ranks
from prism_plan.io.export import MapEngine
from prism_plan.latency.expected_latency import latency_of_work
from prism_plan.latency.home_work import HomeWork, home_work
from prism_plan.solvers.latency.problem import LatencyProblem

#: So many turns of rules that take replicas in turn or at random stand for all of them.
TURNS = 4


def map_seconds(
    engine: MapEngine, physical: npt.NDArray[np.int64], ranks: tuple[int, ...],
    problem: LatencyProblem,
) -> float:  # fmt: skip
    """Expected seconds of a mean request of all servers, each spread evenly over its ranks.

    ``physical`` [L, R, S] is the expert in each slot; ranks are GPUs. What a request asks of GPUs
    and links is added up for each rank with the replicas that it calls alone, and the formula gets
    the mean over a server's ranks.
    """
    layers, number, _ = physical.shape
    servers = problem.cluster.num_servers
    held = np.zeros((number, layers, problem.model.num_experts), bool)
    for layer, rank in np.ndindex(layers, number):
        held[rank, layer, physical[layer, rank]] = True
    table = home_execution(servers, layers)
    of_server = [
        [
            _work_of_server(server, called_ranks(engine, held, ranks, rank, turn), table, problem)
            for rank, own in enumerate(ranks)
            if own == server
            for turn in range(TURNS)
        ]
        for server in range(servers)
    ]
    work = HomeWork(
        **{
            field.name: np.array(
                [np.mean([getattr(one, field.name)[n] for one in of_server[n]], axis=0)
                 for n in range(servers)]
            )
            for field in dataclasses.fields(HomeWork)
        }
    )  # fmt: skip
    return float(latency_of_work(work, problem.workload, problem.site).mean_s)


def _work_of_server(
    server: int, called: Bools, table: npt.NDArray[np.int32], problem: LatencyProblem
) -> HomeWork:
    """What requests of one server ask for, where these replicas are called."""
    workload = problem.workload
    shares = workload.shares * (np.arange(len(workload.shares)) == server)[:, None]
    return home_work(called, table, dataclasses.replace(workload, shares=shares), problem.site)
