"""Exports a plan as an expert map: the engine's file and the sidecar."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prism_plan.cluster import Cluster
from prism_plan.errors import UnsupportedFeature
from prism_plan.export.engine_memory import with_dense_on_every_gpu
from prism_plan.export.expert_maps.equal_slots import EqualSlots, equal_slots
from prism_plan.export.expert_maps.map_files import CHECKED_WITH, map_text
from prism_plan.export.expert_maps.map_seconds import map_seconds
from prism_plan.export.expert_maps.projection import (
    ExpertMap,
    engines_own,
    local_with_equal_slots,
    project,
)
from prism_plan.export.expert_maps.replica_rules import nodes_of
from prism_plan.export.pipeline_partitions import MEETING_PORT, SGLANG_PORT
from prism_plan.instance import Instance
from prism_plan.io.export import ExportFile, MapEngine, SecondsPart, SharesPart
from prism_plan.objective import remote_score
from prism_plan.placement import Placement
from prism_plan.solvers.latency.problem import LatencyProblem
from prism_plan.solvers.run import solve
from prism_plan.trace import Trace

#: So many numbers of slots are looked at, of engines that call replicas past a local one.
NUMBERS_OF_SLOTS = 9
ENGINES: tuple[MapEngine, ...] = ("sglang", "vllm-ascend", "trtllm")
NO_ALL_TO_ALL = (
    "without an all-to-all back end (DeepEP and its kind) this map saves no traffic, and over "
    "Ethernet a pipeline partition is the better export (vllm-pp, sglang-pp, trtllm-pp)"
)


@dataclass(frozen=True)
class MapRequest:
    """What is exported: ``plan`` of the file ``plan_path``, for the calls of trace and cluster.

    ``slots`` of a rank in each layer; by default what the smallest GPU has.
    """

    engine: MapEngine
    plan: Placement
    plan_path: str
    plan_sha256: str
    trace: Trace
    cluster: Cluster
    output: str
    slots: int | None = None


def export_map(request: MapRequest) -> tuple[str, ExportFile]:
    """The text of the engine's file, and the sidecar.

    The map is the best one of the engine's shape under its own choice of replicas, not the plan cut
    to fit: the plan is what its remote share is compared with.

    Raises
    ------
    InputError
        More slots are asked for than there are.
    Infeasible
        Equal slots do not hold all experts of a layer.
    UnsupportedFeature
        Experts of unequal size, rules of the cluster, or too many ranks.
    """
    model = request.trace.model
    if not model.equal_expert_bytes:
        raise UnsupportedFeature("an expert map has slots of one size, and the experts have not")
    cluster = dataclasses.replace(
        request.cluster,
        servers=tuple(
            with_dense_on_every_gpu(server, model, server.kv_tokens)
            for server in request.cluster.servers
        ),
    )
    instance = Instance.build(request.trace, cluster)
    if instance.has_rules:
        raise UnsupportedFeature(
            "an expert map is planned without pinned experts, forbidden experts and layer caps; "
            "take them out of the cluster file if the map may be without them"
        )
    calls = instance.activations
    found, shape = _best_map(request, instance)
    text = map_text(request.engine, found.physical, model)
    own = engines_own(shape, calls, request.engine)
    plan = remote_score(calls, request.plan.local_to_execution).share
    memory, layers = _restricted(instance, shape)
    names = [request.plan.servers[server] for server in shape.ranks]
    sidecar = ExportFile(
        format="prism-plan/export",
        version=1,
        engine=request.engine,
        checked_with=CHECKED_WITH[request.engine],
        file=request.output,
        file_sha256=hashlib.sha256(text.encode()).hexdigest(),
        plan=request.plan_path,
        plan_sha256=request.plan_sha256,
        home=None,
        num_hidden_layers=model.num_decoder_layers,
        stages=[],
        held=[],
        replanned=None,
        engine_default=None,
        expected_latency_s=_seconds(request, instance, shape, found, own),
        ranks=names,
        slots=shape.slots,
        remote_share=SharesPart(
            plan=plan, equal_memory=memory, equal_slots=layers, export=found.share,
            bound=found.bound, engine_default=own.share,
        ),
        launch=_launch(request, shape, names),
        warnings=[NO_ALL_TO_ALL, *_of_engine(request.engine, shape)],
    )  # fmt: skip
    return text, sidecar


def _best_map(request: MapRequest, instance: Instance) -> tuple[ExpertMap, EqualSlots]:
    """The best map of the slots that are asked for, or of any number of slots that GPUs have.

    Where replicas are called past one on the caller's own server, more of them may be worse.
    """
    model = instance.model
    shape = equal_slots(instance.gpu_capacity, model.num_layers, model.num_experts, request.slots)
    best = project(request.engine, shape, instance.activations), shape
    if request.slots is None and request.engine != "sglang":
        least = -(-model.num_experts // len(shape.ranks))
        for slots in np.unique(np.linspace(least, shape.slots, NUMBERS_OF_SLOTS, dtype=int)):
            fewer = dataclasses.replace(shape, slots=int(slots))
            found = project(request.engine, fewer, instance.activations)
            if found.share < best[0].share - 1e-9:
                best = found, fewer
    return best


def _restricted(instance: Instance, shape: EqualSlots) -> tuple[float, float]:
    """Remote share with equal memory for every GPU, and with equal slots in every layer too.

    Both of an engine that finds a copy on the caller's server, wherever it is there.
    """
    smallest = min(capacity for gpus in instance.gpu_capacity for capacity in gpus)
    memory = instance.replace(
        gpu_capacity=tuple(tuple(smallest for _ in gpus) for gpus in instance.gpu_capacity)
    )
    slots = local_with_equal_slots(shape, instance.activations)
    return (
        float(solve(memory, "exact").plan.remote_share or 0.0),
        remote_score(instance.activations, slots).share,
    )


def _seconds(
    request: MapRequest, instance: Instance, shape: EqualSlots, found: ExpertMap, own: ExpertMap
) -> SecondsPart:
    """Expected seconds of a mean request under the plan, the export, and the engine's own map."""
    problem = LatencyProblem(instance, request.cluster, request.trace, seed=0)
    export, default = (
        map_seconds(request.engine, one.physical, shape.ranks, problem) for one in (found, own)
    )
    plan = float(problem.expected(request.plan).mean_s)
    return SecondsPart(plan=plan, export=export, engine_default=default)


