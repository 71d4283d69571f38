"""Plans for one head's requests, in whole layers, and what a mean request of the head takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from prism_plan.cluster import Cluster
from prism_plan.errors import Infeasible, UnsupportedFeature
from prism_plan.expert_capacity import gpu_capacity
from prism_plan.export.engine_memory import with_dense_on_every_gpu, with_whole_layers_a_gpu
from prism_plan.export.stages import Stage, executes_at_home_of, moe_position_of, stages
from prism_plan.instance import Instance
from prism_plan.latency.expected_latency import PARTS, latency_of
from prism_plan.objective import remote_score
from prism_plan.placement import Placement
from prism_plan.solvers.contract import Options
from prism_plan.solvers.latency.problem import LatencyProblem
from prism_plan.solvers.run import solve
from prism_plan.trace import Trace


class HeadPlans:
    """Plans for a head on a cluster, and the measure of their requests.

    Memory is counted for the head alone, with caches of ``context`` tokens: an engine of layers
    serves one head. States go from GPU to GPU, or are ``relayed`` by the head, as in llama.cpp.
    """

    def __init__(
        self, trace: Trace, cluster: Cluster, head: str, context: int, *, relayed: bool,
        seed: int = 0,
    ) -> None:  # fmt: skip
        served = cluster.with_users_of([head])
        servers = []
        self._head = [server.name for server in cluster.servers].index(head)
        for server in served.servers:
            kept = context if server.name == head else 0
            alone = dataclasses.replace(server, kv_tokens=kept)
            alone = with_dense_on_every_gpu(alone, trace.model, context)
            servers.append(with_whole_layers_a_gpu(alone, trace.model, context))
        self._cluster = dataclasses.replace(served, servers=tuple(servers))
        self._trace, self._seed, self._relayed = trace, seed, relayed
        self._instance = Instance.build(trace, self._cluster, reserve_kv=False)
        self._problem = LatencyProblem(self._instance, self._cluster, trace, seed)

    def whole_layers(self, refusal: Callable[[Placement], str]) -> Placement:
        """The fastest plan of whole layers for which ``refusal`` gives nothing.

        Raises
        ------
        Infeasible
            None fits; names the reason of each solver.
        UnsupportedFeature
            The engine takes none of those that fit.
        """
        refused: dict[str, str] = {}
        infeasible: list[Infeasible] = []
        plans = []
        for solver, options in (
            ("latency", Options(seed=self._seed, whole_layers=True)),
            ("pipeline", Options(seed=self._seed)),
        ):
            try:
                plan = solve(self._instance, solver, options)
            except Infeasible as error:
                infeasible.append(error)
                refused[solver] = error.constraint
                continue
            if reason := refusal(plan):
                refused[solver] = reason
            else:
                plans.append(plan)
        if not plans:
            each = [f"{reason} ({solver})" for solver, reason in refused.items()]
            if len(set(refused.values())) == 1:
                each = list(set(refused.values()))
            head = self._cluster.servers[self._head].name
            text = f"no plan of whole layers for {head!r} suits the engine: {'; '.join(each)}"
            if len(infeasible) < len(refused):
                raise UnsupportedFeature(text)
            least = min(infeasible, key=lambda error: error.shortfall)
            raise Infeasible(
                text,
                shortfall=least.shortfall,
                unit=least.unit,
                remedy="add memory, or take fewer ``context`` tokens",
            )
        return min(plans, key=self._measured)

    def capacity(self, plan: Placement) -> tuple[tuple[int, ...], ...]:
        """What caches of the head's tokens leave of the cluster's GPUs under a plan's table.

        Raises
        ------
        Infeasible
            A GPU is too small for what must reside on it.
        """
        return gpu_capacity(self._cluster, self._trace.model, plan.execution_table)

    def broken_promise(self, plan: Placement) -> str:
        """Why the head's own server does not allow the plan, or empty."""
        server = self._cluster.servers[self._head]
        if server.execute_at_home and not (plan.execution_table[self._head] == self._head).all():
            return f"{server.name!r} executes its layers at home (execute_at_home)"
        return ""

    def seconds(self, plan: Placement) -> float:
        """Expected seconds of a mean request of the head under a plan, in our runtime."""
        return float(self._problem.expected(plan).of_home[self._head])

    def _measured(self, plan: Placement) -> float:
        """The same in the engine."""
        if executes_at_home_of(plan, self._head):
            return self.seconds(plan)
        found = stages(plan, self._trace.model, self._head, self.capacity(plan))
        return self.seconds_of_counts([stage.num_layers for stage in found], found)

    def remote_share(self, plan: Placement) -> float:
        """Share of the head's expert calls that leave the server that executes the layer."""
        return float(remote_score(self._instance.activations, plan.local_to_execution).share)

    def share_of_layers(self, layers: Collection[int]) -> float:
        """Share of the head's expert calls that are of these decoder layers."""
        calls = self._instance.activations.sum(axis=(0, 2))
        own = [at for at, layer in enumerate(self._trace.model.moe_layers) if layer in layers]
        return float(calls[own].sum() / calls.sum())

    def seconds_of_counts(self, counts: Sequence[int], gpus_of: Sequence[Stage]) -> float:
        """Of a request where the GPUs of stages execute ``counts`` layers, if they fit or not."""
        problem, model = self._problem, self._trace.model
        start = problem.site.gpu_start
        on_gpu = np.zeros((int(start[-1]), model.num_layers, model.num_experts), bool)
        servers = np.repeat([stage.server for stage in gpus_of], counts)
        gpus = np.repeat([start[stage.server] + stage.gpu for stage in gpus_of], counts)
        position = moe_position_of(model)
        table = np.repeat(np.arange(len(start) - 1, dtype=np.int32)[:, None], model.num_layers, 1)
        for layer, (server, gpu) in enumerate(zip(servers.tolist(), gpus.tolist(), strict=True)):
            if layer in model.moe_layers:
                on_gpu[gpu, position[layer]] = True
                table[self._head, position[layer]] = server
        found = latency_of(on_gpu, table, problem.workload, problem.site)
        if not self._relayed:
            return float(found.of_home[self._head])
        parts = dict(zip(PARTS, found.parts[self._head].tolist(), strict=True))
        used = [stage for stage, count in zip(gpus_of, counts, strict=True) if count]
        alone: float = sum(parts.values()) - parts["hops"] - parts["ports"]
        return alone + self._relay_seconds(used)

    def _relay_seconds(self, used: Sequence[Stage]) -> float:
        """Seconds in which states of a mean request go from the head to each stage and back.

        32-bit floats, as llama.cpp's RPC has them; the last stage answers for one token a pass
        (logits are counted as a state: the vocabulary's size is not known).
        """
        workload, network = self._problem.workload, self._problem.site.network
        weights = workload.shares[self._head] @ workload.members
        decode = weights @ workload.prompts.decode_tokens
        tokens = weights @ workload.prompts.prefill_tokens + decode
        passes = weights @ (workload.prompts.prefill_tokens > 0) + decode
        state = 4 * self._trace.model.hidden_size
        total = 0.0
        for number, stage in enumerate(used):
            if stage.server == self._head:
                continue
            back = passes if number == len(used) - 1 else tokens
            there, home = (self._head, stage.server), (stage.server, self._head)
            for at, sent in ((there, tokens), (home, back)):
                total += passes * (network.half_rtt_s[at] + network.hop_overhead_s)
                total += sent * state * network.seconds_per_byte[at]
        return float(total)

    def seconds_of_held(self, held: Mapping[int, tuple[int, int]]) -> float:
        """Of a request where the head executes all layers, and experts of some are elsewhere.

        ``held``: decoder layer -> server and GPU; the others are on the head's first GPU.
        """
        problem, model = self._problem, self._trace.model
        start = problem.site.gpu_start
        on_gpu = np.zeros((int(start[-1]), model.num_layers, model.num_experts), bool)
        for at, layer in enumerate(model.moe_layers):
            server, gpu = held.get(layer, (self._head, 0))
            on_gpu[start[server] + gpu, at] = True
        table = np.repeat(np.arange(len(start) - 1, dtype=np.int32)[:, None], model.num_layers, 1)
        found = latency_of(on_gpu, table, problem.workload, problem.site)
        return float(found.of_home[self._head])
