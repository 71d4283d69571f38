"""The idle time of a request: how long it takes where nothing else runs, by where layers execute.

The measure of ``paths`` and ``pipeline`` (docs/design.md, section 10): dense work with attention,
experts, calls, and the messages between the servers that execute layers, by the rules of the
simulator, for prompts of the trace. What others do to a request, its queues, is left out; its own
messages do wait for each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster, Gpu, Server
from prism_plan.compiled_loops import as_constant
from prism_plan.jit import kernel
from prism_plan.kernel_types import int64
from prism_plan.model_spec import ModelSpec
from prism_plan.placement import first_gpus, gpu_offsets, server_of_gpu
from prism_plan.simulate.network import BYTES_PER_CALL, BYTES_PER_TOKEN_ID, Network
from prism_plan.simulate.requests import Requests
from prism_plan.simulate.routing_policies import COVER, choose_holders, holder_lists
from prism_plan.simulate.sampling import sample_requests
from prism_plan.simulate.timing import timing
from prism_plan.token_rates import shares_by_task
from prism_plan.trace import Trace

Array = Any
Floats = npt.NDArray[np.float64]

#: Prompts of each task that are looked at: at most so many, and fewer of large problems.
MAX_PROMPTS = 32
#: Expert calls, counted once for each server that could execute the layer, that are looked at.
MAX_WORK = 30_000_000


@dataclass(frozen=True, eq=False)
class MeanRequest:
    """Seconds of the parts of a mean request, by the servers that execute its layers.

    ``layer_s`` [L, N]: layer l executed at server m; ``hop_s`` [N, N]: hidden states from server a
    to b, between two layers; ``start_s`` [N]: the prompt's ids to the first span; ``id_s`` [N, N]:
    the ids of tokens from the driver d with the first span at f, those that passes wait for and the
    last one's way home.
    """

    layer_s: Floats
    hop_s: Floats
    start_s: Floats
    id_s: Floats

    def messages_s(self, row: npt.NDArray[np.integer]) -> float:
        """Seconds of hidden states and token ids with an execution table's row [L]."""
        hops = self.hop_s[row[:-1], row[1:]].sum()
        return float(self.start_s[row[0]] + hops + self.id_s[row[-1], row[0]])

    def of_row(self, row: npt.NDArray[np.integer]) -> float:
        """Seconds of the whole request with an execution table's row [L]."""
        return float(self.layer_s[np.arange(len(row)), row].sum()) + self.messages_s(row)


@dataclass(frozen=True, eq=False)
class IdleTime:
    """Seconds of a mean request of each home server, under one placement.

    ``shares`` [N, T] are those of tasks in the requests of each home, zero without users;
    ``layer_s`` [T, L, N] the seconds of layer l executed at server m for a request of task t;
    ``passes``, ``tokens`` and ``first_tokens`` [N] the mean number of passes of a home's requests,
    of tokens in all of them, and in the first. ``seconds_per_byte`` and ``latency_s`` [N, N] are
    those of a message from row to column, zero from a server to itself.
    """

    shares: Floats
    layer_s: Floats
    passes: Floats
    tokens: Floats
    first_tokens: Floats
    seconds_per_byte: Floats
    latency_s: Floats
    token_bytes: int

    @property
    def has_users(self) -> npt.NDArray[np.bool_]:
        """Whether a server has users, bool [N]."""
        users: npt.NDArray[np.bool_] = self.shares.sum(axis=1) > 0
        return users

    def of_home(self, home: int) -> MeanRequest:
        """The parts of a mean request of one home server."""
        weights = np.zeros(len(self.shares))
        weights[home] = 1.0
        return self.of_homes(weights)

    def of_homes(self, weights: Floats) -> MeanRequest:
        """The parts of the requests of several homes, added up with ``weights`` [N]."""
        passes, tokens, first, next_passes = (
            weights * mean
            for mean in (
                self.passes, self.tokens, self.first_tokens, np.maximum(self.passes - 1, 0),
            )
        )  # fmt: skip
        per_byte, latency_s = self.seconds_per_byte, self.latency_s
        id_s = latency_s + BYTES_PER_TOKEN_ID * per_byte
        return MeanRequest(
            layer_s=np.tensordot(weights @ self.shares, self.layer_s, axes=1),
            hop_s=passes.sum() * latency_s + tokens.sum() * self.token_bytes * per_byte,
            start_s=weights @ latency_s + BYTES_PER_TOKEN_ID * (first @ per_byte),
            # driver d, first span f: all passes but the last begin the next, the last id goes home
            id_s=next_passes.sum() * id_s + (id_s @ weights)[:, None],
        )

    def of_table(self, table: npt.NDArray[np.integer]) -> Floats:
        """Seconds of a mean request of each home with an execution table [N, L], float64 [N]."""
        return np.array([self.of_home(n).of_row(row) for n, row in enumerate(table)])

    def messages_s(self, table: npt.NDArray[np.integer]) -> Floats:
        """Of :meth:`of_table` the seconds of hidden states and token ids, float64 [N]."""
        return np.array([self.of_home(n).messages_s(row) for n, row in enumerate(table)])


