"""A checkpoint served under a placement: requests from a file, tokens by ``generate``."""

from __future__ import annotations

import copy
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

from prism_plan.cluster import Cluster
from prism_plan.errors import InputError, PrismError
from prism_plan.evaluate.simulation_checks import require_supported_migration
from prism_plan.evaluate.simulation_options import SimulationOptions
from prism_plan.instance import Instance
from prism_plan.io.serve_requests import MAX_REQUESTS, Request, request_from_line
from prism_plan.placement import Placement
from prism_plan.simulate.network import Network
from runtime_adapter.control.rules import rules_of
from runtime_adapter.control.scheduler import SchedulerConfig
from runtime_adapter.moe.dispatch import Dispatcher
from runtime_adapter.moe.emulated_gpu import wait_until
from runtime_adapter.moe.thread_dispatcher import ThreadLocalDispatcher
from runtime_adapter.server import MigrationConfig, Server
from runtime_adapter.transport.messages import require_tokens
from runtime_adapter.transport.rendezvous import Rendezvous
from runtime_adapter.weights.checkpoint import Checkpoint
from runtime_adapter.weights.expert_store import ExpertStore
from runtime_adapter.weights.loader import CheckpointLoader
from runtime_adapter.weights.peers import PeerLoader

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Bytes of one line of requests that come on standard input.
MAX_LINE_BYTES = 1 << 24
#: Tokens of the longest prompt on standard input, where nothing else is said.
MAX_PROMPT_TOKENS = 512


@dataclass(frozen=True, eq=False)
class Job:
    """A request as the model takes it: token ids, and how many to add at most.

    A request that cannot be served has the reason as ``error`` instead.
    """

    request: Request
    number: int
    ids: list[int]
    new_tokens: int
    error: str | None = None


def prepare(
    requests: Sequence[Request],
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Checkpoint,
    server: int,
    max_new_tokens: int,
    source: object,
) -> list[Job]:
    """Requests of a server as token ids.

    Raises
    ------
    InputError
        A prompt has no tokens, or is longer than the model's context; names the line.
    """
    return [
        _job(request, server * MAX_REQUESTS + at, tokenizer, checkpoint, max_new_tokens, source)
        for at, request in enumerate(requests)
    ]


def _job(
    request: Request,
    number: int,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Checkpoint,
    max_new_tokens: int,
    source: object,
) -> Job:
    longest = context_tokens(checkpoint)
    ids = tokenizer(request.prompt)["input_ids"]
    new = request.max_new_tokens or max_new_tokens
    if not ids or (longest is not None and len(ids) + new - 1 > longest):
        raise InputError(
            f"{len(ids):,} tokens and {new:,} new ones",
            source=source,
            place=f"line {request.line}",
            expected=f"1 to {longest:,}, the model's context" if longest else "a token or more",
            remedy="shorten the prompt or lower ``max_new_tokens``" if ids else "",
        )
    return Job(request, number, ids, new)


def context_tokens(checkpoint: Checkpoint) -> int | None:
    """The most tokens of a request, prompt and answer together, if the model has a bound."""
    found: int | None = checkpoint.config.get("max_position_embeddings")
    return found


def prepare_stream(
    stream: IO[bytes],
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Checkpoint,
    server: int,
    max_new_tokens: int,
    begin_s: float,
) -> Iterator[Job]:
    """Requests of a server as they come, line by line; each arrives when it is read.

    ``begin_s`` is when time zero is. A line that cannot be served becomes a job with an ``error``,
    for a run must not end for all because one caller was wrong. A line without an ``id`` is called
    by its number.
    """
    source = "standard input"
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        now_s = max(time.monotonic() - begin_s, 0.0)
        at = server * MAX_REQUESTS + (number - 1) % MAX_REQUESTS
        if not line.strip():
            continue
        request = Request(number, "", at_s=now_s)
        try:
            if len(line) > MAX_LINE_BYTES:
                while not line.endswith(b"\n") and (line := stream.readline(MAX_LINE_BYTES)):
                    pass  # the rest of the line is no request of its own
                raise InputError(
                    f"more than {MAX_LINE_BYTES:,} bytes", source=source, place=f"line {number}"
                )
            request = request_from_line(line.decode("utf-8", "replace"), source, number)
            request = replace(request, at_s=max(request.at_s, now_s))
            yield _job(request, at, tokenizer, checkpoint, max_new_tokens, source)
        except InputError as error:
            yield Job(request, at, [], 0, str(error))


