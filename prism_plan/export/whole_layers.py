"""Exports a plan for one head to an engine of whole layers: the engine's file and the sidecar."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prism_plan.cluster import Cluster
from prism_plan.errors import Infeasible, InputError
from prism_plan.export import llamacpp, pipeline_partitions
from prism_plan.export.head_plans import HeadPlans
from prism_plan.export.stages import (
    Capacity,
    Stage,
    executes_at_home_of,
    gpus_of_held_layers,
    head_of,
    layers_held_elsewhere,
    partial_layer,
    stages,
)
from prism_plan.io.endpoints import RPC_PORT, EndpointTable
from prism_plan.io.export import (
    ExportFile,
    HeldPart,
    LayerEngine,
    SecondsPart,
    SharesPart,
    StagePart,
)
from prism_plan.model_spec import ModelSpec
from prism_plan.placement import Placement
from prism_plan.printable_text import listed
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
        plans = HeadPlans(
            request.trace, request.cluster, name, request.context,
            relayed=request.engine == "llamacpp",
        )  # fmt: skip
    plan, replanned = request.plan, _refusal(request, request.plan, head, plans)
    if replanned:
        if plans is None:
            raise InputError(
                replanned,
                source=request.plan_path,
                expected=f"whole layers, as {request.engine} has them",
                remedy="give ``trace`` and ``cluster``: it is planned again in whole layers",
            )
        plan = plans.whole_layers(lambda other: _refusal(request, other, head, plans))
    capacity = plans.capacity(plan) if plans is not None else None
    found: list[Stage] = []
    held: dict[int, tuple[int, int]] = {}
    if request.engine == "llamacpp" and _has_experts_elsewhere(request, plan, head):
        held = gpus_of_held_layers(plan, request.model, head, capacity)
    else:
        found = stages(plan, request.model, head, capacity)
    text, warnings = _file(request, plan, found, held, head)
    default = _default(request, found)
    seconds = shares = None
    if plans is None:
        warnings.append("memory was not checked: that needs ``trace`` and ``cluster``")
    else:
        shares = SharesPart(
            plan=plans.remote_share(request.plan),
            export=plans.share_of_layers(held),
            engine_default=0.0,  # of whole layers that execute where they are
        )
        whole = [stage.num_layers for stage in found]
        by_itself = None
        if default:
            if text_of_room := _default_does_not_fit(request, default, found, capacity):
                warnings.append(text_of_room)
            else:
                by_itself = plans.seconds_of_counts(default, found)
        seconds = SecondsPart(
            plan=plans.seconds(request.plan),
            export=plans.seconds_of_counts(whole, found) if found else plans.seconds_of_held(held),
            engine_default=by_itself,
        )
    sidecar = ExportFile(
        format="prism-plan/export",
        version=1,
        engine=request.engine,
        checked_with=_checked_with(request.engine),
        file=request.output,
        file_sha256=hashlib.sha256(text.encode()).hexdigest(),
        plan=request.plan_path,
        plan_sha256=request.plan_sha256,
        home=name,
        num_hidden_layers=request.model.num_decoder_layers,
        stages=[
            StagePart(server=plan.servers[s.server], gpu=s.gpu, first=s.first, last=s.last)
            for s in found
        ],
        held=[
            HeldPart(layer=layer, server=plan.servers[server], gpu=gpu)
            for layer, (server, gpu) in sorted(held.items())
        ],
        replanned=replanned or None,
        engine_default=default,
        expected_latency_s=seconds,
        remote_share=shares,
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


def _refusal(request: ExportRequest, plan: Placement, head: int, plans: HeadPlans | None) -> str:
    """Why the engine cannot have a plan, or empty."""
    if reason := partial_layer(plan, head):
        return reason
    if plans is not None and (reason := plans.broken_promise(plan)):
        return reason
    try:
        capacity = plans.capacity(plan) if plans is not None else None
        if _has_experts_elsewhere(request, plan, head):
            if request.engine == "llamacpp":
                gpus_of_held_layers(plan, request.model, head, capacity)
                return ""
            return f"all layers execute at {plan.servers[head]!r}, and experts lie on other servers"
        found = stages(plan, request.model, head, capacity)
    except Infeasible as error:
        return error.constraint
    if request.engine == "llamacpp":
        if len(found) >= llamacpp.MAX_DEVICES:
            return f"{len(found)} runs of layers, and llama.cpp takes {llamacpp.MAX_DEVICES - 1}"
        return ""
    return pipeline_partitions.not_contiguous(found, plan.servers)


def _default_does_not_fit(
    request: ExportRequest, default: Sequence[int], found: Sequence[Stage],
    capacity: Capacity | None,
) -> str:  # fmt: skip
    """Where the engine's own division puts more than a GPU has room for, or empty."""
    if capacity is None:
        return ""
    model, begin = request.model, 0
    for stage, count in zip(found, default, strict=True):
        layers = [at for at, n in enumerate(model.moe_layers) if begin <= n < begin + count]
        begin += count
        equal = model.equal_expert_bytes
        sizes = [1 if equal else model.expert_bytes_by_layer[at] for at in layers]
        needed, has = model.num_experts * sum(sizes), capacity[stage.server][stage.gpu]
        if needed > has:
            name = request.plan.servers[stage.server]
            return (
                f"by itself {request.engine} would put {count} layers on {name} "
                f"gpu[{stage.gpu}], which has no room for them"
            )
    return ""