class _Problem(NamedTuple):
    """What :func:`_idle_layers` reads; G counts GPUs, P prompts."""

    experts: Array
    first_row: Array
    prefill_tokens: Array
    decode_tokens: Array
    first_gpu: Array
    holders: Array
    num_replicas: Array
    link_rank: Array
    gpu_start: Array
    dense_gpu: Array
    kind: Array
    dense_class: Array
    size: Array
    prefill_s: Array
    decode_s: Array
    expert_s: Array
    seconds_per_byte: Array
    half_rtt_s: Array
    call_overhead_s: float
    token_bytes: int


class _Scratch(NamedTuple):
    """Working memory of :func:`_idle_layers`; see ``EngineState``."""

    token_count: Array
    expert_order: Array
    distinct_experts: Array
    tokens_to: Array
    tokens_sent: Array
    missing_experts: Array
    held_mask: Array
    candidate_servers: Array
    cover_table: Array
    gpu_work_s: Array
    back_s: Array


def idle_time(
    on_gpu: npt.NDArray[np.bool_], model: ModelSpec, cluster: Cluster, trace: Trace, seed: int = 0
) -> IdleTime:
    """The idle time of requests under a placement bool [G, L, E], in parts.

    Raises
    ------
    InputError
        A figure of a GPU or link is wrong; a server's tasks are not those of the trace.
    """
    servers, layers = cluster.num_servers, model.num_layers
    shares = np.zeros((servers, len(trace.tasks)))
    for n, server in enumerate(cluster.servers):
        if server.has_users:
            shares[n] = shares_by_task(trace, server.tasks, f"server[{n}].tasks")
    tasks = np.flatnonzero(shares.any(axis=0))
    requests = _prompts_by_task(trace, tasks, servers, seed)
    network = Network.of(cluster, model)
    times = _layer_times(on_gpu, model, cluster, network, requests)  # [P, L, N]
    prompts = requests.prompts
    layer_s = np.zeros((len(trace.tasks), layers, servers))
    mean = np.zeros((3, len(trace.tasks)))  # passes, tokens, tokens of the first pass
    prefill = prompts.prefill_tokens.astype(np.int64)
    passes = prompts.decode_tokens + (prefill > 0)
    for number, task in enumerate(tasks):
        own = requests.prompt[requests.home == number]
        layer_s[task] = times[own].mean(axis=0)
        tokens = prefill + prompts.decode_tokens
        first = np.where(prefill > 0, prefill, 1)
        mean[:, task] = [values[own].mean() for values in (passes, tokens, first)]
    away = ~np.eye(servers, dtype=bool)
    of_passes, of_tokens, of_first = (shares @ row for row in mean)
    return IdleTime(
        shares=shares,
        layer_s=layer_s,
        passes=of_passes,
        tokens=of_tokens,
        first_tokens=of_first,
        seconds_per_byte=away * network.seconds_per_byte,
        latency_s=away * (network.half_rtt_s + network.hop_overhead_s),
        token_bytes=network.token_bytes,
    )


