"""Sends the layers of a model's calling thread over that thread's lane."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import numpy as np
import torch

from runtime_adapter.moe.remote_dispatcher import RemoteDispatcher


class ThreadLocalDispatcher:
    """The :class:`~.placed_experts.ExpertBackend` of a model that several threads use at once.

    A model has one backend; each request has a lane of its own, since a lane has at most one call
    in flight to each server.
    """

    def __init__(self) -> None:
        self._thread = threading.local()

    @contextlib.contextmanager
    def using(self, lane: RemoteDispatcher, request: int) -> Iterator[None]:
        """In the block, this thread's passes use a lane, as those of a request of that number."""
        lane.request = request
        self._thread.lane = lane
        try:
            yield
        finally:
            del self._thread.lane

    def run(
        self,
        layer_position: int,
        hidden: torch.Tensor,
        experts: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """See :class:`~.placed_experts.ExpertBackend`; raises as the lane's."""
        lane: RemoteDispatcher = self._thread.lane
        return lane.run(
            layer_position,
            hidden,
            np.ascontiguousarray(experts.cpu().numpy(), np.int64),
            weights.to(device="cpu", dtype=torch.float32).numpy(),
        )
