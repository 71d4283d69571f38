"""The command ``prism-runtime calibrate``."""

from __future__ import annotations

from dataclasses import dataclass

import click

from prism_plan.cli.options_dataclass import options_as
from runtime_adapter.cli.options import (
    RendezvousOptions,
    log_assumed_figures,
    rendezvous_options,
)
from runtime_adapter.log_output import log_info


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(RendezvousOptions):
    """The options of ``calibrate``."""

    model: str
    cluster: str
    output: str | None


@click.command("calibrate")
@click.option("--model", required=True, metavar="PRESET|config.json")
@click.option("--cluster", required=True, metavar="C.toml")
@rendezvous_options
@click.option("-o", "--output", metavar="F.json", help="Of the first server: the calibration.")
@options_as(CalibrateOptions)
def command(args: CalibrateOptions) -> None:
    """Measure the times that `prism-plan simulate --calibration` reads.

    Start it on every server of the cluster file; the first one measures and writes the file.
    """
    import dataclasses
    import json

    import torch

    from prism_plan.cli.inputs import (
        error_source,
        load_cluster,
        read_model_spec,
        require_writable_output,
    )
    from prism_plan.errors import InputError
    from prism_plan.io.file_writing import write_bytes
    from prism_plan.simulate.network import Network
    from prism_plan.simulate.timing import timing
    from runtime_adapter.calibrate import (
        TOKENS,
        EmptySpans,
        calibration,
        calibration_placement,
        measure,
        measure_hops,
    )
    from runtime_adapter.moe.emulated_gpu import GpuClock, set_sharp_timers
    from runtime_adapter.moe.timed_work import TimedCompute, TimedLoader
    from runtime_adapter.server import LocalServer
    from runtime_adapter.server_config import MigrationConfig, OwnStoreConfig, ServerConfig

    torch.set_num_threads(1)
    cluster, cluster_file = load_cluster(args.cluster)
    model = read_model_spec(args.model)
    rendezvous = args.rendezvous(tuple(server.name for server in cluster.servers))
    if rendezvous.world_size < 2:
        raise InputError("1 server", source=args.cluster, expected="two servers or more")
    if rendezvous.rank == 0 and args.output is None:
        raise InputError("no file to write", parameter="output", expected="-o F.json")
    if 2 * model.top_k > model.num_experts:
        raise InputError(
            f"top-{model.top_k} of {model.num_experts} experts",
            parameter="model",
            expected="twice as many experts as a token calls",
        )
    require_writable_output(args.output, args.cluster)
    placement = calibration_placement(cluster, model)
    first_gpu, *more_gpus = placement.gpus_of(rendezvous.rank).tolist()
    with error_source(args.cluster):
        times = timing(cluster, model, max(TOKENS))
        network = Network.of(cluster, model)
    log_assumed_figures(args.cluster, cluster, compute=True)
    compute = TimedCompute(
        times,
        GpuClock(1 + len(more_gpus)),
        model.num_experts,
        first_gpu,
        first_gpu + cluster.servers[rendezvous.rank].dense_gpu,
        rendezvous.rank,
    )
    width = model.hidden_size * model.dtype_bytes
    config = ServerConfig(
        rendezvous=rendezvous,
        placement=placement,
        model=model.shape(),
        network=network,
        compute=compute,
        migration=MigrationConfig(TimedLoader(compute, [[]], [False])),  # nothing is loaded
        facts={
            "cluster": cluster_file.sha256,
            "rtt_ms": args.rtt_ms,
            "lanes": [1] * rendezvous.world_size,
        },
        dtype=torch.uint8,
        width=width,
        max_tokens=max(TOKENS),
        rtt_s=args.rtt_ms * 1e-3,
        request_timeout_s=args.request_timeout_s,
        store=OwnStoreConfig(args.secret_file, args.insecure),
        log_level=args.log_level,
        log_format=args.log_format,
    )
    with LocalServer(config, log_info, work=EmptySpans(width)) as server:
        server.agree_on_start()
        if rendezvous.rank == 0:
            set_sharp_timers()
            measured = measure(server.lanes[0], model, width)
            if model.num_layers > 1:
                pass_s = measure_hops(server.path_requests, model.num_layers)
                measured = dataclasses.replace(measured, pass_s=pass_s)
            values = calibration(measured, cluster, model, config.rtt_s)
            write_bytes(str(args.output), (json.dumps(values, indent=1) + "\n").encode())
            log_info(
                f"{args.output}: call overhead {values['call_overhead_ms']:.3f} ms, hop "
                f"{values.get('hop_overhead_ms', values['call_overhead_ms']):.3f} ms, "
                f"{values['bandwidth_mbps']:.0f} Mbit/s"
            )
        server.finish()
