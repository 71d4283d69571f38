"""Which servers hold which experts, as this server knows it; it changes one expert at a time."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from prism_plan.placement import Placement


class ExpertMap:
    """Holders of each (layer, expert) pair; changed by loads, drops and losses, read by the router.

    ``gpu_of`` int32 [N, J] is the first GPU of a server that holds a pair, -1 if none does.
    ``holder`` int32 [J, N] lists a pair's servers in ascending order, of which the first
    ``num_replicas`` [J] count. These are the simulator's arrays, so choices by them are equal.
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
        self.num_replicas = np.zeros(pairs, np.int32)
        for pair in range(pairs):
            self._refresh(pair)

    def _refresh(self, pair: int) -> None:
        gpus = np.full(len(self.servers), -1, np.int32)
        for g in np.flatnonzero(self._held[:, pair])[::-1]:
            gpus[self._server[g]] = g
        gpus[self._lost] = -1
        holders = np.flatnonzero(gpus >= 0)
        # routers read at any moment: in between they see holders of now or of before
        self.gpu_of[:, pair] = gpus
        self.holder[pair, : len(holders)] = holders
        self.num_replicas[pair] = len(holders)

    def change(self, gpu: int, pair: int, held: bool) -> None:
        """A GPU (in the order of all servers) holds a pair from now on, or no longer."""
        with self._lock:
            self._held[gpu, pair] = held
            self._refresh(pair)

    def lose(self, server: int) -> None:
        """A server is lost: no call goes to it any more."""
        with self._lock:
            self._lost[server] = True
            for pair in range(len(self.num_replicas)):
                self._refresh(pair)

    def lost(self, server: int) -> bool:
        """Whether the server is lost."""
        return bool(self._lost[server])

    def lost_names(self) -> list[str]:
        """The servers that are lost."""
        return [name for n, name in enumerate(self.servers) if self._lost[n]]

    def on_gpu(self) -> npt.NDArray[np.bool_]:
        """What every GPU holds now, bool [G, J]."""
        with self._lock:
            return self._held.copy()

    def held_by(self, server: int) -> npt.NDArray[np.bool_]:
        """What the GPUs of a server hold now, bool [G of it, J]."""
        with self._lock:
            held: npt.NDArray[np.bool_] = self._held[self._server == server]
        return held
