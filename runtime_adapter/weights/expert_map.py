"""Which servers hold which experts, as this server knows it; it changes one expert at a time.

A server is left out for two reasons. It is *suspect* while it does not answer this server, which is
this server's own opinion and ends when it answers again. It is *down* when the log says so, and
comes back by joining anew, with what it holds then.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from prism_plan.placement import Placement

Ints = npt.NDArray[np.int32]

#: A repair of what was lost with a server begins within so long, if there is one.
REPAIR_BEGINS_S = 4.0


class ExpertMap:
    """Holders of each (layer, expert) pair; changed by loads, drops and losses, read by the router.

    ``gpu_of`` int32 [N, J] is the first GPU of a server that holds a pair, -1 if none does or the
    server is suspect or down. ``holder`` int32 [J, N] lists a pair's servers in ascending order, of
    which the first ``num_replicas`` [J] count. These are the simulator's arrays, so choices by them
    are equal.
    """

    def __init__(self, placement: Placement) -> None:
        self.servers = placement.servers
        self._changed = threading.Condition()
        gpus = placement.on_gpu.shape[0]
        self._held = placement.on_gpu.reshape(gpus, -1).copy()
        self._server = placement.server_of_gpu
        self._suspect = np.zeros(len(self.servers), bool)
        self._down = np.zeros(len(self.servers), bool)
        pairs = self._held.shape[1]
        self.gpu_of = np.full((len(self.servers), pairs), -1, np.int32)
        self.holder = np.zeros((pairs, len(self.servers)), np.int32)
        self.num_replicas = np.zeros(pairs, np.int32)
        #: Counts changes, for :meth:`wait_for_change`.
        self.version = 0
        self._migrating = False
        self._members_changed_s = time.monotonic()
        self._refresh_all()

    # ------------------------------------------------------------------------------------- changes

    def change(self, gpu: int, pair: int, held: bool) -> None:
        """A GPU (in the order of all servers) holds a pair from now on, or no longer."""
        with self._changed:
            self._held[gpu, pair] = held
            self._refresh(pair)
            self._notify()

    def suspect(self, server: int) -> None:
        """A server does not answer this one: no call goes to it until it does."""
        self._set_suspect(server, True)

    def unsuspect(self, server: int) -> None:
        """A server answers this one again."""
        self._set_suspect(server, False)

    def set_down(self, server: int) -> None:
        """The log says that a server is down or has left; what it held is gone with it."""
        self.set_all({}, [server])

    def set_up(self, server: int, held: Iterable[tuple[int, int]]) -> None:
        """The log says that a server has joined, with exactly these (GPU of the run, pair)."""
        self.set_all({server: held})

    def set_all(
        self, up: Mapping[int, Iterable[tuple[int, int]]], down: Iterable[int] = ()
    ) -> None:
        """Several servers have joined, or are down, all at once.

        What others still hold is never missing in between. Those that are up may stay suspect.
        """
        down = list(down)
        with self._changed:
            for server in (*up, *down):
                self._held[self._server == server] = False
            for server, held in up.items():
                self._down[server] = False
                for gpu, pair in held:
                    self._held[gpu, pair] = True
            for server in down:
                self._down[server], self._suspect[server] = True, False
            self._members_changed_s = time.monotonic()
            self._refresh_all()
            self._notify()

    def set_migrating(self, migrating: bool) -> None:
        """The log says that a migration is in progress, or that there is none any more."""
        with self._changed:
            if self._migrating != migrating:
                self._migrating = migrating
                self._notify()

    def _set_suspect(self, server: int, suspect: bool) -> None:
        with self._changed:
            if self._suspect[server] != suspect:
                self._suspect[server] = suspect
                self._refresh_all()
                self._notify()

    def _notify(self) -> None:
        self.version += 1
        self._changed.notify_all()

    def _refresh(self, pair: int) -> None:
        gpus = np.full(len(self.servers), -1, np.int32)
        for g in np.flatnonzero(self._held[:, pair])[::-1]:
            gpus[self._server[g]] = g
        gpus[self._suspect | self._down] = -1
        holders = np.flatnonzero(gpus >= 0)
        # routers read at any moment: in between they see holders of now or of before
        self.gpu_of[:, pair] = gpus
        self.holder[pair, : len(holders)] = holders
        self.num_replicas[pair] = len(holders)

    def _refresh_all(self) -> None:
        gpu_of = np.full_like(self.gpu_of, -1)
        for gpu in range(len(self._held))[::-1]:
            server = self._server[gpu]
            if not self._suspect[server] and not self._down[server]:
                gpu_of[server, self._held[gpu]] = gpu
        holder, num_replicas = _list_holders(gpu_of)
        # as in _refresh, entries beyond a pair's holders stay what they were
        self.gpu_of[:] = gpu_of
        counted = np.arange(len(self.servers)) < num_replicas[:, None]
        np.copyto(self.holder, holder, where=counted)
        self.num_replicas[:] = num_replicas

    # ----------------------------------------------------------------------------------- questions

    def lost(self, server: int) -> bool:
        """Whether the server is suspect or down."""
        return bool(self._suspect[server] or self._down[server])

    def down(self, server: int) -> bool:
        """Whether the server is down, as the log has it."""
        return bool(self._down[server])

    def may_be_repaired(self) -> bool:
        """Whether what nobody holds may be loaded soon.

        A migration is in progress, or servers have come or gone so recently that one may begin.
        """
        changed_s = time.monotonic() - self._members_changed_s
        return self._migrating or changed_s < REPAIR_BEGINS_S

    def lost_names(self) -> list[str]:
        """The servers that are suspect or down."""
        return [name for n, name in enumerate(self.servers) if self.lost(n)]

    def down_names(self) -> list[str]:
        """The servers that are down."""
        return [name for n, name in enumerate(self.servers) if self._down[n]]

    def holders_suspect(self, pair: int) -> list[int]:
        """The servers that hold a pair and are suspect but not down."""
        with self._changed:
            silent = self._suspect & ~self._down
            holders = {int(self._server[g]) for g in np.flatnonzero(self._held[:, pair])}
            return sorted(n for n in holders if silent[n])

    def without(self, avoided: Sequence[int]) -> tuple[Ints, Ints]:
        """``holder`` and ``num_replicas`` without some servers, where a pair has other holders.

        A pair that only avoided servers hold has one holder, the first of them in ``avoided``.
        """
        place = np.full(len(self.servers), -1)
        place[list(avoided)] = np.arange(len(avoided))
        with self._changed:
            places = np.where(self.gpu_of >= 0, place[:, None], len(avoided))
            used = (places == places.min(axis=0)) & (places < len(avoided))
            return _list_holders(np.where(used, self.gpu_of, -1))

    def wait_for_change(self, timeout_s: float, since: int | None = None) -> bool:
        """Wait until anything changes after ``since``, a ``version``; now if not given.

        Returns whether something has changed within ``timeout_s``.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            since = self.version if since is None else since
            while self.version == since:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return False
                self._changed.wait(left_s)
        return True

    def on_gpu(self) -> npt.NDArray[np.bool_]:
        """What every GPU holds now, bool [G, J]; also of suspect servers, nothing of those down."""
        with self._changed:
            return self._held.copy()

    def held_by(self, server: int) -> npt.NDArray[np.bool_]:
        """What the GPUs of a server hold now, bool [G of it, J]."""
        with self._changed:
            held: npt.NDArray[np.bool_] = self._held[self._server == server]
        return held


def _list_holders(gpu_of: Ints) -> tuple[Ints, Ints]:
    """Each pair's servers in ascending order [J, N], and how many of them count [J]."""
    absent = gpu_of < 0
    holder = np.argsort(absent.T, axis=1, kind="stable").astype(np.int32)
    return holder, (~absent).sum(axis=0, dtype=np.int32)
