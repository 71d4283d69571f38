"""The command ``prism-runtime serve``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import click

from prism_plan.cli.options_dataclass import options_as
from prism_plan.errors import InputError
from prism_plan.input_limits import require_integer
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
    from collections.abc import Iterable

    from prism_plan.cluster import Cluster
    from prism_plan.model_spec import ModelSpec
    from prism_plan.simulate.routing_policies import Route
    from runtime_adapter.tokenized_requests import TokenizedRequest

#: Tokens of the longest prompt on standard input, where nothing else is said.
DEFAULT_MAX_PROMPT_TOKENS = 512
#: Options that must be equal on all servers of a run.
SERVE_FACTS = (
    "route",
    "concurrency",
    "prefill_chunk",
    "rtt_ms",
    "weights",
    "transport",
    *MIGRATION_FACTS,
)


@dataclass(frozen=True, kw_only=True)
class ServeOptions(RendezvousOptions, MigrationOptions):
    """The options of ``serve``."""

    placement: str
    checkpoint: str
    requests: str
    max_prompt_tokens: int | None
    max_new_tokens: int
    prefill_chunk: int
    dtype: str
    device: str
    transport: Literal["tcp", "gloo", "nccl"]
    route: Route
    cluster: str | None
    trace: str | None
    concurrency: int
    threads: int
    weights: Literal["checkpoint", "peer"]
    seed: int
    journal: str | None
    stats: str | None
    output: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer(self.max_new_tokens, 1, 1 << 20, "max_new_tokens")
        require_integer(self.prefill_chunk, 0, 1 << 20, "prefill_chunk")
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
        if self.migrate == "never":
            self.refuse("trace", found="has no effect without reviews, ``migrate``")
        if self.journal is not None and self.output in (None, "-"):
            raise InputError(
                "needs a file of answers, which a restarted server goes on with",
                parameter="journal",
                expected="``output``",
            )
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
    "--prefill-chunk",
    default=0,
    show_default=True,
    metavar="N",
    help="Tokens of a prompt that go through the layers at once; 0: all.",
)
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
    type=click.Choice(["tcp", "gloo", "nccl"]),
    default="tcp",
    show_default=True,
    help="nccl: states go from GPU to GPU; gloo: its protocol between CPUs, for tests.",
)
@click.option(
    "--route", type=click.Choice(["cover", "nearest", "spread"]), default="cover", show_default=True
)
@click.option(
    "--cluster",
    metavar="C.toml",
    help="Figures, for --route nearest, --migrate, paths around lost servers.",
)
@click.option(
    "--trace",
    metavar="T.parquet",
    help="Of the first server, where it starts the store: see prism-runtime store.",
)
@click.option(
    "--concurrency", default=1, show_default=True, metavar="C", help="Requests of a server at once."
)
@click.option("--threads", default=1, show_default=True, metavar="T", help="CPU threads of a step.")
@migration_options
@click.option(
    "--weights",
    type=click.Choice(["checkpoint", "peer"]),
    default="peer",
    show_default=True,
    help="Where experts that move come from; peer: from a server that holds them, if one does.",
)
@click.option("--seed", default=0, show_default=True, help="Of the solvers of --migrate.")
@click.option(
    "--journal",
    metavar="FILE",
    help="Note requests and tokens, to go on with them when started again; needs -o.",
)
@click.option("--stats", metavar="S.json", help="Write what was counted.")
@click.option("-o", "--output", metavar="A.jsonl", help="One line a request; default: stdout.")
@options_as(ServeOptions)
def command(args: ServeOptions) -> None:
    """Serve a checkpoint, this server's experts and requests.

    All servers get the same files and options but for --server, --requests, --device, --threads
    and outputs. A line of requests is {"prompt": text} and, optionally "task", "id", "at_s" (its
    arrival, in seconds from the start) and "max_new_tokens"; decoding is greedy. A server without
    requests of its own answers the others until all have done theirs. With --requests - each line
    of standard input arrives when it is read, and the end of the input ends this server's requests.
    """
    import contextlib
    import hashlib
    import itertools
    import json
    import sys
    from pathlib import Path

    import torch

    from prism_plan.cli.inputs import (
        error_source,
        load_cluster,
        require_distinct_outputs,
        require_writable_output,
    )
    from prism_plan.io.file_writing import write_bytes
    from prism_plan.io.placement import read_placement_and_identity
    from prism_plan.io.serve_requests import read_requests
    from prism_plan.profiling.recording.fingerprint import fingerprint
    from prism_plan.simulate.network import Network
    from runtime_adapter.driver import Driver, greedy_config
    from runtime_adapter.moe.compute import ExpertCompute
    from runtime_adapter.moe.placed_model import load_placed_model
    from runtime_adapter.moe.router import uniform_network
    from runtime_adapter.moe.thread_local_dispatcher import ThreadLocalDispatcher
    from runtime_adapter.request_journal import RequestJournal
    from runtime_adapter.server import LocalServer
    from runtime_adapter.server_config import (
        OwnStoreConfig,
        ServerConfig,
        kv_tokens_of_run,
        migration_config,
    )
    from runtime_adapter.spans.model_work import ModelWork
    from runtime_adapter.spans.request_path import PathCosts
    from runtime_adapter.tokenized_requests import RequestTokenizer, context_tokens, load_tokenizer
    from runtime_adapter.transport.nccl_channel import ChannelConfig, prepare_nccl, require_device
    from runtime_adapter.transport.rendezvous import RuntimeFailure
    from runtime_adapter.weights.checkpoint import Checkpoint
    from runtime_adapter.weights.checkpoint_loader import CheckpointLoader
    from runtime_adapter.weights.peer_loader import PeerLoader
    from runtime_adapter.weights.server_experts import (
        create_server_store,
        fill_server_store,
        require_covered,
        require_placed_model,
        server_devices,
    )

    files = [args.placement, args.cluster, args.trace, None if args.streamed else args.requests]
    for output in (args.output, args.stats, args.journal):
        require_writable_output(output, *files)
    require_distinct_outputs(args.output, args.stats, args.journal)
    if args.streamed and sys.stdin is None:
        raise InputError("closed", source="standard input", expected="requests, for ``requests`` -")
    torch.set_num_threads(args.threads)
    placement, placement_file = read_placement_and_identity(args.placement)
    rendezvous = args.rendezvous(placement.servers)
    requests = [] if args.streamed else read_requests(args.requests)
    checkpoint = Checkpoint(args.checkpoint)
    require_placed_model(placement, checkpoint, source=args.placement)
    require_covered(placement, source=args.placement)
    spec = checkpoint.spec
    dtype = checkpoint.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    cluster, cluster_digest = None, None
    network = uniform_network(placement.num_servers, spec.hidden_size * dtype.itemsize)
    if args.cluster is not None:
        cluster, cluster_file = load_cluster(args.cluster)
        cluster_digest = cluster_file.sha256
        if tuple(server.name for server in cluster.servers) != placement.servers:
            raise InputError(
                f"servers {', '.join(server.name for server in cluster.servers)}",
                source=args.cluster,
                expected=f"{', '.join(placement.servers)}, as in {args.placement}",
            )
        with error_source(args.cluster):
            network = Network.of(cluster, spec)
    kv_text = missing_kv_text(args.placement, args.cluster, cluster, spec)
    if kv_text and rendezvous.rank == 0:  # once a run
        log_info(kv_text)
    if args.transport == "nccl":
        prepare_nccl(args.interface)  # before anything uses a card
    devices = server_devices(len(placement.gpu_capacity[rendezvous.rank]), args.device)
    channels = None
    if args.transport != "tcp":
        channels = ChannelConfig(args.transport, devices[0])
        require_device(channels)
    tokenizer = load_tokenizer(checkpoint)
    tokenizing = RequestTokenizer(tokenizer, checkpoint, rendezvous.rank, args.max_new_tokens)
    tokenized = tokenizing.tokenize(requests, args.requests)
    # one that is run again is prefilled with its tokens so far
    max_tokens = max([len(one.ids) + one.new_tokens for one in tokenized], default=1)
    if args.streamed:
        context = context_tokens(checkpoint) or 1 << 20
        max_tokens = min(DEFAULT_MAX_PROMPT_TOKENS, context)
        if args.max_prompt_tokens is not None:
            max_tokens = args.max_prompt_tokens
            require_integer(max_tokens, 1, context, "max_prompt_tokens")
        max_tokens = min(max_tokens + args.max_new_tokens, context)
    checkpoint_digest = fingerprint(args.checkpoint)
    journal = None
    if args.journal is not None:
        digest = None
        if not args.streamed:
            digest = hashlib.sha256(Path(args.requests).read_bytes()).hexdigest()
        of: dict[str, str | None] = {
            "placement": placement_file.sha256,
            "checkpoint": checkpoint_digest,
        }
        of |= {"requests": digest, "server": args.server}
        journal = RequestJournal(args.journal, of)
        journal.require_answers(args.output)
    backend = ThreadLocalDispatcher()
    with error_source(args.placement):
        store = create_server_store(checkpoint, placement, rendezvous.rank, devices, dtype)

    def fill() -> None:
        with error_source(args.placement):
            fill_server_store(store, checkpoint, placement, rendezvous.rank)

    model = load_placed_model(checkpoint, backend, dtype, devices[0])
    work = None
    if placement.execution is not None or args.migrates:
        try:
            work = ModelWork(model, spec, backend, greedy_config(model))
        except InputError as error:
            if placement.execution is not None:
                raise
            log_info(f"{error}; this server's requests stay at home, whatever is moved to")
    from_checkpoint = CheckpointLoader(checkpoint.folder, store)
    with error_source(args.placement):
        migration = migration_config(
            PeerLoader(from_checkpoint, placement) if args.weights == "peer" else from_checkpoint,
            placement,
            spec,
            cluster,
            args.simulation(route=args.route, seed=args.seed),
            args.timeout_s,
            movable=args.migrates,
            keep_slots=True,
        )
    config = ServerConfig(
        rendezvous=rendezvous,
        placement=placement,
        model=placement.model,
        network=network,
        compute=ExpertCompute(store),
        migration=migration,
        facts={
            "placement": placement_file.sha256,
            "checkpoint": checkpoint_digest,
            "cluster": cluster_digest,
            "dtype": str(dtype).removeprefix("torch."),
            **{name: getattr(args, name) for name in SERVE_FACTS},
        },
        dtype=dtype,
        width=spec.hidden_size,
        max_tokens=max_tokens,
        kv_tokens=kv_tokens_of_run(placement, cluster),
        chunk_tokens=args.prefill_chunk,
        route=args.route,
        num_lanes=args.concurrency,
        rtt_s=args.rtt_ms * 1e-3,
        request_timeout_s=args.request_timeout_s,
        threads=args.threads,
        channels=channels,
        store=OwnStoreConfig(args.secret_file, args.insecure, args.placements_dir, args.trace),
        log_level=args.log_level,
        log_format=args.log_format,
    )
    if args.cluster is not None and cluster is not None:
        reviewed = args.migrate != "never"
        by_links = reviewed or args.route == "nearest"
        log_assumed_figures(args.cluster, cluster, loads=reviewed, links=by_links)
    with (
        journal or contextlib.nullcontext(),
        open_jsonl(args.output, append=journal is not None and journal.continues) as write,
        LocalServer(config, log_info, fill, work) as server,
    ):
        if cluster is not None:
            server.path_requests.costs = PathCosts.of(cluster, spec)
        begin_s = server.agree_on_start()
        incoming: Iterable[TokenizedRequest] = tokenized
        if args.streamed:
            first_key = 1
            begun: Iterable[TokenizedRequest] = ()
            if journal is not None:
                begun = list(tokenizing.tokenize_journalled(journal, begin_s))
                first_key = journal.next_key
            stream = tokenizing.tokenize_stream(sys.stdin.buffer, begin_s, first_key)
            incoming = itertools.chain(begun, stream)
        driver = Driver(
            server, model, tokenizer, backend, begin_s, lambda result: write(vars(result)),
            journal=journal, paths=server.path_requests,
            chunk_tokens=args.prefill_chunk,
        )  # fmt: skip
        driver.serve(incoming)
        server.finish()
        counted = server.counters.to_json()
        migrations = server.migrations()
    ended = server.requests
    if args.stats is not None:
        values = {
            "server": args.server,
            "requests": ended.all_ended,
            "failed": ended.failed,
            "new_tokens": ended.new_tokens,
            "lost": server.lost_servers(),
            **counted,
            "gpus": server.held_experts(),
            "migrations": migrations,
        }
        write_bytes(args.stats, (json.dumps(values, indent=1) + "\n").encode())
    if ended.failed:
        raise RuntimeFailure(
            f"{ended.failed} of {ended.all_ended} requests failed; see their errors"
        )


def missing_kv_text(
    placement_path: str, cluster_path: str | None, cluster: Cluster | None, spec: ModelSpec
) -> str:
    """A line that says whose KV caches have no memory reserved, of a plan without a table.

    Empty where nothing is missing. Such a plan gives no ``kv_tokens``, only a cluster file does.
    """
    from prism_plan.check.memory_report import missing_kv_reservation

    if spec.kv_bytes_per_token == 0:
        return ""
    if cluster is None:
        return (
            f"{placement_path}: gives no kv_tokens: KV caches are not bounded; whether memory is "
            "reserved for them can be told with --cluster"
        )
    text = missing_kv_reservation(cluster, spec)
    return f"{cluster_path}: {text}" if text else ""
