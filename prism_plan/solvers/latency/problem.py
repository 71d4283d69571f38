"""What a search for the plan of least latency reads: cluster, prompts, memory, and the measure."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.errors import Infeasible
from prism_plan.execution_table import moved_activations
from prism_plan.expert_capacity import capacity_with_kv, kv_bytes
from prism_plan.instance import Instance
from prism_plan.instance_feasibility import require_feasible
from prism_plan.latency.expected_latency import PlanLatency, Site, Workload, latency_of
from prism_plan.latency.idle_time import IdleMeasure
from prism_plan.placement import Placement, SolveReport, gpu_offsets
from prism_plan.placement_check import violations
from prism_plan.simulate.network import Network
from prism_plan.simulate.timing import timing
from prism_plan.solvers.exact import fill_free_slots, solve_flow
from prism_plan.solvers.latency.gpu_packing import GpuPacking
from prism_plan.solvers.packing import (
    expected_load,
    pack_on_gpus,
    reference_local,
    reference_on_gpu,
)
from prism_plan.solvers.pipeline import PipelineProblem
from prism_plan.solvers.shrinkage import shrunk_activations
from prism_plan.token_rates import request_rates
from prism_plan.trace import Trace

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Table = npt.NDArray[np.int32]
Capacity = tuple[tuple[int, ...], ...]

#: The formula is trusted where places, GPUs and links are busy for no more than this share of time.
TRUSTED_SHARE = 0.3
#: Tokens of the trace by which experts are distributed over GPUs.
MAX_TOKENS = 4096


class LatencyProblem:
    """A planning problem with what its plans are measured by.

    ``calls`` [N, L, E] are the activations that the search uses, shrunk where the trace is short;
    ``rates`` [N] requests per second, zero where not all are known, and ``loaded`` whether they
    are; ``weights`` [N] shares of all requests; ``at_home`` bool [N]. ``held_before`` bool
    [N, L, E] is what a ``reference`` placement has on the servers.
    """

    def __init__(
        self, instance: Instance, cluster: Cluster, trace: Trace, seed: int,
        reference: Placement | None = None,
    ) -> None:  # fmt: skip
        self.instance, self.cluster, self.trace, self.seed = instance, cluster, trace, seed
        self.reference, self.held_before = reference, None
        if reference is not None:
            self.held_before = reference_local(instance, reference)
        self.model = trace.model
        self.measure = IdleMeasure(trace.model, cluster, trace, seed)
        self.at_home = np.array([server.execute_at_home for server in cluster.servers])
        rates = request_rates(cluster)
        self.loaded = rates is not None
        self.rates = np.zeros(cluster.num_servers) if rates is None else rates
        self.weights = self.measure.request_weights(cluster)
        self.places = tuple(server.concurrency for server in cluster.servers)
        self.calls = shrunk_activations(trace, cluster)
        prompts = self.measure.prompts
        self.workload = Workload(
            prompts=prompts,
            members=self.measure.members,
            shares=self.measure.shares,
            rates=self.rates,
            weights=self.weights,
            places=self.places,
        )
        self.network = Network.of(cluster, trace.model)
        longest = int((prompts.prefill_tokens + prompts.decode_tokens).max())
        gpu_start = gpu_offsets(len(server.gpus) for server in cluster.servers)
        self.site = Site(
            model=trace.model,
            network=self.network,
            timing=timing(
                cluster, trace.model, max(int(prompts.prefill_tokens.max()), 1), context=longest
            ),
            gpu_start=gpu_start,
            dense_gpu=gpu_start[:-1] + np.array([s.dense_gpu for s in cluster.servers], np.int32),
        )
        self._packing = GpuPacking(self._tokens_together(), instance.expert_size)
        self._packed_layers: dict[tuple[int, ...], Bools] = {}
        self.pipelines = PipelineProblem(instance, cluster, trace, seed, self._pack_layers)

    @property
    def bursts(self) -> bool:
        """Whether links have token buckets (``burst_kb``), which the formula leaves out."""
        return self.network.burst_bytes > 0

    def trusts(self, expected: PlanLatency) -> bool:
        """Whether the formula is close to the simulator: nothing is busy for long, no bursts."""
        return not self.bursts and expected.busiest <= TRUSTED_SHARE

    def as_idle(self) -> LatencyProblem:
        """The same problem for a cluster without queues."""
        idle = copy.copy(self)
        idle.loaded, idle.rates = False, np.zeros_like(self.rates)
        idle.workload = dataclasses.replace(self.workload, rates=idle.rates)
        return idle

    def expected(self, plan: Placement) -> PlanLatency:
        """The expected latency of a plan by the formula."""
        return latency_of(plan.on_gpu, plan.execution_table, self.workload, self.site)

    def capacity(self, table: Table) -> Capacity:
        """What a table leaves of each GPU for experts.

        Raises
        ------
        Infeasible
            A GPU is too small for what must reside on it.
        """
        return capacity_with_kv(self.cluster, self.model, kv_bytes(self.cluster, self.model, table))

    def placed(self, table: Table, whole: Bools, *, fill: bool = True) -> Placement:
        """A plan with a table in which servers hold these layers whole, as far as they may.

        ``whole`` bool [N, L]. What is left of memory goes to the experts that executing servers
        call most, by the exact flow on moved activations, by all rules of the instance; without
        ``fill`` it stays free.

        Raises
        ------
        Infeasible
            The experts do not fit beside the KV caches of the table.
        """
        if not fill:
            layers = np.repeat(whole[:, :, None], self.model.num_experts, axis=2)
            return self.packed(layers, table, self.capacity(table))
        return self.packed(self.experts_for(table, whole), table, self.capacity(table))

    def experts_for(self, table: Table, whole: Bools) -> Bools:
        """What servers hold in :meth:`placed`, bool [N, L, E].

        Raises
        ------
        Infeasible
            The experts do not fit beside the KV caches of the table.
        """
        capacity = self.capacity(table)
        layers = np.repeat(whole[:, :, None], self.model.num_experts, axis=2)
        instance = self.instance.replace(gpu_capacity=capacity)
        require_feasible(instance)
        calls = moved_activations(self.calls, table)
        wanted = calls + 4 * max(float(calls.max()), 1e-30) * layers
        local, _, _ = solve_flow(instance, wanted, self.held_before)
        return local

    def filled(self, plan: Placement) -> Placement | None:
        """A plan with the experts that all call most in its free slots; ``None``: none is free.

        Copies serve when tasks shift, or a server is lost. They may do harm: route `cover` chooses
        among servers that hold the same by what it sent before, not by their links.
        """
        if self.held_before is not None or not self.instance.in_slots:
            return None
        instance = self.instance.replace(gpu_capacity=plan.gpu_capacity)
        local = plan.local.copy()
        fill_free_slots(instance, local)
        if (local == plan.local).all():
            return None
        return self.packed(local, plan.execution_table, plan.gpu_capacity)

    def is_allowed(self, plan: Placement, *, whole_layers: bool = False) -> bool:
        """Whether a plan keeps to replicas, rules and homes, and to ``whole_layers`` where asked.

        Then servers hold layers whole, and each layer of a home executes where it is held, but for
        homes that execute all their layers themselves.
        An existing placement need not, nor need searches that do not know every rule.
        """
        instance = self.instance.replace(gpu_capacity=plan.gpu_capacity)
        if violations(plan, instance=instance):
            return False
        if not whole_layers:
            return True
        partial = plan.local.any(axis=2) & ~plan.local.all(axis=2)
        homes = self.pipelines.idle.has_users & ~self.at_home
        table = plan.execution_table[homes]
        whole = np.asarray(plan.local.all(axis=2))
        held = whole[table, np.arange(table.shape[1])]
        return bool(held.all()) and not partial.any()

    def if_it_fits(self, local: Bools, table: Table) -> Placement | None:
        """A plan of experts ``local`` [N, L, E] with a table, or ``None``."""
        try:
            return self.packed(local, table, self.capacity(table))
        except Infeasible:
            return None

    def loaded_gib(self, plan: Placement) -> float:
        """GiB of experts that a plan loads beyond what servers held before; 0 if that is open."""
        if self.held_before is None:
            return 0.0
        loads = (plan.local & ~self.held_before).sum(axis=(0, 2))
        return float(loads @ np.array(self.model.expert_bytes_by_layer, np.float64)) / 2**30

    def packed(self, local: Bools, table: Table, capacity: Capacity) -> Placement:
        """A plan in which servers hold ``local`` [N, L, E], distributed over their GPUs.

        Raises
        ------
        Infeasible
            They do not fit.
        """
        calls = moved_activations(self.calls, table)
        instance = self.instance
        if self.reference is not None and instance.in_slots:  # experts stay on their GPUs
            if (local.sum(axis=(1, 2)) > [sum(gpus) for gpus in capacity]).any():
                raise Infeasible("experts do not fit", shortfall=1, unit="experts", remedy="")
            moved = instance.replace(gpu_capacity=capacity, activations=calls)
            return self._plan(pack_on_gpus(moved, local, self.reference), table, capacity)
        if self.reference is not None:  # of unequal size: as they lie, where that is all
            on_gpu_before = reference_on_gpu(instance, self.reference)
            used = on_gpu_before.sum(axis=2) @ instance.expert_size
            fits = bool((used <= [room for gpus in capacity for room in gpus]).all())
            if fits and np.array_equal(reference_local(instance, self.reference), local):
                return self._plan(on_gpu_before, table, capacity)
        load = expected_load(calls, local)
        try:
            on_gpu = [
                self._packing.pack(room, local[n], load[n]) for n, room in enumerate(capacity)
            ]
        except ValueError as error:
            raise Infeasible(
                f"{error}", shortfall=1, unit="experts", remedy="add memory"
            ) from error
        return self._plan(np.concatenate(on_gpu), table, capacity)

    def _plan(self, on_gpu: Bools, table: Table, capacity: Capacity) -> Placement:
        instance, report = self.instance, SolveReport("latency")
        return Placement(
            instance.model, instance.servers, capacity, on_gpu, report, execution=table
        )

    def _pack_layers(
        self, capacity: Sequence[int], layers: Sequence[int], instance: Instance, load: Floats
    ) -> Bools:
        """Whole layers on the GPUs of a server, as experts are distributed; each kind once."""
        key = tuple(capacity)
        if key not in self._packed_layers:
            held = np.zeros(load.shape, bool)
            held[list(layers)] = True
            self._packed_layers[key] = self._packing.pack(key, held, load)
        return self._packed_layers[key]

    def _tokens_together(self) -> npt.NDArray[np.uint16]:
        """Experts of the prompts' decode steps, or of all tokens where there are none."""
        prompts = self.measure.prompts
        if not prompts.co_activation or all(len(s.gpus) == 1 for s in self.cluster.servers):
            return prompts.experts[:0]
        rows = [
            np.arange(first + (prefill if decode else 0), first + prefill + decode)
            for first, prefill, decode in zip(
                prompts.first_row.tolist(), prompts.prefill_tokens.tolist(),
                prompts.decode_tokens.tolist(), strict=True,
            )
        ]  # fmt: skip
        chosen = np.concatenate(rows)
        step = -(-len(chosen) // MAX_TOKENS)
        return np.ascontiguousarray(prompts.experts[chosen[::step]])
