"""One step of a migration: an expert that a GPU loads or drops."""

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
