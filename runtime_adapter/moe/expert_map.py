"""Who holds what, as this server knows it; changes come one expert at a time."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.placement import Placement


class ExpertMap:
    """Servers that hold each pair; changed by loads, drops and losses, read by the router.

    ``gpu_of`` int32 [N, J] is the first GPU of a server that holds a pair, -1 if none does;
    ``holder`` int32 [J, N] the servers ascending, of which the first ``copies`` [J] count: the
    same tables, and so the same choices, as the simulator's.
    """

    def __init__(self, placement: Placement) -> None:
        self.servers = placement.servers
        self._lock = threading.Lock()
        gpus = placement.on_gpu.shape[0]
        self._held = placement.on_gpu.reshape(gpus, -1).copy()
        self._server = placement.server_of_gpu
        self._lost = np.zeros(len(self.servers), bool)
        pairs = self._held.shape[1]
        self.gpu_of = np.full((len(self.servers), pairs), -1, np.int32)
        self.holder = np.zeros((pairs, len(self.servers)), np.int32)
        self.copies = np.zeros(pairs, np.int32)
        self.version = 0
        for pair in range(pairs):
            self._refresh(pair)

    def _refresh(self, pair: int) -> None:
        gpus = np.full(len(self.servers), -1, np.int32)
        for g in np.flatnonzero(self._held[:, pair])[::-1]:
            gpus[self._server[g]] = g
        gpus[self._lost] = -1
        alive = np.flatnonzero(gpus >= 0)
        # routers read at any moment: what they see in between names holders of now or of before
        self.gpu_of[:, pair] = gpus
        self.holder[pair, : len(alive)] = alive
        self.copies[pair] = len(alive)

    def change(self, gpu: int, pair: int, held: bool) -> None:
        """A GPU (in the order of all servers) has a pair from now on, or no longer."""
        with self._lock:
            self._held[gpu, pair] = held
            self._refresh(pair)
            self.version += 1

    def lose(self, server: int) -> None:
        """A server is not there any more: no call goes to it."""
        with self._lock:
            self._lost[server] = True
            for pair in range(len(self.copies)):
                self._refresh(pair)
            self.version += 1

    def lost(self, server: int) -> bool:
        """Whether the server is lost."""
        return bool(self._lost[server])

    def on_gpu(self) -> npt.NDArray[np.bool_]:
        """What is held now, bool [G, J]."""
        with self._lock:
            return self._held.copy()

    def held_by(self, server: int) -> npt.NDArray[np.bool_]:
        """What the GPUs of a server hold now, bool [G of it, J]."""
        with self._lock:
            held: npt.NDArray[np.bool_] = self._held[self._server == server]
        return held

    def arrays(self) -> tuple[Any, Any, Any]:
        """``gpu_of``, ``holder`` and ``copies``, one consistent copy."""
        with self._lock:
            return self.gpu_of.copy(), self.holder.copy(), self.copies.copy()
