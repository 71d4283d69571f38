"""Small scenarios for the tests of the engines: by hand with exact binary figures, or drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster, Gpu, Link, Server
from prism_plan.model_spec import ModelSpec
from prism_plan.placement import Placement, SolveReport
from prism_plan.simulate.calibration import Calibration, GpuCurves
from prism_plan.simulate.compiled.compiled_engine import CompiledEngine
from prism_plan.simulate.engine_interface import Engine, Outcome
from prism_plan.simulate.events import Event
from prism_plan.simulate.reference_engine import ReferenceEngine
from prism_plan.simulate.requests import Prompts, Requests
from prism_plan.simulate.routing_policies import ROUTES
from prism_plan.simulate.scenario import Scenario

#: Kinds of events by number, as tests spell them.
KINDS = (
    *("arrival", "dense", "local", "send", "arrived", "computed", "returned", "loaded"),
    *("freed", "given up"),
)
ENGINES: list[Any] = [ReferenceEngine, CompiledEngine]

#: A token calls experts [L][K].
Token = Sequence[Sequence[int]]

#: Figures that are sums of few powers of two, so that hand-computed times are exact.
BYTES_PER_S = 1024
HALF_RTT_S = 0.0625
OVERHEAD_S = 0.03125
TOKEN_BYTES = 256
LOAD_S = 4.0
EXPERT_BYTES = 8 * 1024
LINK = Link(
    bandwidth_mbps=8e-6 * BYTES_PER_S, rtt_ms=2e3 * HALF_RTT_S, call_overhead_ms=1e3 * OVERHEAD_S
)
GPU = Gpu(slots=99, load_gbs=EXPERT_BYTES / LOAD_S / 1e9)
CURVES = GpuCurves(dense_s=((1, 1.0), (5, 2.0)), expert_s=((1, 0.5), (5, 1.0)))


def dense_s(tokens: int) -> float:
    """What :data:`CURVES` say of the dense part of a layer."""
    return 0.75 + 0.25 * tokens


def expert_s(tokens: int) -> float:
    """What :data:`CURVES` say of one expert's batch."""
    return 0.375 + 0.125 * tokens


def out_s(tokens: int, calls: int | None = None) -> float:
    """Time on the link outward: hidden states, and 4 bytes for each expert named."""
    return (tokens * TOKEN_BYTES + 4 * (tokens if calls is None else calls)) / BYTES_PER_S


def back_s(tokens: int) -> float:
    """Time on the link back: partial sums."""
    return tokens * TOKEN_BYTES / BYTES_PER_S


class Ask(NamedTuple):
    """A request: its tokens' experts, those of the prompt and those of the decode steps."""

    home: int
    arrival_s: float
    prefill: Sequence[Token] = ()
    decode: Sequence[Token] = ()


def make_model(layers: int, experts: int, top_k: int = 1, **changes: Any) -> ModelSpec:
    """A model of :data:`TOKEN_BYTES` a hidden state and :data:`EXPERT_BYTES` an expert."""
    values: dict[str, Any] = {
        "hidden_size": TOKEN_BYTES // 2,
        "dtype_bytes": 2,
        "expert_bytes": EXPERT_BYTES,
        "dense_bytes": EXPERT_BYTES,
        "kv_bytes_per_token": 0,
        "attention_flops": 0,
        **changes,
    }
    return ModelSpec(
        name="tiny",
        moe_layers=tuple(range(layers)),
        num_experts=experts,
        top_k=top_k,
        **values,
    )


def make_cluster(gpus: Sequence[int], link: Link = LINK, **changes: Any) -> Cluster:
    """Servers s0, s1, ... with so many GPUs; ``changes`` are of all servers alike."""
    servers = [Server(f"s{n}", (GPU,) * number, **changes) for n, number in enumerate(gpus)]
    return Cluster("c", tuple(servers), link)


def place(
    model: ModelSpec, cluster: Cluster, held: npt.ArrayLike, capacity: int | None = None
) -> Placement:
    """A placement from bool [G, L, E]; GPUs have room for ``capacity``, or what their slots say."""
    slots = tuple(
        tuple(gpu.slots or 0 if capacity is None else capacity for gpu in server.gpus)
        for server in cluster.servers
    )
    names = tuple(server.name for server in cluster.servers)
    return Placement(model, names, slots, np.array(held, bool), SolveReport("hand"))


def holding(layers: int, experts: int, *gpus: Sequence[tuple[int, int]]) -> npt.NDArray[np.bool_]:
    """Bool [G, L, E] from the (layer, expert) pairs of each GPU."""
    held = np.zeros((len(gpus), layers, experts), bool)
    for g, pairs in enumerate(gpus):
        for layer, expert in pairs:
            held[g, layer, expert] = True
    return held


