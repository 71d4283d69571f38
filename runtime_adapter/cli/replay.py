"""The command ``prism-runtime replay``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from prism_plan.cli.options_dataclass import options_as
from runtime_adapter.cli.options import (
    MIGRATION_FACTS,
    MigrationOptions,
    RendezvousOptions,
    log_assumed_figures,
    migration_options,
    open_jsonl,
    rendezvous_options,
)
from runtime_adapter.log_output import log_info

if TYPE_CHECKING:
    from prism_plan.simulate.routing_policies import Route


@dataclass(frozen=True, kw_only=True)
class ReplayOptions(RendezvousOptions, MigrationOptions):
    """The options of ``replay``."""

    placement: str
    trace: str
    cluster: str
    requests_per_server: int
    seed: int
    route: Route
    decode_tokens: int
    stats: str | None
    output: str | None


@click.command("replay")
@click.option("--placement", required=True, metavar="P.json")
@click.option("--trace", required=True, metavar="T.parquet", help="Recorded routing.")
@click.option("--cluster", required=True, metavar="C.toml", help="Arrivals, and times of work.")
@rendezvous_options
@click.option(
    "--requests",
    "requests_per_server",
    default=10,
    show_default=True,
    metavar="N",
    help="Of each server.",
)
@click.option("--seed", default=0, show_default=True, help="Of arrivals and prompts.")
@click.option(
    "--route", type=click.Choice(["cover", "nearest", "spread"]), default="cover", show_default=True
)
@click.option("--decode-tokens", default=32, show_default=True, metavar="N")
@migration_options
@click.option("--stats", metavar="S.json", help="Write what was counted.")
@click.option("-o", "--output", metavar="R.jsonl", help="One line a request; default: stdout.")
@options_as(ReplayOptions)
def command(args: ReplayOptions) -> None:
    """Drive this server's part of the machinery with recorded routing.

    All servers get the same files and options but for --server and -o. Messages are real; dense
    work and experts take the time that the cluster file says, without computing. A server that
    comes back to a run serves the requests that arrive from then on.
    """
    import json
    import time

    import torch

    from prism_plan.cli.inputs import (
        error_source,
        load_cluster,
        require_distinct_outputs,
        require_writable_output,
    )
    from prism_plan.io.file_writing import write_bytes
    from prism_plan.io.placement import read_placement_and_identity
    from prism_plan.io.trace_reader import read_trace
    from prism_plan.simulate.sampling import sample_requests
    from runtime_adapter.replay import replay, replay_config
    from runtime_adapter.server import LocalServer
    from runtime_adapter.server_config import OwnStoreConfig
    from runtime_adapter.spans.request_path import PathCosts
    from runtime_adapter.spans.timed_spans import TimedSpans
    from runtime_adapter.transport.rendezvous import RuntimeFailure

    torch.set_num_threads(1)
    for output in (args.output, args.stats):
        require_writable_output(output, args.placement, args.trace, args.cluster)
    require_distinct_outputs(args.output, args.stats)
    placement, placement_file = read_placement_and_identity(args.placement)
    rendezvous = args.rendezvous(placement.servers)
    trace = read_trace(args.trace)
    cluster, cluster_file = load_cluster(args.cluster)
    with error_source(args.cluster):
        requests = sample_requests(
            trace,
            cluster,
            requests_per_server=args.requests_per_server,
            decode_tokens=args.decode_tokens,
            seed=args.seed,
        )
    simulation_options = args.simulation(route=args.route, seed=args.seed)
    names = ("requests_per_server", "seed", "route", "decode_tokens", "rtt_ms", *MIGRATION_FACTS)
    facts = {
        "placement": placement_file.sha256,
        "trace": trace.sha256,
        "cluster": cluster_file.sha256,
    } | {name: getattr(args, name) for name in names}
    with error_source(args.placement):
        config = replay_config(
            placement,
            requests,
            cluster,
            trace.model,
            rendezvous,
            facts,
            route=args.route,
            rtt_s=args.rtt_ms * 1e-3,
            options=simulation_options,
            movable=args.migrates,
            request_timeout_s=args.request_timeout_s,
            store=OwnStoreConfig(
                args.secret_file,
                args.insecure,
                args.placements_dir,
                None if args.migrate == "never" else args.trace,
            ),
            log_level=args.log_level,
            log_format=args.log_format,
        )
    work = TimedSpans(requests, config.width)
    planned_by_links = args.route == "nearest" or args.migrate != "never"
    log_assumed_figures(
        args.cluster, cluster, compute=True, loads=args.migrates, links=planned_by_links
    )  # messages are real
    with open_jsonl(args.output) as write, LocalServer(config, log_info, work=work) as server:
        server.path_requests.costs = PathCosts.of(cluster, trace.model)
        begin_s = server.agree_on_start()
        began_s = time.time() + begin_s - time.monotonic()
        joined_s = time.monotonic() - begin_s if server.joined_later else 0.0
        results = replay(server, requests, begin_s, lambda result: write(vars(result)), joined_s)
        server.finish()
        counted = server.counters.to_json()
        migrations = server.migrations()
    failed = sum(result.error is not None for result in results)
    if args.stats is not None:
        values = {
            "server": args.server,
            "requests": len(results),
            "failed": failed,
            "began_s": began_s,
            "joined_s": joined_s,
            "lost": server.lost_servers(),
            "gpu_busy_s": config.compute.clock.busy_s(),  # type: ignore[attr-defined]
            **counted,
            "gpus": server.held_experts(),
            "migrations": migrations,
        }
        write_bytes(args.stats, (json.dumps(values, indent=1) + "\n").encode())
    if failed:
        raise RuntimeFailure(f"{failed} of {len(results)} requests failed; see their errors")
