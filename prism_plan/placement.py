"""Which GPU holds which expert, and which server executes which layer for whom."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.execution_table import executed_elsewhere, executes_at_home, home_execution
from prism_plan.model_spec import ModelShape

Termination = Literal["optimal", "heuristic", "time_limit"]
#: The ``solver`` of the baseline in which servers do not call each other.
OFFLOAD = "offload"


@dataclass(frozen=True)
class SolveReport:
    """How a solver made a placement: solver, objective, bound, seed and time.

    ``remote_share`` is that of the instance that was solved, ``bound`` a proven lower bound on that
    of any placement, where one is known. ``assumed`` has a short text for each group of figures
    that the solver used and that the cluster file does not give
    (:func:`prism_plan.assumed_figures.assumed_texts`). ``extra`` holds further values, such as the
    relative ``gap`` that is left when a limit stops the solver.
    """

    solver: str
    objective: str = "remote"
    remote_share: float | None = None
    bound: float | None = None
    termination: Termination = "heuristic"
    seed: int = 0
    runtime_s: float = 0.0
    min_replicas: int = 1
    assumed: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class InputFile:
    """A file that a placement was planned from."""

    name: str
    sha256: str


@dataclass(frozen=True, eq=False)
class Placement:
    """Which GPU holds which (layer, expert); `placement_check.violations` says if it is feasible.

    ``gpu_capacity`` is as in :class:`~prism_plan.instance.Instance`; ``on_gpu`` is bool
    [G, L, E] over the GPUs of all servers in order, copied and made read-only. ``execution`` int32
    [N, L] is the server that executes each MoE layer for requests of each home server, ``None``
    where that is the home everywhere (docs/design.md, section 10). With a table, ``kv_tokens`` says
    for how many tokens of whose users the KV cache has memory, and ``execute_at_home`` which
    servers keep all layers of their users at home.
    """

    model: ModelShape
    servers: tuple[str, ...]
    gpu_capacity: tuple[tuple[int, ...], ...]
    on_gpu: npt.NDArray[np.bool_]
    plan: SolveReport
    inputs: Mapping[str, InputFile] = field(default_factory=dict)
    execution: npt.NDArray[np.int32] | None = None
    kv_tokens: Mapping[str, int] = field(default_factory=dict)
    execute_at_home: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        held = np.array(self.on_gpu, dtype=bool)
        shape = (
            sum(len(gpus) for gpus in self.gpu_capacity),
            self.model.num_layers,
            self.model.num_experts,
        )
        if held.shape != shape or len(self.servers) != len(self.gpu_capacity):
            raise ValueError(f"on_gpu has shape {held.shape}, expected {shape}")
        held.setflags(write=False)
        object.__setattr__(self, "on_gpu", held)
        if self.execution is not None:
            object.__setattr__(self, "execution", self._checked_table(self.execution))

    def _checked_table(self, execution: npt.ArrayLike) -> npt.NDArray[np.int32] | None:
        table = np.array(execution)
        shape = (self.num_servers, self.model.num_layers)
        if table.shape != shape or table.dtype.kind not in "iu":
            raise ValueError(f"execution is {table.dtype} {table.shape}, expected integers {shape}")
        if not ((table >= 0) & (table < self.num_servers)).all():
            raise ValueError(f"execution names a server beyond 0..{self.num_servers - 1}")
        if executes_at_home(table):
            return None
        table = table.astype(np.int32)
        table.setflags(write=False)
        return table

    def replace(self, **changes: Any) -> Placement:
        """A changed copy, validated again."""
        return dataclasses.replace(self, **changes)

    @property
    def num_servers(self) -> int:
        """N, the number of servers."""
        return len(self.servers)

    @property
    def server_of_gpu(self) -> npt.NDArray[np.int64]:
        """Index of the server of each GPU, int64 [G]."""
        return server_of_gpu(self.gpu_capacity)

    @property
    def local(self) -> npt.NDArray[np.bool_]:
        """Whether any GPU of a server holds the expert, bool [N, L, E]."""
        local = np.zeros((self.num_servers, *self.on_gpu.shape[1:]), bool)
        for g, n in enumerate(self.server_of_gpu):
            local[n] |= self.on_gpu[g]
        return local

    @property
    def execution_table(self) -> npt.NDArray[np.int32]:
        """The server that executes each layer for requests of each home server, int32 [N, L]."""
        if self.execution is not None:
            return self.execution
        return home_execution(self.num_servers, self.model.num_layers)

    @property
    def local_to_execution(self) -> npt.NDArray[np.bool_]:
        """Whether the server that executes layer l for home n holds the expert, bool [N, L, E].

        A call is remote where it does not; with every layer executed at home it is :attr:`local`.
        """
        local = self.local
        if self.execution is None:
            return local
        return local[self.execution, np.arange(self.model.num_layers)]

    def on_gpus_of(self, name: str) -> npt.NDArray[np.bool_]:
        """What the GPUs of the named server hold, [GPUs, L, E]; empty without such a server."""
        server = self.servers.index(name) if name in self.servers else -1
        return self.on_gpu[self.gpus_of(server)]

    def gpus_of(self, server: int) -> npt.NDArray[np.int64]:
        """Indices into the G axis of the GPUs of a server."""
        return np.flatnonzero(self.server_of_gpu == server)


def require_home_execution(placement: Placement, *, source: object = "") -> None:
    """Refuse a placement with an execution table, for those that cannot execute one.

    Raises
    ------
    InputError
        Some layer executes on another server than the request's home.
    """
    if placement.execution is None:
        return
    n, layer = np.argwhere(executed_elsewhere(placement.execution))[0]
    raise InputError(
        f"2: layer {placement.model.moe_layers[layer]} of {placement.servers[n]} executes on "
        f"{placement.servers[placement.execution[n, layer]]}",
        source=source,
        place="version",
        expected="1, where every layer executes at home",
        remedy="plan it with every layer at home",
    )


def first_gpus(
    on_gpu: npt.NDArray[np.bool_], server_of_gpu: npt.NDArray[np.integer], num_servers: int
) -> npt.NDArray[np.int32]:
    """The first GPU of each server that holds a pair, or -1, int32 [N, J], of bool [G, J]."""
    found = np.full((num_servers, on_gpu.shape[1]), -1, np.int32)
    for g in range(len(on_gpu) - 1, -1, -1):
        found[server_of_gpu[g], on_gpu[g]] = g
    return found


def gpu_offsets(num_gpus: Iterable[int]) -> npt.NDArray[np.int32]:
    """Index of each server's first GPU in the order of all, and their number, int32 [N + 1]."""
    return np.cumsum([0, *num_gpus], dtype=np.int32)


def server_of_gpu(gpu_capacity: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    """Index of the server of each GPU, int64 [G]."""
    return np.repeat(np.arange(len(gpu_capacity)), [len(gpus) for gpus in gpu_capacity])
