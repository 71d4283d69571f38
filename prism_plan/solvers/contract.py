"""The contract of all solvers: options in, a result out, and the features that each supports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.deprecated_names import renamed_fields
from prism_plan.errors import InputError, UnsupportedFeature
from prism_plan.input_limits import MAX_SEED, require_integer
from prism_plan.instance import MAX_CALLS, Instance
from prism_plan.placement import Placement, Termination
from prism_plan.trace import Trace


class Feature(StrEnum):
    """Parts of a planning problem that not every solver supports."""

    MIN_REPLICAS = "min_replicas above 1"
    RULES = "pinned experts, forbidden experts and layer caps"
    LOAD_PRICE = "planning near an existing placement"
    UNEQUAL_BYTES = "experts of unequal size"


@renamed_fields(near="reference")
@dataclass(frozen=True)
class Options:
    """Options of a solve. Frozen: the same options serve any number of solves.

    Parameters
    ----------
    seed
        Seed of solvers that draw random numbers.
    time_limit_s
        Wall time for the search of `ilp`, no limit by default; `latency` searches on until then,
        and stops by work without it.
    backend
        Back end of `ilp`: ``"highs"`` or ``"cbc"``.
    reference
        An existing placement; each expert that a server does not hold in it costs ``load_price``,
        and of equally good placements the one with fewer loads is chosen.
    load_price
        Price of a load in the unit of the activations (calls per second): an expert is loaded only
        where it saves more remote calls than this. For `latency` seconds of mean request latency a
        GiB that is newly loaded.
    whole_layers
        `latency` plans whole layers only, on one server each or several.

    Raises
    ------
    InputError
        A value is out of range.
    """

    seed: int = 0
    time_limit_s: float | None = None
    backend: Literal["highs", "cbc"] = "highs"
    reference: Placement | None = None
    load_price: float = 0.0
    whole_layers: bool = False

    def __post_init__(self) -> None:
        require_integer(self.seed, 0, MAX_SEED, "seed")
        if self.time_limit_s is not None and not 0 < self.time_limit_s < float("inf"):
            raise InputError(
                f"{self.time_limit_s}", parameter="time_limit_s", expected="seconds above 0"
            )
        if self.backend not in ("highs", "cbc"):
            raise InputError(f"{self.backend!r}", parameter="backend", expected="highs or cbc")
        if not 0 <= self.load_price <= MAX_CALLS:
            raise InputError(
                f"{self.load_price}",
                parameter="load_price",
                expected=f"a number from 0 to {MAX_CALLS:g}",
            )
        if self.load_price > 0 and self.reference is None:
            raise InputError(
                "a price without a placement to stay near",
                parameter="load_price",
                remedy="give the existing placement as ``reference``",
            )


def cluster_and_trace(instance: Instance, solver: str) -> tuple[Cluster, Trace]:
    """What solvers that plan where layers execute need of an instance.

    Raises
    ------
    UnsupportedFeature
        The instance was built without.
    """
    if instance.cluster is None or instance.trace is None:
        raise UnsupportedFeature(
            f"solver {solver!r} needs the links of a cluster and the steps of a trace; build the "
            "instance with Instance.build(trace, cluster)"
        )
    return instance.cluster, instance.trace


@dataclass(frozen=True, eq=False)
class SolverResult:
    """Which server holds which expert, as a solver found it.

    ``local`` is bool [N, L, E]; a solver that decides on GPUs itself gives ``on_gpu`` bool
    [G, L, E] too. ``bound`` is a proven lower bound on the objective (calls per second, loads
    priced), ``runtime_s`` the time of the search without compilation, ``extra`` further entries
    of the :class:`~prism_plan.placement.SolveReport`, ``objective`` is what the solver minimises:
    "remote" calls or "latency". ``execution`` int32 [N, L] is the execution
    table of solvers that plan one, and ``gpu_capacity`` what it leaves of each GPU for experts.
    """

    local: npt.NDArray[np.bool_]
    termination: Termination = "heuristic"
    bound: float | None = None
    on_gpu: npt.NDArray[np.bool_] | None = None
    runtime_s: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    objective: str = "remote"
    execution: npt.NDArray[np.int32] | None = None
    gpu_capacity: tuple[tuple[int, ...], ...] | None = None

    @classmethod
    def of_plan(cls, plan: Placement, extra: Mapping[str, Any]) -> SolverResult:
        """The result of a solver that plans GPUs and an execution table, for the least latency."""
        return cls(
            plan.local,
            on_gpu=plan.on_gpu,
            execution=plan.execution_table,
            gpu_capacity=plan.gpu_capacity,
            objective="latency",
            extra=extra,
        )


@dataclass(frozen=True)
class Solver:
    """A function from an instance to a result, with the features that it supports.

    ``summary`` and ``guarantee`` describe it in the documentation.
    """

    name: str
    summary: str
    guarantee: str
    function: Callable[[Instance, Options], SolverResult]
    supports: frozenset[Feature] = frozenset()

    def __call__(self, instance: Instance, options: Options) -> SolverResult:
        return self.function(instance, options)