def _file(
    request: ExportRequest, plan: Placement, found: Sequence[Stage],
    held: Mapping[int, tuple[int, int]], head: int,
) -> tuple[str, list[str]]:  # fmt: skip
    """The engine's file, and what whoever runs it should know."""
    name, servers = plan.servers[head], plan.servers
    comments = [
        f"{request.engine}: layers of requests of {name}, as {request.plan_path} plans them.",
        f"Written by prism-plan export; checked with {_checked_with(request.engine)}.",
    ]
    warnings = []
    heads = request.plan.plan.extra.get("heads")
    if isinstance(heads, list) and name not in heads:
        warnings.append(f"the plan was made for requests of {listed(map(str, heads))}")
    num_gpus = {server: len(gpus) for server, gpus in zip(servers, plan.gpu_capacity, strict=True)}
    if request.engine != "llamacpp":
        hosts = {servers[stage.server]: "" for stage in found}
        if request.engine != "trtllm-pp":
            hosts = {server: _host(request, server) for server in hosts}
            if len(set(hosts.values())) < len(hosts):
                raise InputError(
                    f"servers {listed(list(hosts))} at {listed(sorted(set(hosts.values())))}",
                    parameter="endpoints",
                    expected="a host of its own for each server: engines would share its GPUs",
                )
        order = ", ".join(f"{servers[stage.server]} gpu[{stage.gpu}]" for stage in found)
        warnings.append(f"ranks in order: {order}")
        by_machine = len(pipeline_partitions.nodes_of(found)) == len(hosts)
        if request.engine != "trtllm-pp" and not by_machine:
            warnings.append(
                f"{request.engine} has equally many ranks on each node, and machines have not: "
                "each GPU is a node of its own, which has not been run"
            )
        text = pipeline_partitions.partition_text(
            request.engine, found, servers, hosts, num_gpus, comments
        )
        return text, warnings
    gpus = [(stage.server, stage.gpu) for stage in found] + sorted(set(held.values()))
    endpoint = (request.endpoints or {}).get(name)
    own = None if endpoint is None else endpoint.devices
    if held and own is not None:
        gpus.insert(0, (head, 0))
    if held and own is None:
        warnings.append(
            f"{name} computes attention, and the experts that stay, on its CPU: give its devices "
            "in the endpoints for its GPU, which the expected seconds count on"
        )
    gpus = list(dict.fromkeys(gpus))
    used = dict.fromkeys(servers[server] for server, _ in gpus)
    devices = llamacpp.devices_of(
        [(servers[server], gpu) for server, gpu in gpus], name,
        {server: _host(request, server, of_head=server == name) for server in used},
        {server: _port(request, server) for server in used}, own, num_gpus,
    )  # fmt: skip
    of_gpu = dict(zip(gpus, devices, strict=True))
    warnings += [
        "an rpc-server serves one client at a time, trusts whoever reaches it, and encrypts "
        "nothing: keep its port inside a VPN",
        "llama-server ends when it loses an rpc-server",
    ]
    layers, context = request.model.num_decoder_layers, request.context
    if found:
        text = llamacpp.layers_script(found, of_gpu, servers, name, layers, context, comments)
    else:
        text = llamacpp.experts_script(held, of_gpu, servers, name, layers, context, comments)
    return text, warnings


def _host(request: ExportRequest, server: str, *, of_head: bool = False) -> str:
    """The host of a server; that ``of_head`` is only compared with others, and may be any name."""
    if request.endpoints is not None and server in request.endpoints:
        return request.endpoints[server].host
    if of_head or _HOST.fullmatch(server):
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
    request: ExportRequest, plan: Placement, found: Sequence[Stage],
    held: Mapping[int, tuple[int, int]], head: str,
) -> list[str]:  # fmt: skip
    """What to run where, as lines."""
    output = shlex.quote(request.output)
    if request.engine == "trtllm-pp":
        return [f"trtllm-serve MODEL --extra_llm_api_options {output}"]
    servers = dict.fromkeys(plan.servers[stage.server] for stage in found)
    servers |= dict.fromkeys(plan.servers[server] for server, _ in held.values())
    if request.engine != "llamacpp":
        return [f"on {server}: sh {output} {shlex.quote(server)}" for server in servers]
    lines = [f"on {name}: sh {output} {shlex.quote(name)}" for name in servers if name != head]
    endpoint = (request.endpoints or {}).get(head)
    if head in servers and (endpoint is None or endpoint.devices is None):
        lines.append(f"on {head}: sh {output} {shlex.quote(llamacpp.at_head_name(head))}")
    return [*lines, f"then on {head}: MODEL=model.gguf sh {output}"]
