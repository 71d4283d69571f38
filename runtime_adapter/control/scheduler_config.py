"""The run that a scheduler serves, as the servers of the run tell it through the store: as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from pydantic import TypeAdapter, ValidationError

from prism_plan.cluster import Cluster
from prism_plan.errors import InputError
from prism_plan.evaluate.simulation_options import SimulationOptions
from prism_plan.instance import Instance
from prism_plan.io.model_spec import spec_from_json
from prism_plan.io.placement import placement_from_json, placement_to_json
from prism_plan.model_spec import ModelShape, ModelSpec, require_same_model
from prism_plan.placement import Placement
from prism_plan.trace import Trace

#: The options by which experts move; a scheduler uses no others.
OPTIONS = (
    "migrate", "migrate_every_s", "half_life_s", "horizon_s", "migration_cost", "migrate_solver",
    "seed",
)  # fmt: skip
_SOURCE = "the run's store: scheduler"


@dataclass(frozen=True, eq=False)
class SchedulerConfig:
    """The run that a scheduler serves, and how it reviews.

    ``instance`` has the capacities and rules that placements keep, its activations are not used;
    without a ``cluster`` there are no reviews, only repairs and moves that are requested. A server
    that is silent for ``timeout_s`` is lost. ``kv_tokens`` bound what requests of a home, by its
    name, have in flight. Placements are written to ``placements_dir``, where
    one is given, and reviews that change where layers execute read the requests of a ``trace``;
    both are the scheduler's own process's, and no part of the JSON.
    """

    placement: Placement
    instance: Instance
    model: ModelSpec | None = None
    cluster: Cluster | None = None
    options: SimulationOptions = field(default_factory=SimulationOptions)
    timeout_s: float = 10.0
    placements_dir: str | None = None
    trace: Trace | None = None
    kv_tokens: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The configuration as JSON values, for :meth:`from_json`."""
        instance = self.instance
        options = {name: getattr(self.options, name) for name in OPTIONS}
        if options["half_life_s"] == math.inf:  # which is not JSON
            options["half_life_s"] = "inf"
        return {
            "placement": placement_to_json(self.placement),
            "model": None if self.model is None else self.model.to_json(),
            "cluster": _CLUSTER.dump_python(self.cluster, mode="json"),
            "options": options,
            "timeout_s": self.timeout_s,
            "gpu_capacity": [list(gpus) for gpus in instance.gpu_capacity],
            "layer_caps": list(instance.layer_caps),
            "pinned": [list(rule) for rule in instance.pinned],
            "forbidden": [list(rule) for rule in instance.forbidden],
            "min_replicas": instance.min_replicas,
            "kv_tokens": dict(self.kv_tokens),
        }

    @classmethod
    def from_json(
        cls, values: Any, placements_dir: str | None = None, trace: Trace | None = None
    ) -> Self:
        """The reverse of :meth:`to_json`.

        Raises
        ------
        InputError
            These are no such values.
        WrongModel
            The trace is of another model.
        """
        try:
            placement = placement_from_json(values["placement"], _SOURCE)
            given = values["model"]
            model = None if given is None else spec_from_json(given, _SOURCE)
            cluster = _CLUSTER.validate_python(values["cluster"])
            shape: ModelShape = placement.model
            if model is not None and cluster is not None:
                shape = model.shape()
            if trace is not None:  # which may call the model otherwise than a checkpoint's folder
                of_trace = dataclasses.replace(trace.model, name=shape.name)
                trace = dataclasses.replace(trace, model=of_trace)
                require_same_model(trace.model, shape, source="the store's trace", other="the run")
            options = dict(values["options"])
            if options["half_life_s"] == "inf":
                options["half_life_s"] = math.inf
            instance = Instance(
                model=shape,
                servers=placement.servers,
                activations=np.zeros((placement.num_servers, shape.num_layers, shape.num_experts)),
                gpu_capacity=tuple(map(tuple, values["gpu_capacity"])),
                min_replicas=values["min_replicas"],
                pinned=tuple(map(tuple, values["pinned"])),
                forbidden=tuple(map(tuple, values["forbidden"])),
                layer_caps=tuple(values["layer_caps"]),
                cluster=cluster,
            )
            return cls(
                placement=placement,
                instance=instance,
                model=model,
                cluster=cluster,
                options=SimulationOptions(**options),
                timeout_s=float(values["timeout_s"]),
                placements_dir=placements_dir,
                trace=trace,
                kv_tokens={str(name): int(n) for name, n in values["kv_tokens"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError, ValidationError) as error:
            if isinstance(error, InputError):
                raise
            text = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"{text:.160}", source=_SOURCE) from error


_CLUSTER: TypeAdapter[Cluster | None] = TypeAdapter(Cluster | None)