@dataclass
class Answer:
    """What became of one request; times in seconds since the run began."""

    id: str | int
    server: str
    task: str
    prompt_tokens: int
    arrival_s: float
    start_s: float | None = None
    first_token_s: float | None = None
    done_s: float | None = None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A line of the results."""
        return dict(vars(self))


class _Watch:
    """Told of the tokens of one request as they come; what ``generate`` calls a streamer."""

    def __init__(self, answer: Answer, begin_s: float) -> None:
        self.answer = answer
        self.begin_s = begin_s
        self._prompt = True

    def put(self, ids: torch.Tensor) -> None:
        """The prompt, and then each token."""
        if self._prompt:
            self._prompt = False
            return
        if self.answer.first_token_s is None:
            self.answer.first_token_s = time.monotonic() - self.begin_s
        self.answer.tokens += ids.reshape(-1).tolist()

    def end(self) -> None:
        """No more tokens."""


def serve(
    server: Server,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lanes: ThreadLocalDispatcher,
    jobs: Iterable[Job],
    begin_s: float,
    done: Callable[[Answer], None] = lambda answer: None,
) -> list[Answer]:
    """Serve jobs at their times, as many at once as the server has lanes; greedy decoding.

    ``begin_s`` is when time zero is; ``done`` is told of each answer once it is complete. Jobs may
    come one by one; their end ends the run. A request that fails has an error and the tokens until
    then; the others go on.
    """
    waiting: queue.SimpleQueue[tuple[Job, Answer] | None] = queue.SimpleQueue()
    telling = threading.Lock()
    configuration = greedy(model)

    def work(lane: Dispatcher) -> None:
        while (one := waiting.get()) is not None:
            job, answer = one
            answer.start_s = time.monotonic() - begin_s
            try:
                if job.error is not None:
                    raise InputError(job.error)
                require_tokens(repr(answer.id), len(job.ids), lane.max_tokens)
                with lanes.using(lane, job.number):
                    _generate(model, job, answer, configuration, begin_s)
            except PrismError as error:
                answer.error = str(error)
            except Exception as error:  # one request's failure ends no other
                answer.error = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            answer.done_s = time.monotonic() - begin_s
            answer.text = tokenizer.decode(answer.tokens, skip_special_tokens=True)
            with telling:
                done(answer)

    threads = [threading.Thread(target=work, args=(lane,), daemon=True) for lane in server.lanes]
    for thread in threads:
        thread.start()
    answers = []
    for job in jobs:
        request = job.request
        name = request.line if request.id is None else request.id
        answers.append(Answer(name, server.name, request.task, len(job.ids), request.at_s))
        wait_until(begin_s + request.at_s)
        waiting.put((job, answers[-1]))
    for _ in threads:
        waiting.put(None)
    for thread in threads:
        thread.join()
    return answers


def _generate(
    model: PreTrainedModel, job: Job, answer: Answer, configuration: Any, begin_s: float
) -> None:
    ids = torch.tensor([job.ids], device=model.device)
    configuration = copy.copy(configuration)
    configuration.max_new_tokens = job.new_tokens
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=configuration,
        streamer=_Watch(answer, begin_s),
    )


def greedy(model: PreTrainedModel) -> Any:
    """The model's generation settings, always with the most likely token next."""
    configuration = copy.deepcopy(model.generation_config)
    configuration.do_sample = False
    configuration.num_beams = 1
    configuration.max_length = None
    for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
        setattr(configuration, name, None)
    if configuration.pad_token_id is None:
        end = configuration.eos_token_id
        configuration.pad_token_id = end[0] if isinstance(end, list) else end
    return configuration


def require_covered(placement: Placement, *, source: object) -> None:
    """Refuse a placement in which an expert is nowhere.

    Raises
    ------
    InputError
        Names the first such expert.
    """
    nowhere = np.argwhere(~placement.on_gpu.any(axis=0))
    if len(nowhere):
        pair = int(nowhere[0] @ (placement.model.num_experts, 1))
        raise InputError(
            f"{placement.model.pair_text(pair)} is on no server",
            source=source,
            expected="every expert somewhere",
            remedy="make placements with prism-plan solve",
        )


def even_network(servers: int, token_bytes: int) -> Network:
    """Links that are all alike, where no cluster file tells them apart."""
    zeros = np.zeros((servers, servers))
    ports = np.full(servers, math.inf)
    return Network(zeros, zeros.copy(), ports, ports.copy(), 0.0, 0.0, token_bytes)


def moving(
    rendezvous: Rendezvous,
    placement: Placement,
    store: ExpertStore,
    checkpoint: Checkpoint,
    cluster: Cluster | None,
    options: SimulationOptions,
    placements_dir: str | None,
    *,
    from_peers: bool = False,
) -> MigrationConfig:
    """What lets the experts of a server move: by reviews if there is a cluster, or when told.

    Servers keep the slots that they started with, whatever the cluster has room for. Experts come
    from the checkpoint, or ``from_peers`` that hold them.

    Raises
    ------
    InputError
        The placement breaks a rule of the cluster.
    UnsupportedFeature
        The migration policy has no rule for what the cluster asks.
    """
    spec = checkpoint.spec
    if cluster is None:
        shape = (placement.num_servers, spec.num_layers, spec.num_experts)
        rules = Instance(
            model=placement.model,
            servers=placement.servers,
            activations=np.zeros(shape),
            gpu_capacity=placement.gpu_capacity,
            min_replicas=placement.plan.min_replicas,
        )
    else:
        rules = rules_of(placement, cluster, spec)
        rules = rules.replace(gpu_capacity=placement.gpu_capacity)
        if options.migrate != "never":
            require_supported_migration(rules, options)
    loader = CheckpointLoader(checkpoint.folder, store)
    return MigrationConfig(
        PeerLoader(loader, placement) if from_peers else loader,
        SchedulerConfig(rendezvous, placement, rules, spec, cluster, options, placements_dir),
    )


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, from its folder alone.

    Raises
    ------
    InputError
        There is none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers fails in many ways
        raise InputError(
            f"has no usable tokenizer: {error!s:.120}",
            source=checkpoint.folder,
            expected="the files of a tokenizer, as save_pretrained writes them",
        ) from error
    return found
