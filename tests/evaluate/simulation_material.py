"""A small model, trace and cluster for tests of whole simulations."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import signal
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any
from unittest import mock

import numpy as np

from prism_plan.cli.main import run
from prism_plan.cluster import Cluster
from prism_plan.evaluate.simulation import simulate_placements
from prism_plan.evaluate.simulation_options import SimulationOptions
from prism_plan.instance import Instance
from prism_plan.io.cluster import parse_cluster
from prism_plan.model_spec import ModelSpec
from prism_plan.placement import Placement
from prism_plan.simulate.requests import Requests
from prism_plan.simulate.sampling import sample_requests
from prism_plan.solvers import solve
from prism_plan.trace import Trace
from tests.profiling.synthetic import SyntheticSpread, synthetic_trace

SPEC = ModelSpec(
    name="tiny",
    moe_layers=(1, 2, 3),
    num_experts=8,
    top_k=2,
    hidden_size=64,
    dtype_bytes=2,
    expert_bytes=1_000_000,
    dense_bytes=5_000_000,
    kv_bytes_per_token=0,
    attention_flops=0,
)
#: 33 slots for 24 experts; a request takes about 10 ms.
CLUSTER = """\
name = "small"
[link]
bandwidth_mbps = 100
[[server]]
name = "a"
arrival_interval_s = 0.02
tasks = { x = 1.0 }
[[server.gpu]]
slots = 11
[[server]]
name = "b"
arrival_interval_s = 0.02
tasks = { y = 1.0 }
[[server.gpu]]
slots = 8
[[server.gpu]]
slots = 3
[[server]]
name = "c"
arrival_interval_s = 0.04
tasks = { x = 0.5, z = 0.5 }
[[server.gpu]]
slots = 11
"""
#: The same figures, but given: nothing is assumed.
GIVEN = CLUSTER.replace(
    "bandwidth_mbps = 100\n", "bandwidth_mbps = 100\nrtt_ms = 1.0\ncall_overhead_ms = 0.2\n"
).replace(
    "[[server.gpu]]\n",
    "[[server.gpu]]\nmemory_bandwidth_gbs = 1555\ntflops = 312\nlaunch_overhead_us = 20\n"
    "load_gbs = 12\n",
)


def small_trace(**changes: Any) -> Trace:
    """Three tasks of 8 requests, each of 6 prompt tokens and 4 decode steps."""
    values: dict[str, Any] = {
        "requests": 8,
        "prompt_tokens": 6,
        "decode_tokens": 4,
        "spread": SyntheticSpread(task=1.5),
        "seed": 1,
        **changes,
    }
    return synthetic_trace(SPEC, ["x", "y", "z"], **values)


def small_cluster(*changes: tuple[str, str]) -> Cluster:
    """The cluster, with texts of its file replaced by others."""
    text = CLUSTER
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return parse_cluster(text)


def planned(trace: Trace, cluster: Cluster, *solvers: str) -> list[tuple[str, Placement]]:
    """The plans of these solvers, by name."""
    instance = Instance.build(trace, cluster)
    return [(name, solve(instance, name)) for name in solvers]


def sampled(trace: Trace, cluster: Cluster, number: int = 40, **options: Any) -> Requests:
    """Requests of each server."""
    return sample_requests(trace, cluster, requests_per_server=number, **options)


def simulated(
    trace: Trace, cluster: Cluster, *solvers: str, number: int = 40, **options: Any
) -> Any:
    """The simulation of these solvers' plans."""
    return simulate_placements(
        planned(trace, cluster, *solvers),
        sampled(trace, cluster, number),
        trace,
        cluster,
        SimulationOptions(**options),
    )


def without_times(values: Any) -> Any:
    """A report without what differs from run to run."""
    if isinstance(values, dict):
        return {key: without_times(value) for key, value in values.items() if key != "runtime_s"}
    return [without_times(value) for value in values] if isinstance(values, list) else values


def counts_of(trace: Trace) -> Trace:
    """The same trace without its tokens."""
    return dataclasses.replace(trace, batches=None, requests=None)


def tokens_of(requests: Requests) -> list[np.ndarray]:
    """The experts of each request's tokens, [tokens, L, K]."""
    prompts = requests.prompts
    lengths = prompts.prefill_tokens + prompts.decode_tokens
    return [
        prompts.experts[prompts.first_row[p] : prompts.first_row[p] + lengths[p]].astype(int)
        for p in requests.prompt
    ]


def invoke(folder: Path, *args: object) -> CompletedProcess[str]:
    """What the installed command does, in this process: quicker, for many calls."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    words = ["prism-plan", *map(str, args)]
    before = signal.getsignal(signal.SIGTERM)
    try:
        with (
            contextlib.chdir(folder),
            mock.patch.multiple(sys, argv=words, stdout=out, stderr=err),
        ):
            code = run()
            texts = []
            for stream in (out, err):
                stream.flush()
                texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    finally:
        signal.signal(signal.SIGTERM, before)
    return CompletedProcess(words, code, *texts)
