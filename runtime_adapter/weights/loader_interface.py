"""The interface of what brings experts to a server's GPUs while it serves, and removes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from runtime_adapter.transport.peer import Peer
from runtime_adapter.transport.rendezvous import Rendezvous
from runtime_adapter.weights.expert_map import ExpertMap
from runtime_adapter.weights.expert_store import Change


class Loader(Protocol):
    """Loads experts to a server's GPUs, counted from 0, and drops them."""

    def connect(
        self, rendezvous: Rendezvous, expert_map: ExpertMap, peers: Mapping[int, Peer]
    ) -> None:
        """Called once before all, in the worker.

        ``expert_map`` says who holds what, and ``peers`` lead to the other servers, by rank.
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

    def held(self) -> list[tuple[int, int, int]]:
        """(GPU, pair, slot) of every expert that the server's GPUs hold, GPUs counted from 0.

        A load that has not returned may be among them, or not.
        """