def _of_engine(engine: MapEngine, shape: EqualSlots) -> list[str]:
    """What whoever starts the engine should know."""
    own = "the share counts requests of each server's users at ranks of that server: "
    if engine == "vllm-ascend":
        return [
            f"{own}ask each machine's own address (--data-parallel-hybrid-lb)",
            "vLLM-Ascend loads the file with its first model runner alone (MRv1)",
        ]
    if engine == "trtllm":
        return [
            f"{own}the engine's balancing may send them elsewhere",
            "TensorRT-LLM ignores the file for models that its load balancer does not know",
        ]
    found = [f"{own}give them routed_dp_rank, for SGLang's balancing spreads them over all ranks"]
    if _servers_are_nodes(shape):
        return found
    return [
        *found,
        "SGLang's nodes have equally many GPUs: each GPU is started as a node of its own, which "
        "has not been run; the share counts calls between GPUs of a server as SGLang then makes "
        "them",
    ]


def _servers_are_nodes(shape: EqualSlots) -> bool:
    return bool((nodes_of(shape.ranks) == np.array(shape.ranks)).all())


def _launch(request: MapRequest, shape: EqualSlots, names: Sequence[str]) -> list[str]:
    """What to run where, as lines."""
    ranks = len(shape.ranks)
    order = f"ranks in this order of servers: {' '.join(names)}"
    if request.engine == "trtllm":
        return [
            f"trtllm-serve MODEL --tp_size {ranks} --ep_size {ranks} --extra_llm_api_options "
            f"options.yaml, with moe_config: {{load_balancer: {request.output}}} and "
            "enable_attention_dp: true in it, by your launcher",
            order,
        ]
    by_server = [(name, len(list(own))) for name, own in itertools.groupby(names)]
    first = shlex.quote(names[0])
    if request.engine == "vllm-ascend":
        given = json.dumps({"eplb_config": {"expert_map_path": request.output}})
        begins = itertools.accumulate((own for _, own in by_server), initial=0)
        return [
            f"on {name}: vllm serve MODEL --data-parallel-size {ranks} --data-parallel-size-local "
            f"{own} --data-parallel-start-rank {begin} --data-parallel-address {first} "
            "--data-parallel-rpc-port 13345 --data-parallel-hybrid-lb --tensor-parallel-size 1 "
            f"--enable-expert-parallel --additional-config {shlex.quote(given)}"
            for (name, own), begin in zip(by_server, begins, strict=False)
        ]
    nodes = [(name, "", 0) for name, _ in by_server]
    if not _servers_are_nodes(shape):
        nodes = [
            (name, f"CUDA_VISIBLE_DEVICES={gpu} " if own > 1 else "", gpu)
            for name, own in by_server
            for gpu in range(own)
        ]
    redundant = shape.physical - request.trace.model.num_experts
    return [
        f"on {name}: {visible}python3 -m sglang.launch_server --model-path MODEL --tp-size {ranks} "
        f"--ep-size {ranks} --dp-size {ranks} --enable-dp-attention --moe-a2a-backend deepep "
        f"--nnodes {len(nodes)} --node-rank {number} --dist-init-addr {first}:{MEETING_PORT} "
        f"--init-expert-location {shlex.quote(request.output)} --ep-num-redundant-experts "
        f"{redundant} --ep-dispatch-algorithm static"
        + (f" --port {SGLANG_PORT + before}" if before else "")
        for number, (name, visible, before) in enumerate(nodes)
    ]
