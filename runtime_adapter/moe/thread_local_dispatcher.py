"""Sends the layers of a model's calling thread over that thread's lane."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import numpy as np
import torch

from runtime_adapter.moe.remote_dispatcher import RemoteDispatcher


class ThreadLocalDispatcher:
    """An :class:`~.placed_experts.ExpertBackend` that passes calls to the calling thread's lane.

    A model has one backend, but several threads run requests through it at once, and a lane (a
    :class:`RemoteDispatcher`) can serve only one request at a time. A thread sets its lane with
    :meth:`using`; :meth:`run` works only inside that block.
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
