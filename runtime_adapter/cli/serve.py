"""``python -m runtime_adapter serve``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import click

from prism_plan.cli.command_options import options_as
from prism_plan.errors import InputError
from prism_plan.limits import require_integer
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
    from collections.abc import Iterable

    from prism_plan.simulate.routing_policies import Route
    from runtime_adapter.driver import Job


@dataclass(frozen=True, kw_only=True)
class ServeOptions(MeetingOptions, MigrationOptions):
    """What ``serve`` is given."""

    placement: str
    checkpoint: str
    requests: str
    max_prompt_tokens: int | None
    max_new_tokens: int
    dtype: str
    device: str
    transport: Literal["gloo", "nccl", "split"]
    route: Route
    cluster: str | None
    concurrency: int
    threads: int
    weights: Literal["checkpoint", "peer"]
    seed: int
    stats: str | None
    output: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer(self.max_new_tokens, 1, 1 << 20, "max_new_tokens")
        require_integer(self.concurrency, 1, 256, "concurrency")
        require_integer(self.threads, 1, 1024, "threads")
        if self.cluster is None:
            for name in ("route", "migrate"):
                if getattr(self, name) in ("nearest", "prism", "partial"):
                    raise InputError(
                        f"{getattr(self, name)} needs to know the links",
                        parameter=name,
                        expected="``cluster``",
                    )
        if not self.moves:
            self.refuse("weights", found="has no effect without ``migrate`` or ``movable``")
        if not self.streamed:
            self.refuse(
                "max_prompt_tokens",
                found="given with a file of requests, whose longest prompt is known",
                remedy="leave it out, or use ``requests`` -",
            )

    @property
    def streamed(self) -> bool:
        """Whether requests come by standard input."""
        return self.requests == "-"


@click.command("serve")
@click.option("--placement", required=True, metavar="P.json")
@click.option("--checkpoint", required=True, metavar="DIR", help="config.json, *.safetensors, ...")
@click.option(
    "--requests",
    required=True,
    metavar="R.jsonl",
    help="Of this server; may be empty. -: standard input, served as they come.",
)
@rendezvous_options
@click.option(
    "--max-prompt-tokens",
    type=int,
    metavar="N",
    help="Longest prompt on standard input; default: 512, or the model's context.",
)
@click.option("--max-new-tokens", default=32, show_default=True, metavar="N")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="auto: as the checkpoint has it.",
)
@click.option(
    "--device", default="auto", show_default=True, metavar="D", help="auto, cpu, cuda or cuda:N."
)
@click.option(
    "--transport",
    type=click.Choice(["gloo", "nccl", "split"]),
    default="gloo",
    show_default=True,
    help="nccl: states go from card to card; split: nccl's protocol over gloo, to try it.",
)
@click.option(
    "--route",
    type=click.Choice(["cover", "nearest", "spread"]),
    default="cover",
    show_default=True,
)
@click.option("--cluster", metavar="C.toml", help="Links, for --route nearest and --migrate.")
@click.option(
    "--concurrency", default=1, show_default=True, metavar="C", help="Requests of a server at once."
)
@click.option("--threads", default=1, show_default=True, metavar="T", help="CPU threads of a step.")
@migration_options
@click.option(
    "--weights",
    type=click.Choice(["checkpoint", "peer"]),
    default="checkpoint",
    show_default=True,
    help="Where experts that move come from; peer: from a server that holds them, if it can.",
)
@click.option("--seed", default=0, show_default=True, help="Of the solvers of --migrate.")
@click.option("--stats", metavar="S.json", help="Write what was counted.")
@click.option("-o", "--output", metavar="A.jsonl", help="One line a request; default: stdout.")
@options_as(ServeOptions)
def command(given: ServeOptions) -> None:
    """Serve a checkpoint, this server's experts and requests.

    All servers get the same files and options but for --server, --requests, --device, --threads
    and outputs. A line of requests is {"prompt": text} and, where wanted, "task", "id", "at_s" (its
    arrival, in seconds from the start) and "max_new_tokens"; decoding is greedy. A server without
    requests of its own answers the others until all have done theirs. With --requests - each line
    of standard input arrives when it is read, and the end of the input ends this server's requests.
    """
    import json
    import sys

    import torch

    from prism_plan.cli.inputs import error_source, load_cluster, require_writable_output
    from prism_plan.io.file_writing import write_bytes
    from prism_plan.io.placement import read_placement_and_identity
    from prism_plan.io.serve_requests import read_requests
    from prism_plan.profiling.hf import fingerprint
    from prism_plan.simulate.network import Network
    from runtime_adapter.driver import (
        MAX_PROMPT_TOKENS,
        context_tokens,
        even_network,
        load_tokenizer,
        moving,
        prepare,
        prepare_stream,
        require_covered,
        serve,
    )
    from runtime_adapter.moe.compute import ExpertCompute
    from runtime_adapter.moe.placed_model import (
        load_experts,
        load_model,
        require_placed_model,
        server_devices,
    )
    from runtime_adapter.moe.thread_dispatcher import ThreadLocalDispatcher
    from runtime_adapter.server import Server, ServerConfig
    from runtime_adapter.transport.nccl_channel import DataChannels, prepare_nccl, require_device
    from runtime_adapter.transport.rendezvous import RuntimeFailure
    from runtime_adapter.weights.checkpoint import Checkpoint

    files = [given.placement, given.cluster, None if given.streamed else given.requests]
    for output in (given.output, given.stats):
        require_writable_output(output, *files)
    torch.set_num_threads(given.threads)
    placement, placement_file = read_placement_and_identity(given.placement)
    rendezvous = given.rendezvous(placement.servers)
    requests = [] if given.streamed else read_requests(given.requests)
    checkpoint = Checkpoint(given.checkpoint)
    require_placed_model(placement, checkpoint, source=given.placement)
    require_covered(placement, source=given.placement)
    spec = checkpoint.spec
    dtype = checkpoint.dtype if given.dtype == "auto" else getattr(torch, given.dtype)
    cluster, cluster_digest = None, None
    network = even_network(placement.num_servers, spec.hidden_size * dtype.itemsize)
    if given.cluster is not None:
        cluster, cluster_file = load_cluster(given.cluster)
        cluster_digest = cluster_file.sha256
        if tuple(server.name for server in cluster.servers) != placement.servers:
            raise InputError(
                f"servers {', '.join(server.name for server in cluster.servers)}",
                source=given.cluster,
                expected=f"{', '.join(placement.servers)}, as in {given.placement}",
            )
        with error_source(given.cluster):
            network = Network.of(cluster, spec)
    if given.transport == "nccl":
        prepare_nccl(given.interface)  # before anything uses a card
    devices = server_devices(len(placement.gpu_capacity[rendezvous.rank]), given.device)
    channels = None
    if given.transport != "gloo":
        channels = DataChannels(given.transport, devices[0])
        require_device(channels)
    tokenizer = load_tokenizer(checkpoint)
    jobs = prepare(
        requests, tokenizer, checkpoint, rendezvous.rank, given.max_new_tokens, given.requests
    )
    longest = max([len(job.ids) for job in jobs], default=1)
    if given.streamed:
        context = context_tokens(checkpoint) or 1 << 20
        longest = min(MAX_PROMPT_TOKENS, context)
        if given.max_prompt_tokens is not None:
            longest = given.max_prompt_tokens
            require_integer(longest, 1, context, "max_prompt_tokens")
    lanes = ThreadLocalDispatcher()
    with error_source(given.placement):
        store = load_experts(checkpoint, placement, rendezvous.rank, devices, dtype)
    model = load_model(checkpoint, lanes, dtype, devices[0])
    movable = None
    if given.moves:
        options = given.simulation(route=given.route, seed=given.seed)
        with error_source(given.placement):
            movable = moving(
                rendezvous,
                placement,
                store,
                checkpoint,
                cluster,
                options,
                given.placements_dir,
                from_peers=given.weights == "peer",
            )
    config = ServerConfig(
        rendezvous=rendezvous,
        placement=placement,
        model=placement.model,
        network=network,
        compute=ExpertCompute(store),
        facts={
            "placement": placement_file.sha256,
            "checkpoint": fingerprint(given.checkpoint),
            "cluster": cluster_digest,
            "dtype": str(dtype).removeprefix("torch."),
            **{
                name: getattr(given, name)
                for name in (
                    "route",
                    "concurrency",
                    "rtt_ms",
                    "weights",
                    "transport",
                    *MIGRATION_FACTS,
                )
            },
        },
        states=dtype,
        width=spec.hidden_size,
        most_tokens=longest,
        route=given.route,
        lanes=given.concurrency,
        rtt_s=given.rtt_ms * 1e-3,
        threads=given.threads,
        movable=movable,
        channels=channels,
    )
    if given.cluster is not None and cluster is not None:
        reviewed = given.migrate != "never"
        by_links = reviewed or given.route == "nearest"
        note_assumed(given.cluster, cluster, loads=reviewed, links=by_links)
    with jsonl(given.output) as write, Server(config, note) as server:
        begin_s = server.agree_on_start()
        coming: Iterable[Job] = jobs
        if given.streamed:
            coming = prepare_stream(
                sys.stdin.buffer, tokenizer, checkpoint, rendezvous.rank, given.max_new_tokens,
                begin_s,
            )  # fmt: skip
        answers = serve(
            server, model, tokenizer, lanes, coming, begin_s, lambda answer: write(answer.to_json())
        )
        server.finish()
        counted = server.counters.to_json()
        migrations = server.migrations()
    failed = sum(answer.error is not None for answer in answers)
    if given.stats is not None:
        values = {
            "server": given.server,
            "requests": len(answers),
            "failed": failed,
            "new_tokens": sum(len(answer.tokens) for answer in answers),
            "lost": [name for m, name in enumerate(placement.servers) if server.table.lost(m)],
            **counted,
            "gpus": server.held(),
            "migrations": migrations,
        }
        write_bytes(given.stats, (json.dumps(values, indent=1) + "\n").encode())
    if failed:
        raise RuntimeFailure(f"{failed} of {len(answers)} requests failed; see their errors")
