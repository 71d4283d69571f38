"""Scenarios with execution tables, drawn from everything that the rules of a table depend on."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster, PairLink
from prism_plan.model_spec import ModelSpec
from prism_plan.simulate.calibration import Calibration
from prism_plan.simulate.routing_policies import ROUTES
from prism_plan.simulate.scenario import Scenario
from tests.simulate.builders import (
    EXPERT_BYTES,
    TOKEN_BYTES,
    drawn_asks,
    drawn_cluster,
    drawn_curves,
    drawn_held,
    make_model,
    make_requests,
    place,
)

#: Limits below which messages are short: none, ids, a token's hidden state, a prompt, all.
SHORT_KB = (0.0, 0.005, 0.3, 1.0, 99.0)


def drawn_table(rng: np.random.Generator, servers: int, layers: int) -> npt.NDArray[np.int32]:
    """A table [N, L] of single layers, of spans, of one row for all, or of home in some rows."""
    kind = rng.choice(["layers", "spans", "one row", "home"], p=[0.4, 0.35, 0.15, 0.1])
    table = rng.integers(0, servers, (servers, layers))
    if kind in ("spans", "one row"):
        for row in table:
            starts = np.sort(rng.integers(0, layers, int(rng.integers(0, 4))))
            for start in starts:
                row[start:] = row[start]
            row[: starts[0] if len(starts) else layers] = row[0]
    if kind == "one row":
        table[:] = table[0]
    at_home = rng.random(servers) < (1.0 if kind == "home" else rng.choice([0.0, 0.3]))
    table[at_home] = np.arange(servers)[at_home, None]
    return table.astype(np.int32)


def drawn_links(rng: np.random.Generator, cluster: Cluster, ties: bool) -> Cluster:
    """The cluster with some pairs of servers that have links of their own."""
    pairs = []
    for a, b in itertools.combinations(range(cluster.num_servers), 2):
        if rng.random() < 0.3:
            rate = float(rng.choice([256, 512, 2048]) if ties else rng.uniform(200, 4000))
            rtt_ms = float(rng.choice([0.0, 250.0, 1000.0]) if ties else rng.uniform(0, 900))
            pairs.append(PairLink(a, b, bandwidth_mbps=8e-6 * rate, rtt_ms=rtt_ms))
    link = dataclasses.replace(
        cluster.link,
        short_kb=float(rng.choice(SHORT_KB)),
        hop_overhead_ms=None if rng.random() < 0.5 else float(rng.choice([0.0, 125.0])),
    )
    return dataclasses.replace(cluster, link=link, pair_links=tuple(pairs))


def _drawn_model(rng: np.random.Generator, layers: int) -> ModelSpec:
    experts = int(rng.integers(2, 7))
    changes: dict[str, Any] = {
        "expert_bytes": tuple(int(rng.choice([1, 2])) * EXPERT_BYTES for _ in range(layers)),
        "kv_bytes_per_token": int(rng.choice([0, 512])),
        "attention_flops": [None, 0, 100, 1000][int(rng.integers(4))],
        "num_decoder_layers": layers + int(rng.integers(3)),
    }
    return make_model(layers, experts, int(rng.integers(1, min(3, experts) + 1)), **changes)


def drawn_table_scenario(
    rng: np.random.Generator, *, ties: bool = False, everywhere: bool = False
) -> Scenario:
    """1-6 servers, 1-8 layers, 1-10 requests; rows of servers that execute at home among others.

    ``ties``: few distinct times, so that events coincide; ``everywhere``: every server holds every
    expert, so that there are no calls.
    """
    servers, layers = int(rng.integers(1, 7)), int(rng.integers(1, 9))
    model = _drawn_model(rng, layers)
    cluster = drawn_links(rng, drawn_cluster(rng, servers, ties), ties)
    table = drawn_table(rng, servers, layers)
    gpus = [len(server.gpus) for server in cluster.servers]
    copies = float(rng.choice([0.0, 0.2, 0.6]))
    held = drawn_held(rng, sum(gpus), layers, model.num_experts, copies)
    if everywhere:
        held[np.cumsum([0, *gpus[:-1]])] = True
    asks = drawn_asks(rng, model, servers, ties=ties, spacing_s=float(rng.choice([0.1, 1.0, 5.0])))
    measured = {
        (server.name, g): drawn_curves(rng, ties)
        for server in cluster.servers
        for g in range(len(server.gpus))
    }
    scenario = Scenario.build(
        place(model, cluster, held),
        make_requests(cluster, asks, layers, model.top_k),
        cluster,
        model,
        route=ROUTES[int(rng.integers(3))],
        calibration=Calibration("drawn", None, measured) if rng.random() < 0.5 else None,
        execution=table,
    )
    assert scenario.network.token_bytes == TOKEN_BYTES
    return scenario
