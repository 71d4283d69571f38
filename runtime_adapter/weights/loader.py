"""Experts that come to a server's slots while it serves, read from its checkpoint."""

from __future__ import annotations

from pathlib import Path

from runtime_adapter.moe.expert_map import ExpertMap
from runtime_adapter.transport.rendezvous import Rendezvous
from runtime_adapter.weights.checkpoint import Checkpoint
from runtime_adapter.weights.expert_store import Change, ExpertStore


class CheckpointLoader:
    """Reads one expert at a time into the server's store; see :class:`~.agent.Loader`.

    Passed to the worker together with what computes from the same ``store``. The checkpoint is
    opened there, when the first expert is loaded.
    """

    def __init__(self, folder: Path, store: ExpertStore) -> None:
        self.folder = folder
        self.store = store
        self._checkpoint: Checkpoint | None = None

    def connect(self, rendezvous: Rendezvous, table: ExpertMap) -> None:
        """It needs nobody."""

    def load(self, pair: int, gpu: int) -> Change:
        """Read and enter an expert.

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
        """Free an expert's slot."""
        self.store.drop(pair, gpu)
