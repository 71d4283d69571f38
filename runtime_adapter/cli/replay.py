"""``python -m runtime_adapter replay``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from prism_plan.cli.command_options import options_as
from runtime_adapter.cli.options import (
    MIGRATION_FACTS,
    MeetingOptions,
    MigrationOptions,
    jsonl,
    migration_options,
    note,
    note_assumed,
    rendezvous_options,
)

if TYPE_CHECKING:
    from prism_plan.simulate.routing_policies import Route


@dataclass(frozen=True, kw_only=True)
class ReplayOptions(MeetingOptions, MigrationOptions):
    """What ``replay`` is given."""

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
    "--route",
    type=click.Choice(["cover", "nearest", "spread"]),
    default="cover",
    show_default=True,
)
@click.option("--decode-tokens", default=32, show_default=True, metavar="N")
@migration_options
@click.option("--stats", metavar="S.json", help="Write what was counted.")
@click.option("-o", "--output", metavar="R.jsonl", help="One line a request; default: stdout.")
@options_as(ReplayOptions)
def command(given: ReplayOptions) -> None:
    """Drive this server's part of the machinery with recorded routing.

    All servers get the same files and options but for --server and -o. Messages are real; dense
    work and experts take the time that the cluster file says, without computing.
    """
    import json
    import time

    import torch

    from prism_plan.cli.inputs import error_source, load_cluster, require_writable_output
    from prism_plan.io.file_writing import write_bytes
    from prism_plan.io.placement import read_placement_and_identity
    from prism_plan.io.trace_reader import read_trace
    from prism_plan.simulate.sampling import sample_requests
    from runtime_adapter.replay import replay, replay_config
    from runtime_adapter.server import Server

    torch.set_num_threads(1)
    for output in (given.output, given.stats):
        require_writable_output(output, given.placement, given.trace, given.cluster)
    placement, placement_file = read_placement_and_identity(given.placement)
    rendezvous = given.rendezvous(placement.servers)
    trace = read_trace(given.trace)
    cluster, cluster_file = load_cluster(given.cluster)
    with error_source(given.cluster):
        requests = sample_requests(
            trace,
            cluster,
            requests_per_server=given.requests_per_server,
            decode_tokens=given.decode_tokens,
            seed=given.seed,
        )
    options = given.simulation(route=given.route, seed=given.seed)
    own = ("requests_per_server", "seed", "route", "decode_tokens", "rtt_ms", *MIGRATION_FACTS)
    facts = {
        "placement": placement_file.sha256,
        "trace": trace.sha256,
        "cluster": cluster_file.sha256,
    } | {name: getattr(given, name) for name in own}
    with error_source(given.placement):
        config = replay_config(
            placement,
            requests,
            cluster,
            trace.model,
            rendezvous,
            facts,
            route=given.route,
            rtt_s=given.rtt_ms * 1e-3,
            options=options if given.moves else None,
            placements_dir=given.placements_dir,
        )
    planned_by_links = given.route == "nearest" or given.migrate != "never"
    note_assumed(
        given.cluster, cluster, compute=True, loads=given.moves, links=planned_by_links
    )  # messages are real
    with jsonl(given.output) as write, Server(config, note) as server:
        begin_s = server.agree_on_start()
        began_s = time.time() + begin_s - time.monotonic()
        results = replay(server, requests, begin_s, lambda timings: write(timings.to_json()))
        server.finish()
        counted = server.counters.to_json()
        migrations = server.migrations()
    failed = sum(result.error is not None for result in results)
    if given.stats is not None:
        values = {
            "server": given.server,
            "requests": len(results),
            "failed": failed,
            "began_s": began_s,
            "lost": [name for m, name in enumerate(placement.servers) if server.table.lost(m)],
            "gpu_busy_s": config.compute.clock.busy_s(),  # type: ignore[attr-defined]
            **counted,
            "gpus": server.held(),
            "migrations": migrations,
        }
        write_bytes(given.stats, (json.dumps(values, indent=1) + "\n").encode())
    if failed:
        raise click.ClickException(f"{failed} of {len(results)} requests failed")
