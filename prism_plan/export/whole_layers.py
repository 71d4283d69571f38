"""Exports a plan for one head to an engine of whole layers: the engine's file and the sidecar."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prism_plan.cluster import Cluster
from prism_plan.errors import Infeasible, InputError
from prism_plan.export import llamacpp, pipeline_partitions
from prism_plan.export.head_plans import HeadPlans
from prism_plan.export.stages import (
    Stage,
    executes_at_home_of,
    head_of,
    layers_held_elsewhere,
    partial_layer,
    stages,
)
from prism_plan.io.endpoints import RPC_PORT, EndpointTable
from prism_plan.io.export import ExportFile, HeldPart, LayerEngine, SecondsPart, StagePart
from prism_plan.model_spec import ModelSpec
from prism_plan.placement import Placement
from prism_plan.trace import Trace

_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}")
ENGINES: tuple[LayerEngine, ...] = ("llamacpp", "vllm-pp", "sglang-pp", "trtllm-pp")


@dataclass(frozen=True)
class ExportRequest:
    """What is exported: ``plan`` of the file ``plan_path`` for the head ``home`` (or the only one).

    ``trace`` and ``cluster``, where they are given, are for planning again and for seconds;
    ``context`` are tokens of KV caches. ``output`` is the name of the engine's file.
    """

    engine: LayerEngine
    plan: Placement
    plan_path: str
    plan_sha256: str
    model: ModelSpec
    output: str
    home: str | None = None
    trace: Trace | None = None
    cluster: Cluster | None = None
    endpoints: Mapping[str, EndpointTable] | None = None
    context: int = 4096


def export_whole_layers(request: ExportRequest) -> tuple[str, ExportFile, Placement]:
    """The text of the engine's file, the sidecar, and the plan that they are of.

    Where the plan's layers are not whole, or lie otherwise than the engine can have them, they are
    planned again for the head.

    Raises
    ------
    InputError
        No head, no host of a server; or the plan has to be made again and trace or cluster are
        missing.
    Infeasible
        No plan of whole layers fits.
    UnsupportedFeature
        The engine cannot have it.
    """
    head = head_of(request.plan, request.home)
    name = request.plan.servers[head]
    plans = None
    if request.trace is not None and request.cluster is not None:
        plans = HeadPlans(request.trace, request.cluster, name, request.context)
    plan, replanned = request.plan, _refusal(request, request.plan, head)
    if replanned:
        if plans is None:
            raise InputError(
                replanned,
                source=request.plan_path,
                expected=f"whole layers, as {request.engine} has them",
                remedy="give ``trace`` and ``cluster``: it is planned again in whole layers",
            )
        plan = plans.whole_layers(lambda other: _refusal(request, other, head))
    at_home = request.engine == "llamacpp" and _has_experts_elsewhere(request, plan, head)
    found = [] if at_home else stages(plan, request.model, head)
    text, warnings = _file(request, plan, found, head)
    default = _default(request, found)
    seconds = None
    if plans is not None:
        whole = [stage.num_layers for stage in found]
        seconds = SecondsPart(
            plan=plans.seconds(request.plan),
            export=plans.seconds_of_counts(whole, found) if found else plans.seconds(plan),
            engine_default=plans.seconds_of_counts(default, found) if default else None,
        )
    held = layers_held_elsewhere(plan, request.model, head) if at_home else {}
    sidecar = ExportFile(
        format="prism-plan/export",
        version=1,
        engine=request.engine,
        checked_with=_checked_with(request.engine),
        file=request.output,
        plan=request.plan_path,
        plan_sha256=request.plan_sha256,
        home=name,
        num_hidden_layers=request.model.num_decoder_layers,
        stages=[
            StagePart(server=plan.servers[s.server], gpu=s.gpu, first=s.first, last=s.last)
            for s in found
        ],
        held=[HeldPart(layer=n, server=plan.servers[m]) for n, m in sorted(held.items())],
        replanned=replanned or None,
        engine_default=default,
        expected_latency_s=seconds,
        launch=_launch(request, plan, found, held, name),
        warnings=warnings,
    )
    return text, sidecar, plan


def _checked_with(engine: LayerEngine) -> str:
    if engine == "llamacpp":
        return llamacpp.CHECKED_WITH
    return pipeline_partitions.CHECKED_WITH[engine]


def _has_experts_elsewhere(request: ExportRequest, plan: Placement, head: int) -> bool:
    """Whether layers execute at the head, and experts of some lie elsewhere."""
    held = layers_held_elsewhere(plan, request.model, head)
    return executes_at_home_of(plan, head) and bool(held)


def _refusal(request: ExportRequest, plan: Placement, head: int) -> str:
    """Why the engine cannot have a plan, or empty."""
    if reason := partial_layer(plan, head):
        return reason
    if _has_experts_elsewhere(request, plan, head):
        if request.engine == "llamacpp":
            return ""
        return f"all layers execute at {plan.servers[head]!r}, and experts lie on other servers"
    try:
        found = stages(plan, request.model, head)
    except Infeasible as error:
        return str(error)
    if request.engine == "llamacpp":
        if len(found) >= llamacpp.MAX_DEVICES:
            return f"{len(found)} runs of layers, and llama.cpp takes {llamacpp.MAX_DEVICES - 1}"
        return ""
    return pipeline_partitions.not_contiguous(found, plan.servers)


def _file(
    request: ExportRequest, plan: Placement, found: Sequence[Stage], head: int
) -> tuple[str, list[str]]:
    """The engine's file, and what whoever runs it should know."""
    name = plan.servers[head]
    comments = [
        f"{request.engine}: layers of requests of {name}, as {request.plan_path} plans them.",
        f"Written by prism-plan export; checked with {_checked_with(request.engine)}.",
    ]
    if request.engine != "llamacpp":
        hosts = {plan.servers[stage.server]: "" for stage in found}
        if request.engine != "trtllm-pp":
            hosts = {server: _host(request, server) for server in hosts}
        order = " ".join(dict.fromkeys(plan.servers[stage.server] for stage in found))
        warnings = [f"ranks are GPUs in this order of servers: {order}"]
        text = pipeline_partitions.partition_text(
            request.engine, found, plan.servers, hosts, comments
        )
        return text, warnings
    held = {} if found else layers_held_elsewhere(plan, request.model, head)
    gpus = [(stage.server, stage.gpu) for stage in found]
    gpus += [(server, 0) for server in sorted(set(held.values()))]
    own = (
        request.endpoints[name].devices if request.endpoints and name in request.endpoints else None
    )
    if held and own is not None:
        gpus.insert(0, (head, 0))
    gpus = list(dict.fromkeys(gpus))
    devices = llamacpp.devices_of(
        [(plan.servers[server], gpu) for server, gpu in gpus], name,
        {plan.servers[server]: _host(request, plan.servers[server]) for server, _ in gpus},
        {plan.servers[server]: _port(request, plan.servers[server]) for server, _ in gpus}, own,
    )  # fmt: skip
    of_gpu = dict(zip(gpus, devices, strict=True))
    warnings = [
        "an rpc-server serves one client at a time, trusts whoever reaches it, and encrypts "
        "nothing: keep its port inside a VPN",
        "llama-server ends when it loses an rpc-server",
    ]
    layers, context = request.model.num_decoder_layers, request.context
    if found:
        text = llamacpp.layers_script(found, of_gpu, plan.servers, name, layers, context, comments)
    else:
        text = llamacpp.experts_script(held, of_gpu, plan.servers, name, layers, context, comments)
    return text, warnings


