"""One step of a migration, a load or drop of an expert, and what a drop may leave too few of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class MigrationStep:
    """Load an expert onto a GPU, or drop it there, once the steps ``needs`` are complete.

    ``gpu`` counts the GPUs of all servers in order, ``pair`` is ``l * E + e``. A load takes its
    slot when it starts, and the replica serves when the load is complete; a drop takes no time.
    ``temporary`` steps are not part of the difference between the placements: a replica that is
    loaded only to free a slot elsewhere, or one that is dropped and loaded again.
    """

    kind: Literal["load", "drop"]
    gpu: int
    pair: int
    needs: tuple[int, ...] = ()
    temporary: bool = False


@dataclass(frozen=True, slots=True)
class ReplicaDip:
    """An expert that has fewer copies than are wanted during a part of a migration.

    From the drop that is step ``drop`` until the load that is step ``load`` is complete, ``pair``
    may be held by only ``copies`` servers instead of ``wanted``.
    """

    pair: int
    wanted: int
    copies: int
    drop: int
    load: int