def _prompts_by_task(
    trace: Trace, tasks: npt.NDArray[np.intp], servers: int, seed: int
) -> Requests:
    """Prompts of each task, as those of a server that asks for nothing else."""
    names = [trace.tasks[task] for task in tasks]
    made = [
        Server(f"task {number}", (Gpu(slots=1),), tasks={name: 1.0}, arrival_interval_s=1.0)
        for number, name in enumerate(names)
    ]
    model = trace.model
    tokens = (
        max(float(trace.mean_tokens()[tasks].max()), 1.0) if trace.requests is not None else 160
    )
    work = tokens * len(tasks) * model.num_layers * model.top_k * servers
    number = int(np.clip(MAX_WORK / work, 1, MAX_PROMPTS))
    return sample_requests(
        trace, Cluster("tasks", tuple(made)), requests_per_server=number, seed=seed
    )


def _layer_times(
    on_gpu: npt.NDArray[np.bool_], model: ModelSpec, cluster: Cluster, network: Network,
    requests: Requests,
) -> Floats:  # fmt: skip
    """Idle seconds of every prompt in each layer, by the server that executes it, [P, L, N]."""
    prompts = requests.prompts
    servers = cluster.num_servers
    owner = server_of_gpu([[0] * len(server.gpus) for server in cluster.servers])
    first_gpu = first_gpus(on_gpu.reshape(len(on_gpu), -1), owner, servers)
    holders, num_replicas = holder_lists(first_gpu)
    longest = int((prompts.prefill_tokens + prompts.decode_tokens).max())
    tables = timing(cluster, model, max(int(prompts.prefill_tokens.max()), 1), context=longest)
    gpu_start = gpu_offsets(len(server.gpus) for server in cluster.servers)
    dense_gpu = gpu_start[:-1] + np.array([s.dense_gpu for s in cluster.servers], np.int32)
    arrays = {
        "experts": prompts.experts,
        "first_row": prompts.first_row,
        "prefill_tokens": prompts.prefill_tokens,
        "decode_tokens": prompts.decode_tokens,
        "first_gpu": first_gpu,
        "holders": holders,
        "num_replicas": num_replicas,
        "link_rank": network.link_rank(),
        "gpu_start": gpu_start,
        "dense_gpu": dense_gpu.astype(np.int32),
        "kind": tables.kind,
        "dense_class": tables.dense_class,
        "size": tables.size,
        "prefill_s": tables.prefill_s,
        "decode_s": tables.decode_s,
        "expert_s": tables.expert_s,
        "seconds_per_byte": network.seconds_per_byte,
        "half_rtt_s": network.half_rtt_s,
    }
    problem = _Problem(
        **{name: as_constant(array) for name, array in arrays.items()},
        call_overhead_s=float(network.call_overhead_s),
        token_bytes=int(network.token_bytes),
    )
    top_k = model.top_k
    scratch = _Scratch(
        token_count=np.zeros((servers, model.num_experts), np.int32),
        expert_order=np.zeros((servers, model.num_experts), np.int32),
        distinct_experts=np.zeros(servers, np.int32),
        tokens_to=np.zeros(servers, np.int32),
        tokens_sent=np.zeros(servers, np.int64),
        missing_experts=np.zeros((2, top_k), np.int64),
        held_mask=np.zeros(servers, np.int64),
        candidate_servers=np.zeros(servers, np.int32),
        cover_table=np.zeros((3, 1 << top_k), np.int64),
        gpu_work_s=np.zeros(len(on_gpu)),
        back_s=np.zeros(servers),
    )
    found = np.zeros((len(prompts), model.num_layers, servers))
    _idle_layers(problem, scratch, found)
    return found


@kernel
def _batch_s(p: _Problem, s: _Scratch, m: int, layer: int) -> float:  # pragma: no cover - compiled
    """Seconds of the experts of server m that are counted in ``s``, which is cleared."""
    begin, end = p.gpu_start[m], p.gpu_start[m + 1]
    first = layer * s.token_count.shape[1]
    for g in range(begin, end):
        s.gpu_work_s[g] = 0.0
    for i in range(s.distinct_experts[m]):
        e = s.expert_order[m, i]
        g = p.first_gpu[m, first + e]
        s.gpu_work_s[g] += p.expert_s[p.kind[g], p.size[layer], s.token_count[m, e]]
        s.token_count[m, e] = 0
    s.distinct_experts[m] = 0
    longest = 0.0
    for g in range(begin, end):
        longest = max(longest, s.gpu_work_s[g])
    return longest


