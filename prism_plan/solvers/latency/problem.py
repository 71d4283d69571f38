"""What a search for the plan of least latency reads: cluster, prompts, memory, and the measure."""

from __future__ import annotations

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
from prism_plan.simulate.network import Network
from prism_plan.simulate.timing import timing
from prism_plan.solvers.exact import solve_flow
from prism_plan.solvers.latency.gpus import deal_experts
from prism_plan.solvers.packing import expected_load
from prism_plan.solvers.shrinkage import shrunk_activations
from prism_plan.token_rates import request_rates
from prism_plan.trace import Trace

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Table = npt.NDArray[np.int32]
Capacity = tuple[tuple[int, ...], ...]

#: Tokens of the trace by which experts are distributed over GPUs.
MAX_TOKENS = 4096


class LatencyProblem:
    """A planning problem with what its plans are measured by.

    ``calls`` [N, L, E] are the activations that the search uses, shrunk where the trace is short;
    ``rates`` [N] requests per second, zero where not all are known, and ``loaded`` whether they
    are; ``weights`` [N] shares of all requests; ``at_home`` bool [N].
    """

    def __init__(self, instance: Instance, cluster: Cluster, trace: Trace, seed: int) -> None:
        self.instance, self.cluster, self.trace, self.seed = instance, cluster, trace, seed
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
        self._tokens = self._tokens_together()

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

    def placed(self, table: Table, whole: Bools) -> Placement:
        """A plan with a table in which servers hold these layers whole, as far as they may.

        ``whole`` bool [N, L]. What is left of memory goes to the experts that executing servers
        call most, by the exact flow on moved activations, by all rules of the instance.

        Raises
        ------
        Infeasible
            The experts do not fit beside the KV caches of the table.
        """
        capacity = self.capacity(table)
        instance = self.instance.replace(gpu_capacity=capacity)
        require_feasible(instance)
        calls = moved_activations(self.calls, table)
        wanted = calls + 4 * max(float(calls.max()), 1e-30) * whole[:, :, None]
        local, _, _ = solve_flow(instance, wanted)
        return self.packed(local, table, capacity)

    def packed(self, local: Bools, table: Table, capacity: Capacity) -> Placement:
        """A plan in which servers hold ``local`` [N, L, E], distributed over their GPUs.

        Raises
        ------
        Infeasible
            They do not fit.
        """
        load = expected_load(moved_activations(self.calls, table), local)
        size = self.instance.expert_size
        try:
            on_gpu = [
                deal_experts(room, local[n], size, load[n], self._tokens)
                for n, room in enumerate(capacity)
            ]
        except ValueError as error:
            raise Infeasible(
                f"{error}", shortfall=1, unit="experts", remedy="add memory"
            ) from error
        instance = self.instance
        return Placement(
            instance.model, instance.servers, capacity, np.concatenate(on_gpu),
            SolveReport("latency"), execution=table,
        )  # fmt: skip

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
