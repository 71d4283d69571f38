"""``python -m runtime_adapter calibrate``."""

from __future__ import annotations

from dataclasses import dataclass

import click

from prism_plan.cli.command_options import options_as
from runtime_adapter.cli.options import MeetingOptions, note, note_assumed, rendezvous_options


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(MeetingOptions):
    """What ``calibrate`` is given."""

    model: str
    cluster: str
    output: str | None


@click.command("calibrate")
@click.option("--model", required=True, metavar="PRESET|config.json")
@click.option("--cluster", required=True, metavar="C.toml")
@rendezvous_options
@click.option("-o", "--output", metavar="F.json", help="Of the first server: the calibration.")
@options_as(CalibrateOptions)
def command(given: CalibrateOptions) -> None:
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
    from runtime_adapter.calibrate import TOKENS, calibration, calibration_placement, measure
    from runtime_adapter.moe.compute import TimedCompute
    from runtime_adapter.moe.emulated_gpu import GpuClock, sharp_timers
    from runtime_adapter.server import Server, ServerConfig

    torch.set_num_threads(1)
    cluster, cluster_file = load_cluster(given.cluster)
    model = read_model_spec(given.model)
    rendezvous = given.rendezvous(tuple(server.name for server in cluster.servers))
    if rendezvous.world_size < 2:
        raise InputError("1 server", source=given.cluster, expected="two servers or more")
    if rendezvous.rank == 0 and given.output is None:
        raise InputError("no file to write", parameter="output", expected="-o F.json")
    if 2 * model.top_k > model.num_experts:
        raise InputError(
            f"top-{model.top_k} of {model.num_experts} experts",
            parameter="model",
            expected="twice as many experts as a token calls",
        )
    require_writable_output(given.output, given.cluster)
    placement = calibration_placement(cluster, model)
    first = sum(len(server.gpus) for server in cluster.servers[: rendezvous.rank])
    own = cluster.servers[rendezvous.rank]
    with error_source(given.cluster):
        times = timing(cluster, model, max(TOKENS))
        network = Network.of(cluster, model)
    note_assumed(given.cluster, cluster, compute=True)
    compute = TimedCompute(
        times,
        GpuClock(len(own.gpus)),
        model.num_experts,
        first,
        first + own.dense_gpu,
        rendezvous.rank,
    )
    width = model.hidden_size * model.dtype_bytes
    config = ServerConfig(
        rendezvous=rendezvous,
        placement=placement,
        model=model.shape(),
        network=network,
        compute=compute,
        facts={"cluster": cluster_file.sha256, "rtt_ms": given.rtt_ms, "lanes": [1]},
        states=torch.uint8,
        width=width,
        most_tokens=max(TOKENS),
        rtt_s=given.rtt_ms * 1e-3,
    )
    with Server(config, note) as server:
        server.agree_on_start()
        if rendezvous.rank == 0:
            sharp_timers()
            found = measure(server.lanes[0], dataclasses.replace(model), width)
            values = calibration(found, cluster, model, config.rtt_s)
            write_bytes(str(given.output), (json.dumps(values, indent=1) + "\n").encode())
            note(
                f"{given.output}: call overhead {values['call_overhead_ms']:.3f} ms, "
                f"{values['bandwidth_mbps']:.0f} Mbit/s"
            )
        server.finish()