@kernel
def _step_s(  # pragma: no cover - compiled
    p: _Problem, s: _Scratch, at: int, layer: int, row: int, tokens: int
) -> float:
    """Seconds of a layer's experts and calls from server ``at``, for one step on its own."""
    servers, experts = s.token_count.shape
    top_k = p.experts.shape[2]
    first = layer * experts
    remote = 0
    for token in range(row, row + tokens):
        missing = int64(0)
        for k in range(top_k):
            e = int64(p.experts[token, layer, k])
            if p.first_gpu[at, first + e] >= 0:
                if s.token_count[at, e] == 0:
                    s.expert_order[at, s.distinct_experts[at]] = e
                    s.distinct_experts[at] += 1
                s.token_count[at, e] += 1
            elif p.num_replicas[first + e] > 0:
                s.missing_experts[0, missing] = first + e
                missing += 1
        if missing == 0:
            continue
        remote += missing
        choose_holders(
            int64(COVER), int64(0), s.missing_experts, missing, p.holders, p.num_replicas,
            s.tokens_sent, p.link_rank[at], s.held_mask, s.candidate_servers, s.cover_table,
        )  # fmt: skip
        for k in range(missing):
            m = s.missing_experts[1, k]
            e = s.missing_experts[0, k] - first
            if s.token_count[m, e] == 0:
                s.expert_order[m, s.distinct_experts[m]] = e
                s.distinct_experts[m] += 1
            s.token_count[m, e] += 1
            seen = False
            for before in range(k):
                if s.missing_experts[1, before] == m:
                    seen = True
            if not seen:
                s.tokens_to[m] += 1
                s.tokens_sent[m] += 1
    end_s = _batch_s(p, s, at, layer)
    if remote == 0:
        return end_s
    sent_s = p.call_overhead_s  # when the uplink is free
    for m in range(servers):
        s.back_s[m] = -1.0
        if s.tokens_to[m] == 0:
            continue
        named = 0
        for i in range(s.distinct_experts[m]):
            named += s.token_count[m, s.expert_order[m, i]]
        states = s.tokens_to[m] * p.token_bytes
        sent_s += (states + BYTES_PER_CALL * named) * p.seconds_per_byte[at, m]
        s.back_s[m] = sent_s + p.half_rtt_s[at, m] + _batch_s(p, s, m, layer)
    down_s = 0.0  # when the downlink is free; answers come in the order in which they are ready
    while True:
        next_one = -1
        for m in range(servers):
            if s.back_s[m] >= 0 and (next_one < 0 or s.back_s[m] < s.back_s[next_one]):
                next_one = m
        if next_one < 0:
            return end_s
        held_s = s.tokens_to[next_one] * p.token_bytes * p.seconds_per_byte[next_one, at]
        down_s = max(down_s, s.back_s[next_one]) + held_s
        end_s = max(end_s, down_s + p.half_rtt_s[next_one, at])
        s.back_s[next_one] = -1.0
        s.tokens_to[next_one] = 0


@kernel
def _idle_layers(p: _Problem, s: _Scratch, found: Array) -> None:  # pragma: no cover - compiled
    """Fill ``found`` [P, L, N] with the idle seconds of each prompt, layer and executing server."""
    prompts, layers, servers = found.shape
    for at in range(servers):
        g = p.dense_gpu[at]
        for layer in range(layers):
            for prompt in range(prompts):
                row = p.first_row[prompt]
                context = int64(0)
                total_s = 0.0
                tokens = int64(p.prefill_tokens[prompt])
                if tokens > 0:
                    total_s += p.prefill_s[p.kind[g], p.dense_class[layer], tokens]
                    total_s += _step_s(p, s, int64(at), int64(layer), row, tokens)
                    context = tokens
                for _ in range(p.decode_tokens[prompt]):
                    total_s += p.decode_s[p.kind[g], p.dense_class[layer], context]
                    total_s += _step_s(p, s, int64(at), int64(layer), row + context, int64(1))
                    context += 1
                found[prompt, layer, at] = total_s
