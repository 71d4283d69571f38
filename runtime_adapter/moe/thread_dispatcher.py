"""Between a model and the transport: the layers of a thread go to the thread's lane."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import numpy as np
import torch

from runtime_adapter.moe.dispatch import Dispatcher


class ThreadLocalDispatcher:
    """The dispatcher of a model whose requests run in several threads at once.

    A model has one :class:`~runtime_adapter.moe.placed_experts.Dispatcher`; each request has a
    lane of its own, since a lane has at most one call under way to each server.
    """

    def __init__(self) -> None:
        self._thread = threading.local()

    @contextlib.contextmanager
    def using(self, lane: Dispatcher, request: int) -> Iterator[None]:
        """Let this thread's passes run over a lane, as those of a request of that number."""
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
        """See :class:`~runtime_adapter.moe.placed_experts.Dispatcher`; raises as the lane's."""
        lane: Dispatcher = self._thread.lane
        return lane.run(
            layer_position,
            hidden,
            np.ascontiguousarray(experts.cpu().numpy(), np.int64),
            weights.to(device="cpu", dtype=torch.float32).numpy(),
        )
