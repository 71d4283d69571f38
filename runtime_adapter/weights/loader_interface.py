"""The interface of what brings experts to a server's GPUs while it serves, and removes them."""

from __future__ import annotations

from typing import Protocol

from runtime_adapter.transport.rendezvous import Rendezvous
from runtime_adapter.weights.expert_map import ExpertMap
from runtime_adapter.weights.expert_store import Change


class Loader(Protocol):
    """Loads experts to a server's GPUs, counted from 0, and drops them."""

    def connect(self, rendezvous: Rendezvous, expert_map: ExpertMap) -> None:
        """Called once before all, in the worker, whose ``expert_map`` says who holds what.

        Raises
        ------
        RuntimeFailure
            Another server that it needs is not there in time.
        """

    def load(self, pair: int, gpu: int) -> Change:
        """Load an expert; returns when the expert can be computed with.

        Raises
        ------
        PrismError
            It cannot be loaded; nothing has changed.
        """

    def drop(self, pair: int, gpu: int) -> None:
        """Free an expert's slot; the caller knows that nothing computes with it any more."""
