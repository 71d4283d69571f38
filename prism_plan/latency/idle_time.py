"""The idle time of a request: how long it takes where nothing else runs, by where layers execute.

The measure of ``paths`` and ``pipeline`` (docs/design.md, section 10): dense work with attention,
experts, calls, and the messages between the servers that execute layers, by the rules of the
simulator, for prompts of the trace. What others do to a request, its queues, is left out; its own
messages do wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster, Gpu, Server
from prism_plan.latency.idle_layers import layer_times
from prism_plan.model_spec import ModelSpec
from prism_plan.simulate.network import BYTES_PER_TOKEN_ID, Network
from prism_plan.simulate.requests import Prompts, Requests
from prism_plan.simulate.sampling import DECODE_TOKENS, PROMPT_TOKENS, sample_requests
from prism_plan.token_rates import request_rates, shares_by_task
from prism_plan.trace import Trace

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


class IdleMeasure:
    """The measure for a cluster and the prompts of a trace, which any placement can be put under.

    Raises
    ------
    InputError
        A figure of a link is wrong; a server's tasks are not those of the trace.
    """

    def __init__(self, model: ModelSpec, cluster: Cluster, trace: Trace, seed: int = 0) -> None:
        self._model, self._cluster = model, cluster
        self._shares = np.zeros((cluster.num_servers, len(trace.tasks)))
        for n, server in enumerate(cluster.servers):
            if server.has_users:
                self._shares[n] = shares_by_task(trace, server.tasks, f"server[{n}].tasks")
        self._tasks = np.flatnonzero(self._shares.any(axis=0))
        self._requests = _prompts_by_task(trace, self._tasks, cluster.num_servers, seed)
        self._network = Network.of(cluster, model)

    @property
    def prompts(self) -> Prompts:
        """The prompts of all tasks."""
        return self._requests.prompts

    @property
    def shares(self) -> Floats:
        """Share of each task in the requests of each home, float64 [N, T], zero without users."""
        return self._shares

    @property
    def members(self) -> Floats:
        """Share of each prompt in the requests of a task, float64 [T, P]; 0 where not asked for."""
        members = np.zeros((self._shares.shape[1], len(self.prompts)))
        np.add.at(members, (self._tasks[self._requests.home], self._requests.prompt), 1.0)
        total = members.sum(axis=1, keepdims=True)
        shares: Floats = members / np.where(total > 0, total, 1.0)
        return shares

    def request_weights(self, cluster: Cluster) -> Floats:
        """As :func:`request_weights`."""
        prefill, decode = self.prompts.prefill_tokens, self.prompts.decode_tokens
        tokens = self._shares @ self._by_task(prefill.astype(np.int64) + decode)
        return weights_of(tokens, cluster)

    def idle_time(self, on_gpu: npt.NDArray[np.bool_]) -> IdleTime:
        """The idle time of requests under a placement bool [G, L, E], in parts.

        Raises
        ------
        InputError
            A figure of a GPU is wrong.
        """
        prompts, network = self._requests.prompts, self._network
        prefill = prompts.prefill_tokens.astype(np.int64)
        passes = prompts.decode_tokens + (prefill > 0)
        tokens = prefill + prompts.decode_tokens
        first = np.where(prefill > 0, prefill, 1)
        of_passes, of_tokens, of_first = (
            self._shares @ self._by_task(number) for number in (passes, tokens, first)
        )
        away = ~np.eye(len(self._shares), dtype=bool)
        return IdleTime(
            shares=self._shares,
            layer_s=self.layer_s(on_gpu, range(len(self._shares))),
            passes=of_passes,
            tokens=of_tokens,
            first_tokens=of_first,
            seconds_per_byte=away * network.seconds_per_byte,
            latency_s=away * (network.half_rtt_s + network.hop_overhead_s),
            token_bytes=network.token_bytes,
        )

    def layer_s(self, on_gpu: npt.NDArray[np.bool_], executing: Sequence[int]) -> Floats:
        """Seconds of layer l for a request of task t, executed at some servers, [T, L, servers].

        Raises
        ------
        InputError
            A figure of a GPU is wrong.
        """
        found = layer_times(
            on_gpu, self._model, self._cluster, self._network, self._requests, executing
        )
        return self._by_task(found)

    def _by_task(self, values: npt.NDArray[Any]) -> Floats:
        """Means over the prompts of each task, [T, ...], of values [P, ...]."""
        mean = np.zeros((self._shares.shape[1], *values.shape[1:]))
        for number, task in enumerate(self._tasks):
            mean[task] = values[self._requests.prompt[self._requests.home == number]].mean(axis=0)
        return mean


def idle_time(
    on_gpu: npt.NDArray[np.bool_], model: ModelSpec, cluster: Cluster, trace: Trace, seed: int = 0
) -> IdleTime:
    """The idle time of requests under a placement bool [G, L, E], in parts.

    Raises
    ------
    InputError
        A figure of a GPU or link is wrong; a server's tasks are not those of the trace.
    """
    return IdleMeasure(model, cluster, trace, seed).idle_time(on_gpu)


def request_weights(idle: IdleTime, cluster: Cluster) -> Floats:
    """Share of each home's requests in those of the cluster, float64 [N], of sum 1.

    In proportion to arrival rates; where a server with users has none, to ``weight``, which counts
    tokens, over the mean tokens of a request.
    """
    return weights_of(idle.tokens, cluster)


def weights_of(tokens: Floats, cluster: Cluster) -> Floats:
    """As :func:`request_weights`, by the mean tokens of a request of each home, [N]."""
    rates = request_rates(cluster)
    if rates is None:
        weights = np.array([s.weight or 0.0 if s.has_users else 0.0 for s in cluster.servers])
        rates = weights / np.where(tokens > 0, tokens, 1.0)
    shares: Floats = rates / rates.sum()
    return shares


def planning_assumptions(cluster: Cluster, trace: Trace) -> tuple[str, ...]:
    """Short texts that say what the measure takes for granted, as cluster and trace do not say it.

    Without arrival rates nobody knows whether servers are busy; a counts-only trace has no prompts.
    """
    texts = []
    if request_rates(cluster) is None:
        texts.append("an idle cluster, for arrival_interval_s is not given")
    if trace.kind == "counts":
        texts.append(
            f"prompts of {PROMPT_TOKENS} tokens and {DECODE_TOKENS} that follow, drawn from counts"
        )
    return tuple(texts)


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
        max(float(trace.mean_tokens()[tasks].max()), 1.0)
        if trace.requests is not None
        else PROMPT_TOKENS + DECODE_TOKENS
    )
    work = tokens * len(tasks) * model.num_layers * model.top_k * servers
    number = int(np.clip(MAX_WORK / work, 1, MAX_PROMPTS))
    return sample_requests(
        trace, Cluster("tasks", tuple(made)), requests_per_server=number, seed=seed
    )