def _host(request: ExportRequest, server: str) -> str:
    if request.endpoints is not None and server in request.endpoints:
        return request.endpoints[server].host
    if _HOST.fullmatch(server):
        return server
    raise InputError(
        f"no host of server {server!r}",
        parameter="endpoints",
        expected="[[server]] with name, host and port for it, as its name is no host name",
    )


def _port(request: ExportRequest, server: str) -> int:
    if request.endpoints is not None and server in request.endpoints:
        return request.endpoints[server].port
    return RPC_PORT


def _default(request: ExportRequest, found: Sequence[Stage]) -> list[int] | None:
    """How many layers the engine would give these GPUs by itself, where it is known."""
    if not found:
        return None
    layers = request.model.num_decoder_layers
    if request.engine != "llamacpp":
        return pipeline_partitions.default_partition(request.engine, layers, len(found))
    if request.cluster is None or len({(s.server, s.gpu) for s in found}) < len(found):
        return None
    gpus = [request.cluster.servers[stage.server].gpus[stage.gpu] for stage in found]
    free = [gpu.memory_bytes if gpu.slots is None else gpu.slots for gpu in gpus]
    if any(gpu.slots is None for gpu in gpus) != all(gpu.slots is None for gpu in gpus):
        return None
    known = [size for size in free if size]
    return llamacpp.default_split(known, layers) if len(known) == len(free) else None


def _launch(
    request: ExportRequest, plan: Placement, found: Sequence[Stage], held: Mapping[int, int],
    head: str,
) -> list[str]:  # fmt: skip
    """What to run where, as lines."""
    if request.engine == "trtllm-pp":
        return [f"trtllm-serve MODEL --extra_llm_api_options {request.output}"]
    servers = dict.fromkeys(plan.servers[stage.server] for stage in found)
    servers |= dict.fromkeys(plan.servers[server] for server in held.values())
    others = [server for server in servers if server != head]
    if request.engine != "llamacpp":
        return [f"on {server}: sh {request.output} {server}" for server in servers]
    lines = [f"on {server}: sh {request.output} {server}" for server in others]
    if head in servers and not (request.endpoints and head in request.endpoints
                                and request.endpoints[head].devices):  # fmt: skip
        lines.append(f"on {head}: sh {request.output} '{head} rpc'")
    return [*lines, f"then on {head}: MODEL=model.gguf sh {request.output}"]
