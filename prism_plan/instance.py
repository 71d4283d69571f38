"""The planning problem that solvers solve: activations, capacities and rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.deprecated_names import renamed_parameters
from prism_plan.errors import InputError
from prism_plan.expert_capacity import gpu_capacity
from prism_plan.input_limits import MAX_REPLICAS, require_array_size, require_integer
from prism_plan.model_spec import ModelShape, ModelSpec
from prism_plan.placement_rules import rule_triples
from prism_plan.token_rates import TokenRates, activations, expected_token_rates, require_users
from prism_plan.trace import Trace

#: Activations are zero or within these bounds, so that sums and ratios of them stay finite.
MIN_CALLS, MAX_CALLS = 1e-100, 1e100

Pairs = Sequence[tuple[int, int, int]]


@dataclass(frozen=True, eq=False)
class Instance:
    """A planning problem (docs/design.md, section 2). Immutable; `replace` makes a changed copy.

    Whether any placement satisfies it is not checked here (:mod:`prism_plan.instance_feasibility`).

    Parameters
    ----------
    model
        MoE layers, experts, top-k and bytes per expert.
    servers
        Names, [N], all different.
    activations
        f[n, l, e], expected calls of expert e of MoE layer position l caused by requests of server
        n: per second, or relative where servers give a ``weight``. float64 [N, L, E], each 0 or
        from MIN_CALLS to MAX_CALLS; copied and made read-only.
    gpu_capacity
        For each server what each of its GPUs has for experts: a number of them ("slots") where
        all are of one size, else bytes.
    min_replicas
        The least number of servers that hold each (layer, expert) pair.
    pinned, forbidden
        (server, layer position, expert) triples that must, or must not, be held.
    layer_caps
        For each server the most experts of any one layer, or ``None``; empty for no caps.
    cluster, trace
        What the problem was built from, for solvers that plan where layers execute.

    Raises
    ------
    InputError
        No server or a name twice, shapes disagree, the problem is too large, a number is not
        allowed, a rule names a server, layer or expert that is not there, or a triple is both
        pinned and forbidden.
    """

    model: ModelShape
    servers: tuple[str, ...]
    activations: npt.NDArray[np.float64]
    gpu_capacity: tuple[tuple[int, ...], ...]
    min_replicas: int = 1
    pinned: tuple[tuple[int, int, int], ...] = ()
    forbidden: tuple[tuple[int, int, int], ...] = ()
    layer_caps: tuple[int | None, ...] = ()
    cluster: Cluster | None = None
    trace: Trace | None = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "servers", tuple(self.servers))
        set_field(self, "gpu_capacity", tuple(tuple(gpus) for gpus in self.gpu_capacity))
        set_field(self, "pinned", tuple(sorted(set(self.pinned))))
        set_field(self, "forbidden", tuple(sorted(set(self.forbidden))))
        caps = tuple(self.layer_caps) or (None,) * len(self.servers)
        set_field(self, "layer_caps", caps)
        if not self.servers:
            raise InputError("no servers", place="servers", expected="at least one")
        shape = (self.num_servers, self.model.num_layers, self.model.num_experts)
        require_array_size(*shape, "servers", place="servers")
        num_gpus = sum(map(len, self.gpu_capacity))
        require_array_size(num_gpus, *shape[1:], "GPUs", place="servers")
        if len(set(self.servers)) != len(self.servers):
            raise InputError("a name is duplicated", place="servers", expected="different names")
        try:
            calls = np.array(self.activations, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"{error}", place="activations", expected="numbers") from error
        if calls.shape != shape:
            raise InputError(f"shape {calls.shape}", place="activations", expected=f"{shape}")
        invalid = ~((calls == 0) | ((calls >= MIN_CALLS) & (calls <= MAX_CALLS)))
        if invalid.any():
            n, layer, expert = np.argwhere(invalid)[0].tolist()
            raise InputError(
                f"{calls[n, layer, expert]}",
                place=f"activations of server {self.servers[n]!r} "
                + self.model.pair_text(layer * self.model.num_experts + expert),
                expected=f"0, or a number from {MIN_CALLS:g} to {MAX_CALLS:g}",
            )
        calls = calls + 0.0  # turns -0.0 into 0.0
        calls.setflags(write=False)
        set_field(self, "activations", calls)
        if len(self.gpu_capacity) != self.num_servers or len(caps) != self.num_servers:
            raise InputError(
                f"{len(self.gpu_capacity)} capacities and {len(caps)} layer caps",
                place="gpu_capacity",
                expected=f"one for each of {self.num_servers} servers",
            )
        for n, gpus in enumerate(self.gpu_capacity):
            for capacity in (*gpus, caps[n] or 0):
                require_integer(capacity, 0, place=f"server {self.servers[n]!r}")
        require_integer(self.min_replicas, 1, MAX_REPLICAS, "min_replicas")
        for triple in (*self.pinned, *self.forbidden):
            if any(not 0 <= i < size for i, size in zip(triple, shape, strict=True)):
                raise InputError(f"{triple}", place="rules", expected=f"indices below {shape}")
        if both := set(self.pinned) & set(self.forbidden):
            raise InputError(f"{min(both)} is both pinned and forbidden", place="rules")

    def replace(self, **changes: Any) -> Instance:
        """A changed copy, validated again."""
        return dataclasses.replace(self, **changes)

    @property
    def num_servers(self) -> int:
        """N, the number of servers."""
        return len(self.servers)

    @property
    def in_slots(self) -> bool:
        """Whether capacities count experts (all of one size) rather than bytes."""
        return self.model.equal_expert_bytes

    @property
    def expert_size(self) -> npt.NDArray[np.int64]:
        """Size of an expert of each layer in the unit of capacities, int64 [L]: 1, or its bytes."""
        if self.in_slots:
            return np.ones(self.model.num_layers, np.int64)
        return np.array(self.model.expert_bytes_by_layer, np.int64)

    @property
    def slots(self) -> npt.NDArray[np.int64]:
        """C[n], the number of experts that each server can hold, at most J, int64 [N]."""
        assert self.in_slots, "slots have no meaning where experts differ in size"
        pairs = self.model.num_pairs
        return np.array([min(sum(gpus), pairs) for gpus in self.gpu_capacity], np.int64)

    @property
    def max_per_layer(self) -> npt.NDArray[np.int64]:
        """The most experts of any one layer on each server, int64 [N]: its layer cap, at most E."""
        experts = self.model.num_experts
        return np.array([experts if cap is None else min(cap, experts) for cap in self.layer_caps])

    @property
    def has_rules(self) -> bool:
        """Whether there are pins, forbidden experts or layer caps."""
        return bool(self.pinned or self.forbidden or any(c is not None for c in self.layer_caps))

    def mask(self, triples: Pairs) -> npt.NDArray[np.bool_]:
        """Bool [N, L, E], true at the triples."""
        mask = np.zeros(self.activations.shape, bool)
        for n, layer, expert in triples:
            mask[n, layer, expert] = True
        return mask

    @classmethod
    @renamed_parameters(load="token_rates")
    def build(
        cls,
        trace: Trace,
        cluster: Cluster,
        *,
        min_replicas: int = 1,
        token_rates: TokenRates | None = None,
        execution: npt.NDArray[np.int32] | None = None,
        reserve_kv: bool = True,
    ) -> Instance:
        """The problem of serving a trace's tasks on a cluster.

        ``token_rates`` replace those of the cluster's own users. KV caches lie where an
        ``execution`` table int32 [N, L] has layers execute, by default at home; without
        ``reserve_kv`` nowhere, for solvers that plan where layers execute.

        Raises
        ------
        InputError
            No expert is called (:func:`prism_plan.token_rates.require_users`); see
            :func:`prism_plan.token_rates.expected_token_rates` and :meth:`of_cluster`.
        Infeasible
            A GPU is too small for what must reside on it.
        """
        model = trace.model
        require_array_size(cluster.num_servers, model.num_layers, model.num_experts, "servers")
        if token_rates is None:
            require_users(cluster, counts_only=trace.kind == "counts")
            token_rates = expected_token_rates(trace, cluster)
        calls = activations(trace, token_rates)
        if not calls.any():
            raise InputError(
                "the tasks of its servers call no expert in the trace",
                place="server",
                expected="tasks with calls, at a rate above 0",
                remedy="profile them, or name others",
            )
        instance = cls.of_cluster(
            cluster, model, activations=calls, min_replicas=min_replicas, execution=execution,
            reserve_kv=reserve_kv,
        )  # fmt: skip
        return instance.replace(trace=trace)

    @classmethod
    def of_cluster(
        cls,
        cluster: Cluster,
        model: ModelSpec,
        *,
        activations: npt.NDArray[np.float64] | None = None,
        min_replicas: int = 1,
        execution: npt.NDArray[np.int32] | None = None,
        reserve_kv: bool = True,
    ) -> Instance:
        """The capacities and rules of a cluster for a model, by default without any calls.

        KV caches lie where an ``execution`` table int32 [N, L] has layers execute, by default at
        home; without ``reserve_kv`` nowhere.

        Raises
        ------
        InputError
            A rule names a layer or expert that the model does not have; slots are given though
            experts differ in size.
        Infeasible
            A GPU is too small for what must reside on it.
        """
        shape = (cluster.num_servers, model.num_layers, model.num_experts)
        require_array_size(*shape, "servers")
        if activations is None:
            activations = np.zeros(shape)
        reserving = cluster if reserve_kv else _without_kv(cluster)
        return cls(
            model=model.shape(),
            servers=tuple(server.name for server in cluster.servers),
            activations=activations,
            gpu_capacity=gpu_capacity(reserving, model, execution),
            min_replicas=min_replicas,
            pinned=tuple(rule_triples(cluster, model, "pin")),
            forbidden=tuple(rule_triples(cluster, model, "forbid")),
            layer_caps=tuple(server.layer_cap for server in cluster.servers),
            cluster=cluster,
        )

    def without_kv(self, model: ModelSpec) -> Instance:
        """The problem with nothing reserved for KV caches, where its cluster is known."""
        if self.cluster is None:
            return self
        return self.replace(gpu_capacity=gpu_capacity(_without_kv(self.cluster), model))

    def with_execution(self, execution: npt.NDArray[np.int32] | None, model: ModelSpec) -> Instance:
        """The problem with what a table leaves of each GPU, where its cluster is known.

        ``execution`` int32 [N, L], or [tables, N, L] while requests run on any of several.

        Raises
        ------
        Infeasible
            A GPU is too small for what must reside on it.
        """
        if execution is None or self.cluster is None:
            return self
        return self.replace(gpu_capacity=gpu_capacity(self.cluster, model, execution))


def _without_kv(cluster: Cluster) -> Cluster:
    """The cluster with nothing reserved for KV caches."""
    servers = tuple(dataclasses.replace(server, kv_tokens=0) for server in cluster.servers)
    return dataclasses.replace(cluster, servers=servers)
