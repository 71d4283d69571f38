"""``prism-plan export``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import click

from prism_plan.cli.inputs import ENGINES
from prism_plan.cli.options_dataclass import CommandOptions, options_as
from prism_plan.errors import InputError, did_you_mean
from prism_plan.input_limits import require_integer

if TYPE_CHECKING:
    from prism_plan.cluster import Cluster
    from prism_plan.io.export import Engine, ExportFile, LayerEngine, MapEngine
    from prism_plan.model_spec import ModelSpec
    from prism_plan.placement import Placement
    from prism_plan.trace import Trace

MAP_ENGINES = ENGINES[4:]


@dataclass(frozen=True, kw_only=True)
class ExportOptions(CommandOptions):
    """The options and arguments of ``prism-plan export``."""

    placement: str
    engine: Engine
    trace: str | None
    cluster: str | None
    model: str | None
    home: str | None
    endpoints: str | None
    context: int
    slots: int | None
    output: str

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer(self.context, 1, 1 << 24, "context")
        if self.output == "-":
            raise InputError(
                "-", parameter="output", expected="a file, for a second one is written beside it"
            )
        if self.engine in MAP_ENGINES:
            found = f"has no effect on {self.engine}, whose map is for all servers"
            self.refuse("home", "endpoints", "context", "model", found=found)
            for name in ("trace", "cluster"):
                if getattr(self, name) is None:
                    raise InputError(
                        f"not given, and a map of {self.engine} is planned for calls",
                        parameter=name,
                        expected="``trace`` and ``cluster``",
                    )
            return
        if self.trace is not None:
            self.refuse("model", found="has no effect with ``trace``, which says the model")
        else:
            self.refuse("cluster", found="has no effect without ``trace``")
        if self.engine == "trtllm-pp":
            self.refuse("endpoints", found=f"has no effect on {self.engine}, which names no host")
        if self.cluster is None and self.engine != "llamacpp":
            self.refuse("context", found="has no effect without ``trace`` and ``cluster``")
        self.refuse("slots", found=f"has no effect on {self.engine}, only on expert maps")
        if self.trace is None and self.model is None:
            raise InputError(
                "how many decoder layers the model has is not known",
                parameter="model",
                expected="``model`` or ``trace``",
            )


@click.command("export")
@click.argument("placement", metavar="P.json")
@click.option(
    "--engine",
    required=True,
    type=click.Choice(ENGINES),
    help="llama.cpp over RPC; pipeline partitions (-pp); expert maps (sglang, vllm-ascend, "
    "trtllm), which need --trace and --cluster.",
)
@click.option("--home", metavar="NAME", help="The head: whose requests the engine serves.")
@click.option("--trace", metavar="T.parquet", help="To plan again in whole layers, and for times.")
@click.option("--cluster", metavar="C.toml", help="Likewise.")
@click.option("--model", metavar="MODEL", help="Instead of --trace: a model's sizes.")
@click.option("--endpoints", metavar="F.toml", help="Hosts and ports; default: servers' names.")
@click.option(
    "--ctx",
    "context",
    default=4096,
    show_default=True,
    metavar="N",
    help="Tokens of the head's KV caches, in place of its kv_tokens.",
)
@click.option(
    "--slots", type=int, metavar="S", help="Of expert maps: slots of a rank in each layer."
)
@click.option("-o", "--output", required=True, metavar="OUT", help="File of the engine.")
@options_as(ExportOptions)
def command(args: ExportOptions) -> None:
    """Write a plan for an engine, and OUT.export.json beside it.

    llama.cpp and pipelines serve one head. A plan whose layers are not whole, or not where the
    engine can have them, is planned again for the head, with --trace and --cluster. OUT is a script
    for all machines (of trtllm-pp a file of options). An expert map is the best one of equal slots
    under the engine's own choice of replicas. The second file says what was lost, and what the
    engine would have done by itself.
    """
    from prism_plan.check.report import cluster_mismatches
    from prism_plan.cli.console import load_trace, log_info, write_output
    from prism_plan.cli.inputs import (
        error_source,
        load_cluster,
        read_model_spec,
        require_distinct_outputs,
        require_writable_output,
    )
    from prism_plan.export.expert_maps.export_map import MapRequest, export_map
    from prism_plan.io.export import SIDECAR, dump_export
    from prism_plan.io.placement import read_placement_and_identity
    from prism_plan.model_spec import require_same_model

    inputs = [args.placement, args.trace, args.cluster, args.endpoints]
    if args.model is not None:
        inputs += [args.model, os.path.join(args.model, "config.json")]
    files = (args.output, args.output + SIDECAR)
    for output in files:
        require_writable_output(output, *(path for path in inputs if _is_file(path)))
        if os.path.lexists(output) and not os.path.isfile(output):
            raise InputError("no regular file", source=output, expected="one, or a new name")
    require_distinct_outputs(*files)
    plan, identity = read_placement_and_identity(args.placement)
    trace = None if args.trace is None else load_trace(args.trace)
    cluster = None if args.cluster is None else load_cluster(args.cluster)[0]
    model = read_model_spec(args.model) if trace is None and args.model else None
    if trace is not None:
        model = trace.model
    assert model is not None
    require_same_model(
        plan.model, model.shape(), source=args.placement, other=args.trace or args.model
    )
    if cluster is not None:
        if tuple(s.name for s in cluster.servers) != plan.servers:
            raise InputError(
                f"servers {', '.join(s.name for s in cluster.servers)}",
                source=args.cluster,
                expected=f"{', '.join(plan.servers)}, as in {args.placement}",
            )
        of_layers = (
            args.engine not in MAP_ENGINES
        )  # of maps a plan is what shares are compared with
        for problem in cluster_mismatches(plan, cluster)[: int(of_layers)]:
            raise InputError(problem, source=args.placement, remedy=f"plan it for {args.cluster}")
    with error_source(args.cluster or args.placement):
        if trace is not None and cluster is not None and args.engine in MAP_ENGINES:
            text, sidecar = export_map(
                MapRequest(
                    cast("MapEngine", args.engine), plan, args.placement, identity.sha256, trace,
                    cluster, args.output, args.slots,
                )
            )  # fmt: skip
        else:
            text, sidecar = _of_layers(args, plan, identity.sha256, model, trace, cluster)
    write_output(args.output + SIDECAR, dump_export(sidecar))  # whose name is longer
    write_output(args.output, text.encode())
    for line in _lines(sidecar):
        log_info(line)


def _is_file(path: str | None) -> bool:
    return path is not None and os.path.isfile(path)


def _of_layers(
    args: ExportOptions, plan: Placement, sha256: str, model: ModelSpec, trace: Trace | None,
    cluster: Cluster | None,
) -> tuple[str, ExportFile]:  # fmt: skip
    """An export to an engine of whole layers: its file and the sidecar."""
    from prism_plan.export.whole_layers import ExportRequest, export_whole_layers
    from prism_plan.io.endpoints import read_endpoints

    endpoints = None if args.endpoints is None else read_endpoints(args.endpoints)
    for name in endpoints or ():
        if name not in plan.servers:
            raise InputError(
                f"unknown server {name!r:.60}{did_you_mean(name, plan.servers)}",
                source=args.endpoints,
                expected=f"some of {', '.join(plan.servers)}",
            )
    for name, endpoint in (endpoints or {}).items():
        gpus = len(plan.gpu_capacity[plan.servers.index(name)])
        if endpoint.devices is not None and len(endpoint.devices) != gpus:
            raise InputError(
                f"{len(endpoint.devices)} devices of {name!r}", source=args.endpoints,
                place="devices", expected=f"{gpus}, one for each of its GPUs",
            )  # fmt: skip
    text, sidecar, _ = export_whole_layers(
        ExportRequest(
            cast("LayerEngine", args.engine), plan, args.placement, sha256, model, args.output,
            args.home, trace, cluster, endpoints, args.context,
        )
    )  # fmt: skip
    return text, sidecar


def _lines(sidecar: ExportFile) -> list[str]:
    """What is told of an export."""
    lines = []
    if sidecar.replanned is not None:
        lines.append(f"planned again in whole layers: {sidecar.replanned}")
    for stage in sidecar.stages:
        layers = f"layer {stage.first}"
        if stage.last > stage.first:
            layers = f"layers {stage.first} to {stage.last}"
        lines.append(f"{layers}: {stage.server} gpu[{stage.gpu}]")
    by_server: dict[str, list[str]] = {}
    for held in sidecar.held:
        by_server.setdefault(f"{held.server} gpu[{held.gpu}]", []).append(str(held.layer))
    lines += [f"experts of layers {', '.join(n)}: {server}" for server, n in by_server.items()]
    seconds = sidecar.expected_latency_s
    if seconds is not None:
        text = f"expected {seconds.export:.3g} s a request"
        if seconds.plan is not None and abs(seconds.plan - seconds.export) > 1e-3 * seconds.plan:
            text += f" (the plan {seconds.plan:.3g} s)"
        if seconds.engine_default is not None:
            text += f"; by itself {sidecar.engine} would take {seconds.engine_default:.3g} s"
        lines.append(text)
    shares = sidecar.remote_share
    if shares is not None and sidecar.ranks:
        lines.insert(
            0,
            f"{len(sidecar.ranks)} ranks of {sidecar.slots} slots a layer: {shares.export:.2%} of "
            f"calls are remote (no such map has fewer than {shares.bound:.2%}); the plan "
            f"{shares.plan:.2%}, with equal memory {shares.equal_memory:.2%}, with equal slots "
            f"{shares.equal_slots:.2%}; by itself {sidecar.engine} would have "
            f"{shares.engine_default:.2%}",
        )
    return [*lines, *sidecar.warnings, *sidecar.launch]