def make_requests(cluster: Cluster, asks: Sequence[Ask], layers: int, top_k: int) -> Requests:
    """The requests in order of arrival, each with a prompt of its own."""
    asks = sorted(asks, key=lambda ask: (ask.arrival_s, ask.home))
    rows = [token for ask in asks for token in (*ask.prefill, *ask.decode)]
    prefill = np.array([len(ask.prefill) for ask in asks], np.int32)
    decode = np.array([len(ask.decode) for ask in asks], np.int32)
    numbers = np.arange(len(asks), dtype=np.int32)
    prompts = Prompts(
        tasks=("t",),
        task=np.zeros(len(asks), np.int32),
        trace_request=numbers.copy(),
        first_row=(np.cumsum(prefill + decode) - prefill - decode).astype(np.int64),
        prefill_tokens=prefill,
        decode_tokens=decode,
        experts=np.array(rows, np.uint16).reshape(-1, layers, top_k),
    )
    return Requests(
        servers=tuple(server.name for server in cluster.servers),
        prompts=prompts,
        home=np.array([ask.home for ask in asks], np.int32),
        arrival_s=np.array([ask.arrival_s for ask in asks], np.float64),
        prompt=numbers,
    )


def make_scenario(
    model: ModelSpec,
    cluster: Cluster,
    held: npt.ArrayLike,
    asks: Sequence[Ask],
    *,
    capacity: int | None = None,
    curves: GpuCurves | None = CURVES,
    **options: Any,
) -> Scenario:
    """A scenario; times of GPU work from ``curves``, or the cluster's figures without them."""
    calibration = None if curves is None else Calibration("hand", curves)
    return Scenario.build(
        place(model, cluster, held, capacity),
        make_requests(cluster, asks, model.num_layers, model.top_k),
        cluster,
        model,
        calibration=calibration,
        **options,
    )


def lines(*rows: tuple[float, str, int, int, int, int]) -> list[Event]:
    """A log from (time, kind, request, layer, at, to), in the order in which it happens."""
    return [Event(at_s, KINDS.index(kind), *rest) for at_s, kind, *rest in rows]


def finished(engine: Engine) -> Outcome:
    """Run to the end; every request is answered."""
    assert engine.advance()
    assert engine.all_finished
    return engine.outcome()


def differing(a: Outcome, b: Outcome) -> list[str]:
    """Names of the figures that are not equal to the last bit."""
    return [
        field.name
        for field in dataclasses.fields(Outcome)
        if not np.array_equal(getattr(a, field.name), getattr(b, field.name), equal_nan=True)
    ]


# --------------------------------------------------------------------------------- drawn scenarios


def drawn_held(
    rng: np.random.Generator, gpus: int, layers: int, experts: int, copies: float
) -> npt.NDArray[np.bool_]:
    """Every expert on one GPU at least, and on each other one with probability ``copies``."""
    held = rng.random((gpus, layers, experts)) < copies
    owner = rng.integers(0, gpus, (layers, experts))
    held[owner, np.arange(layers)[:, None], np.arange(experts)] = True
    return held


def drawn_asks(
    rng: np.random.Generator,
    model: ModelSpec,
    servers: int,
    *,
    least: int = 1,
    most: int = 10,
    ties: bool = False,
    spacing_s: float = 1.0,
) -> list[Ask]:
    """So many requests of 0-5 prompt tokens and 0-4 steps; ``ties``: few distinct times."""
    asks = []
    number = int(rng.integers(least, most + 1))
    for _ in range(number):
        prefill, decode = int(rng.integers(0, 6)), int(rng.integers(0, 5))
        prefill = max(prefill, int(prefill + decode == 0))
        tokens = [
            [
                rng.permutation(model.num_experts)[: model.top_k].tolist()
                for _ in range(model.num_layers)
            ]
            for _ in range(prefill + decode)
        ]
        at_s = float(rng.integers(0, 4)) if ties else float(rng.random() * number * spacing_s)
        asks.append(Ask(int(rng.integers(servers)), at_s, tokens[:prefill], tokens[prefill:]))
    return asks


def drawn_curves(rng: np.random.Generator, ties: bool) -> GpuCurves:
    """Times about 0.1 to 1 s; with ``ties`` multiples of a quarter, zero among them."""

    def curve() -> tuple[tuple[int, float], ...]:
        if ties:
            first = float(rng.choice([0.0, 0.25, 0.5]))
            return ((1, first), (5, first + float(rng.choice([0.0, 1.0]))))
        first = float(rng.uniform(0.1, 0.5))
        return ((1, first), (3, first + float(rng.uniform(0.0, 0.5))))

    return GpuCurves(curve(), curve())


