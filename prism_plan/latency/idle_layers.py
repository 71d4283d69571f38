"""Seconds and work of layers, compiled: prompts of a trace at servers that may execute them.

By the rules of the simulator for one step of one request on its own (docs/design.md, section 4);
see :mod:`prism_plan.latency.idle_time` and :mod:`prism_plan.latency.layer_work`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.compiled_loops import as_constant
from prism_plan.jit import kernel
from prism_plan.kernel_types import int64
from prism_plan.model_spec import ModelSpec
from prism_plan.placement import first_gpus, gpu_offsets
from prism_plan.simulate.network import BYTES_PER_CALL, Network
from prism_plan.simulate.requests import Prompts, Requests
from prism_plan.simulate.routing_policies import ROUTES, Route, choose_holders, holder_lists
from prism_plan.simulate.timing import Timing, timing

Array = Any
Floats = npt.NDArray[np.float64]


class Problem(NamedTuple):
    """What kernels of layers read; G counts GPUs, P prompts."""

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
    attention_s: Array
    decode_s: Array
    expert_s: Array
    seconds_per_byte: Array
    half_rtt_s: Array
    call_overhead_s: float
    token_bytes: int
    route: int


class Record(NamedTuple):
    """What the steps of one layer at one server ask of GPUs and links, each with its weight.

    Float64 ``gpus`` [G]: seconds of experts on each GPU. ``batches`` [N, 3]: batches of experts at
    each server, their seconds (of the slowest GPU), and the sum of squares. ``sent`` and
    ``returned`` [N, 3]: messages to and from each server, the seconds for which they hold a link,
    and the sum of squares. ``trains`` [2]: squared seconds for which all messages of a step hold
    the uplink of the executing server, and all answers its downlink, beyond the squares of each.
    ``seconds`` [2]: experts of the executing server, and what calls add. All of size zero where
    nothing is recorded.
    """

    gpus: Array
    batches: Array
    sent: Array
    returned: Array
    trains: Array
    seconds: Array


class Scratch(NamedTuple):
    """Working memory of kernels of layers; see ``EngineState``."""

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


def layer_problem(
    on_gpu: npt.NDArray[np.bool_], model: ModelSpec, gpu_start: npt.NDArray[np.int32],
    dense_gpu: npt.NDArray[np.int32], network: Network, tables: Timing, prompts: Prompts,
    route: Route = "cover",
) -> tuple[Problem, Scratch]:  # fmt: skip
    """What the kernels need, for a placement bool [G, L, E] and prompts.

    ``gpu_start`` int32 [N + 1] and ``dense_gpu`` int32 [N] as in a ``Scenario``. Route `spread`
    takes the number of a prompt for that of a request.
    """
    servers = len(dense_gpu)
    owner = np.repeat(np.arange(servers, dtype=np.int32), np.diff(gpu_start))
    first_gpu = first_gpus(on_gpu.reshape(len(on_gpu), -1), owner, servers)
    holders, num_replicas = holder_lists(first_gpu)
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
        "attention_s": tables.attention_s,
        "decode_s": tables.decode_s,
        "expert_s": tables.expert_s,
        "seconds_per_byte": network.seconds_per_byte,
        "half_rtt_s": network.half_rtt_s,
    }
    problem = Problem(
        **{name: as_constant(array) for name, array in arrays.items()},
        call_overhead_s=float(network.call_overhead_s),
        token_bytes=int(network.token_bytes),
        route=ROUTES.index(route),
    )
    top_k = model.top_k
    scratch = Scratch(
        token_count=np.zeros((servers, model.num_experts), np.int32),
        expert_order=np.zeros((servers, model.num_experts), np.int32),
        distinct_experts=np.zeros(servers, np.int32),
        tokens_to=np.zeros(servers, np.int32),
        tokens_sent=np.zeros((servers, servers), np.int64),
        missing_experts=np.zeros((2, top_k), np.int64),
        held_mask=np.zeros(servers, np.int64),
        candidate_servers=np.zeros(servers, np.int32),
        cover_table=np.zeros((3, 1 << top_k), np.int64),
        gpu_work_s=np.zeros(len(on_gpu)),
        back_s=np.zeros(servers),
    )
    return problem, scratch


def cluster_problem(
    on_gpu: npt.NDArray[np.bool_], model: ModelSpec, cluster: Cluster, network: Network,
    prompts: Prompts,
) -> tuple[Problem, Scratch]:  # fmt: skip
    """As :func:`layer_problem`, by the figures of a cluster's GPUs.

    Raises
    ------
    InputError
        A figure of a GPU is wrong.
    """
    longest = int((prompts.prefill_tokens + prompts.decode_tokens).max())
    tables = timing(cluster, model, max(int(prompts.prefill_tokens.max()), 1), context=longest)
    gpu_start = gpu_offsets(len(server.gpus) for server in cluster.servers)
    dense_gpu = gpu_start[:-1] + np.array([s.dense_gpu for s in cluster.servers], np.int32)
    return layer_problem(on_gpu, model, gpu_start, dense_gpu, network, tables, prompts)


def layer_times(
    on_gpu: npt.NDArray[np.bool_], model: ModelSpec, cluster: Cluster, network: Network,
    requests: Requests, executing: Sequence[int],
) -> Floats:  # fmt: skip
    """Idle seconds of every prompt in each layer, executed at some servers, [P, L, servers]."""
    prompts = requests.prompts
    problem, scratch = cluster_problem(on_gpu, model, cluster, network, prompts)
    none = np.zeros((0, 3))
    at = np.array(executing, np.int64)
    found = np.zeros((len(prompts), model.num_layers, len(at)))
    _idle_layers(
        problem, scratch, Record(none[:, 0], none, none, none, none[:, 0], none[:, 0]),
        as_constant(at), found,
    )  # fmt: skip
    return found


@kernel
def batch_s(  # pragma: no cover - compiled
    p: Problem, s: Scratch, r: Record, m: int, layer: int, weight: float
) -> float:
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
    if len(r.seconds) > 0:
        for g in range(begin, end):
            r.gpus[g] += weight * s.gpu_work_s[g]
        if longest > 0.0:
            r.batches[m, 0] += weight
            r.batches[m, 1] += weight * longest
            r.batches[m, 2] += weight * longest**2
    return longest


@kernel
def step_s(  # pragma: no cover - compiled
    p: Problem, s: Scratch, r: Record, at: int, layer: int, prompt: int, row: int, tokens: int,
    weight: float,
) -> float:  # fmt: skip
    """Seconds of a layer's experts and calls from server ``at``, for one step on its own.

    The step has ``tokens`` rows of experts from ``row`` on; ``prompt`` is the number of its prompt.
    """
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
            p.route, prompt, s.missing_experts, missing, p.holders, p.num_replicas,
            s.tokens_sent[at], p.link_rank[at], s.held_mask, s.candidate_servers, s.cover_table,
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
                s.tokens_sent[at, m] += 1
    local_s = batch_s(p, s, r, at, layer, weight)
    if len(r.seconds) > 0:
        r.seconds[0] += weight * local_s
    if remote == 0:
        return local_s
    sent_s = p.call_overhead_s  # when the uplink is free
    all_out_s, all_reply_s = 0.0, 0.0
    for m in range(servers):
        s.back_s[m] = -1.0
        if s.tokens_to[m] == 0:
            continue
        named = 0
        for i in range(s.distinct_experts[m]):
            named += s.token_count[m, s.expert_order[m, i]]
        states = s.tokens_to[m] * p.token_bytes
        out_s = (states + BYTES_PER_CALL * named) * p.seconds_per_byte[at, m]
        sent_s += out_s
        s.back_s[m] = sent_s + p.half_rtt_s[at, m] + batch_s(p, s, r, int64(m), layer, weight)
        if len(r.seconds) > 0:
            reply_s = states * p.seconds_per_byte[m, at]
            r.sent[m, 0] += weight
            r.sent[m, 1] += weight * out_s
            r.sent[m, 2] += weight * out_s**2
            r.returned[m, 0] += weight
            r.returned[m, 1] += weight * reply_s
            r.returned[m, 2] += weight * reply_s**2
            r.trains[0] += 2 * weight * all_out_s * out_s
            r.trains[1] += 2 * weight * all_reply_s * reply_s
            all_out_s += out_s
            all_reply_s += reply_s
    end_s = local_s
    down_s = 0.0  # when the downlink is free; answers come in the order in which they are ready
    while True:
        next_one = -1
        for m in range(servers):
            if s.back_s[m] >= 0 and (next_one < 0 or s.back_s[m] < s.back_s[next_one]):
                next_one = m
        if next_one < 0:
            break
        held_s = s.tokens_to[next_one] * p.token_bytes * p.seconds_per_byte[next_one, at]
        down_s = max(down_s, s.back_s[next_one]) + held_s
        end_s = max(end_s, down_s + p.half_rtt_s[next_one, at])
        s.back_s[next_one] = -1.0
        s.tokens_to[next_one] = 0
    if len(r.seconds) > 0:
        r.seconds[1] += weight * (end_s - local_s)
    return end_s


@kernel
def _idle_layers(  # pragma: no cover - compiled
    p: Problem, s: Scratch, r: Record, executing: Array, found: Array
) -> None:
    """Fill ``found`` [P, L, servers] with the idle seconds of each prompt, layer and server."""
    prompts, layers, servers = found.shape
    for number in range(servers):
        at = executing[number]
        g = p.dense_gpu[at]
        for layer in range(layers):
            for prompt in range(prompts):
                row = p.first_row[prompt]
                context = int64(0)
                total_s = 0.0
                tokens = int64(p.prefill_tokens[prompt])
                if tokens > 0:
                    total_s += p.prefill_s[p.kind[g], p.dense_class[layer], tokens]
                    total_s += step_s(
                        p, s, r, int64(at), int64(layer), int64(prompt), row, tokens, 1.0
                    )
                    context = tokens
                for _ in range(p.decode_tokens[prompt]):
                    total_s += p.decode_s[p.kind[g], p.dense_class[layer], context]
                    total_s += step_s(
                        p, s, r, int64(at), int64(layer), int64(prompt), row + context, int64(1),
                        1.0,
                    )  # fmt: skip
                    context += 1
                found[prompt, layer, number] = total_s
