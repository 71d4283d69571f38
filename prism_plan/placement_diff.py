"""The difference between two placements: which experts each server loads, drops or shifts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.model_spec import ModelShape, require_same_model
from prism_plan.placement import Placement


@dataclass(frozen=True, eq=False)
class PlacementDiff:
    """Experts that each server loads, drops, or moves between its GPUs, from ``a`` to ``b``.

    ``servers`` are those of ``b`` and then those only in ``a``. ``loads``, ``drops`` and ``shifts``
    are bool [servers, L, E]: experts that a server newly holds, holds no more, or holds on another
    GPU, which takes a load too. ``reroutes`` bool [servers, L] are layers that execute on another
    server for requests of this home; new requests follow them.
    """

    model: ModelShape
    servers: tuple[str, ...]
    loads: npt.NDArray[np.bool_]
    drops: npt.NDArray[np.bool_]
    shifts: npt.NDArray[np.bool_]
    reroutes: npt.NDArray[np.bool_]

    def bytes_of(self, moved: npt.NDArray[np.bool_]) -> int:
        """Bytes of the experts in a [..., L, E] mask."""
        per_layer = moved.reshape(-1, *moved.shape[-2:]).sum(axis=(0, 2)).tolist()
        sizes = self.model.expert_bytes_by_layer
        return sum(count * size for count, size in zip(per_layer, sizes, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Totals, then per server and per layer; experts are [layer, expert] pairs."""
        kinds = {"loads": self.loads, "drops": self.drops, "shifts": self.shifts}
        layers = np.array(self.model.moe_layers)
        rerouted = [{"reroutes": layers[row].tolist()} for row in self.reroutes]
        if not self.reroutes.any():  # as before there were execution tables
            rerouted = [{} for _ in rerouted]
        return {
            "format": "prism-plan/diff",
            "version": 1,
            **{key: int(mask.sum()) for key, mask in kinds.items()},
            "moved_bytes": self.bytes_of(self.loads | self.shifts),
            "servers": [
                {
                    "name": name,
                    **{key: self._pairs(mask[n]) for key, mask in kinds.items()},
                    "moved_bytes": self.bytes_of((self.loads | self.shifts)[n]),
                    **rerouted[n],
                }
                for n, name in enumerate(self.servers)
            ],
            "layers": [
                {
                    "layer": layer,
                    **{key: int(mask[:, at].sum()) for key, mask in kinds.items()},
                }
                for at, layer in enumerate(self.model.moe_layers)
            ],
        }

    def _pairs(self, mask: npt.NDArray[np.bool_]) -> list[list[int]]:
        return [[self.model.moe_layers[layer], int(e)] for layer, e in np.argwhere(mask)]


def diff(a: Placement, b: Placement, names: tuple[str, str] = ("A", "B")) -> PlacementDiff:
    """Compare two placements, whose servers are matched by name.

    Raises
    ------
    WrongModel
        They place different models.
    """
    require_same_model(a.model, b.model, source=names[0], other=names[1])
    servers = (*b.servers, *(name for name in a.servers if name not in b.servers))
    shape = (len(servers), *b.on_gpu.shape[1:])
    loads, drops, shifts = (np.zeros(shape, bool) for _ in range(3))
    for n, name in enumerate(servers):
        before, after = a.on_gpus_of(name), b.on_gpus_of(name)
        width = max(len(before), len(after))
        before, after = (
            np.pad(held, ((0, width - len(held)), (0, 0), (0, 0))) for held in (before, after)
        )
        had, has = before.any(axis=0), after.any(axis=0)
        loads[n] = has & ~had
        drops[n] = had & ~has
        shifts[n] = had & has & (after & ~before).any(axis=0)
    reroutes = np.zeros(shape[:2], bool)
    for n, name in enumerate(servers):
        if name in a.servers and name in b.servers:
            before_at, after_at = (
                [placed.servers[m] for m in placed.execution_table[placed.servers.index(name)]]
                for placed in (a, b)
            )
            reroutes[n] = [x != y for x, y in zip(before_at, after_at, strict=True)]
    return PlacementDiff(b.model, servers, loads, drops, shifts, reroutes)
