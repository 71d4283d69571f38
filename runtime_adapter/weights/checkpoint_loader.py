"""Loads experts from the server's checkpoint while it serves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from runtime_adapter.transport.peer import Peer
from runtime_adapter.transport.rendezvous import Rendezvous
from runtime_adapter.weights.checkpoint import Checkpoint
from runtime_adapter.weights.expert_map import ExpertMap
from runtime_adapter.weights.expert_store import Change, ExpertStore


class CheckpointLoader:
    """A :class:`~runtime_adapter.weights.loader_interface.Loader` that reads one expert at a time.

    Passed to the worker together with what computes from the same ``store``. The checkpoint is
    opened there, when the first expert is loaded.
    """

    def __init__(self, folder: Path, store: ExpertStore) -> None:
        self.folder = folder
        self.store = store
        self._checkpoint: Checkpoint | None = None

    def connect(
        self, rendezvous: Rendezvous, expert_map: ExpertMap, peers: Mapping[int, Peer]
    ) -> None:
        """It needs no other server."""

    def load(self, pair: int, gpu: int) -> Change:
        """Read an expert into a free slot.

        Raises
        ------
        InputError
            The checkpoint cannot be read or lacks it, or the GPU has no free slot.
        """
        if self._checkpoint is None:
            self._checkpoint = Checkpoint(self.folder)
        checkpoint = self._checkpoint
        parts = checkpoint.expert(*divmod(pair, checkpoint.spec.num_experts))
        return self.store.put(pair, gpu, parts)

    def drop(self, pair: int, gpu: int) -> None:
        self.store.drop(pair, gpu)

    def held(self) -> list[tuple[int, int, int]]:
        return self.store.held()