def drawn_cluster(rng: np.random.Generator, servers: int, ties: bool) -> Cluster:
    """Servers of 1 to 3 GPUs and unequal ports; with ``ties`` zero overhead and round trips."""
    link = Link(
        bandwidth_mbps=8e-6
        * float(rng.choice([512, 1024, 4096]) if ties else rng.uniform(1e3, 1e4)),
        rtt_ms=float(rng.choice([0.0, 500.0]) if ties else rng.uniform(0, 400)),
        call_overhead_ms=float(rng.choice([0.0, 250.0]) if ties else rng.uniform(0, 200)),
        burst_kb=float(rng.choice([0.0, 0.0, 0.25, 2.0])),
    )
    made = []
    for n in range(servers):
        gpus = []
        for _ in range(int(rng.integers(1, 4))):
            gpus.append(
                Gpu(
                    slots=int(rng.integers(1, 8)),
                    memory_bandwidth_gbs=float(rng.choice([1e-5, 2e-5])),
                    tflops=float(rng.choice([1e-7, 1e-8])),
                    launch_overhead_us=0.0 if ties else float(rng.uniform(0, 1e5)),
                    load_gbs=EXPERT_BYTES / float(rng.choice([0.5, 1.0, 2.0])) / 1e9,
                    load_blocks_compute=bool(rng.random() < 0.3),
                )
            )
        dense = int(rng.integers(len(gpus)))
        gpus[dense] = dataclasses.replace(gpus[dense], dense=True)
        port = (
            {} if rng.random() < 0.5 else {"uplink_mbps": 8e-6 * 512, "downlink_mbps": 8e-6 * 768}
        )
        made.append(Server(f"s{n}", tuple(gpus), concurrency=int(rng.integers(1, 4)), **port))
    return Cluster("drawn", tuple(made), link)


def drawn_scenario(
    rng: np.random.Generator,
    *,
    servers: int | None = None,
    offload: bool = False,
    ties: bool = False,
    home: bool = False,
    most: int = 10,
    restarts: bool = False,
) -> Scenario:
    """1-5 servers, 1-3 layers, 2-8 experts, top-k 1-4; ``home``: layers execute at home."""
    servers = int(rng.integers(1, 6)) if servers is None else servers
    layers, experts = int(rng.integers(1, 4)), int(rng.integers(2, 9))
    top_k = int(rng.integers(1, min(4, experts) + 1))
    sizes = tuple(int(rng.choice([1, 2])) * EXPERT_BYTES for _ in range(layers))
    model = make_model(
        layers, experts, top_k, expert_bytes=sizes,
        kv_bytes_per_token=int(rng.choice([0, 512])),
        attention_flops=None if rng.random() < 0.5 else int(rng.choice([100, 1000])),
        num_decoder_layers=layers + int(rng.integers(3)),
    )  # fmt: skip
    cluster = drawn_cluster(rng, servers, ties)
    gpus = sum(len(server.gpus) for server in cluster.servers)
    execution = np.repeat(np.arange(servers)[:, None], layers, axis=1)
    if not home and rng.random() < 0.4:
        execution = rng.integers(0, servers, (servers, layers))
    asks = drawn_asks(
        rng, model, servers, ties=ties, most=most, spacing_s=float(rng.choice([0.3, 3]))
    )
    curves = [drawn_curves(rng, ties) for _ in range(2)]
    measured = {
        (f"s{n}", g): curves[int(rng.integers(2))]
        for n, server in enumerate(cluster.servers)
        for g in range(len(server.gpus))
    }
    return Scenario.build(
        place(
            model, cluster, drawn_held(rng, gpus, layers, experts, float(rng.choice([0, 0.2, 0.6])))
        ),
        make_requests(cluster, asks, layers, top_k),
        cluster,
        model,
        route=ROUTES[int(rng.integers(3))],
        calibration=Calibration("drawn", None, measured) if rng.random() < 0.7 else None,
        execution=execution.astype(np.int32),
        offload=offload,
        restarts=restarts,
    )


def contended_scenario(
    rng: np.random.Generator, *, ties: bool = False, home: bool = False, burst_kb: float = 0.0,
    short_kb: float = 0.0, restarts: bool = False,
) -> Scenario:  # fmt: skip
    """5 servers of 3 places, 15-20 requests, 2-4 layers; a message takes longer than its experts.

    Every expert is on one server only; ``ties`` and ``home`` as in :func:`drawn_scenario`.
    """
    servers, layers, experts = 5, int(rng.integers(2, 5)), int(rng.integers(5, 9))
    model = make_model(layers, experts, int(rng.integers(2, 4)))

    def rate_mbps() -> float:
        return 8e-6 * float(rng.choice([256, 512, 1024]) if ties else rng.uniform(250, 1000))

    link = Link(
        bandwidth_mbps=8e-6 * 1024,
        rtt_ms=float(rng.choice([0.0, 500.0]) if ties else rng.uniform(0, 500)),
        call_overhead_ms=float(rng.choice([0.0, 250.0]) if ties else rng.uniform(0, 200)),
        burst_kb=burst_kb,
        short_kb=short_kb,
    )
    cluster = make_cluster([1] * servers, link, concurrency=3)
    made = [
        dataclasses.replace(server, uplink_mbps=rate_mbps(), downlink_mbps=rate_mbps())
        for server in cluster.servers
    ]
    execution = np.repeat(np.arange(servers)[:, None], layers, axis=1)
    if not home and rng.random() < 0.4:
        execution = rng.integers(0, servers, (servers, layers))
    asks = drawn_asks(rng, model, servers, least=15, most=20, ties=ties, spacing_s=0.1)
    return make_scenario(
        model,
        dataclasses.replace(cluster, servers=tuple(made)),
        drawn_held(rng, servers, layers, experts, 0.0),
        asks,
        curves=drawn_curves(rng, ties),
        execution=execution.astype(np.int32),
        restarts=restarts,
    )
