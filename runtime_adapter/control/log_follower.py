"""Applies the event log to a driver: who is up, who holds what, what to acknowledge and report.

A drop is acknowledged when every pass through its layer that began before the drop was announced
has ended: then no call of this driver, to its own or another server, depends on the expert. So its
slot can be used again, and no call comes too late. A step of a long prompt delays the drops of the
layer that it is in, and no others.

Where a log begins anew, what servers hold is taken from what it begins with. Servers that are not
there yet keep what they are known to hold, for the store was restarted, not they. This server's own
experts are those that its worker says it has when it joins; one that is not among them is dropped
when no layer depends on it any more.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError, PrismError
from prism_plan.placement import Placement
from runtime_adapter.control import log_entries
from runtime_adapter.control.event_log import (
    EventLog,
    NewLog,
    StoreRestartedError,
    StoreUnavailable,
)
from runtime_adapter.control.membership import Members, MemberStates, NoMembers, pairs_of
from runtime_adapter.control.store.client import StoreClient
from runtime_adapter.moe.compute import Compute
from runtime_adapter.moe.counters import Counters
from runtime_adapter.moe.remote_dispatcher import RemoteDispatcher
from runtime_adapter.transport.rendezvous import RuntimeFailure
from runtime_adapter.weights.expert_map import ExpertMap
from runtime_adapter.weights.expert_store import Change

#: How often layers in progress are checked while drops wait for them.
POLL_INTERVAL_S = 0.005

LanesInside = tuple[tuple[RemoteDispatcher, int], ...]


class _AnnouncedDrop(NamedTuple):
    """A drop that this driver knows of, and the lanes that may still depend on its expert.

    Each lane with its ``passes``, odd inside of a layer, when the drop became known. No server
    waits for the acknowledgement of one without a ``plan``.
    """

    plan: int | None
    step: int
    gpu: int
    pair: int
    lanes_inside: LanesInside

    def settled(self) -> bool:
        """Whether all these lanes have left the layer."""
        return _settled(self.lanes_inside)


def _settled(lanes_inside: LanesInside) -> bool:
    return all(lane.passes != passes for lane, passes in lanes_inside)


class LogFollower:
    """Follows the log for one driver, in a thread of its own.

    ``lanes`` gives this driver's; ``report`` gets lines for this server's log; ``members`` is told
    who comes and goes. ``incarnation`` is this server's, 0 while its worker has not joined.
    ``older`` is what :func:`older_incarnation` gave before this process started a worker: what that
    incarnation held was in the memory of another process. ``on_table`` gets each execution table
    that begins. ``take_called`` gives the calls of experts since the last time, by home server,
    int64 [N, L, E].
    """

    def __init__(
        self, rank: int, placement: Placement, expert_map: ExpertMap, compute: Compute,
        counters: Counters, lanes: Callable[[], Sequence[RemoteDispatcher]], log: EventLog,
        report: Callable[[str], None], members: Members | None = None,
        older: tuple[str, int] = ("", 0), on_table: Callable[[list[list[int]]], None] | None = None,
        take_called: Callable[[], npt.NDArray[np.int64]] | None = None,
    ) -> None:  # fmt: skip
        self.rank = rank
        self.name = placement.servers[rank]
        self._bounds = log_entries.Bounds.of(placement)
        self.num_experts = placement.model.num_experts
        self.expert_map = expert_map
        self.compute = compute
        self.counters = counters
        self.lanes = lanes
        self.log = log
        self.report = report
        self.own_gpus: list[int] = placement.gpus_of(rank).tolist()
        self._server_of_gpu: list[int] = placement.server_of_gpu.tolist()
        self._states = MemberStates(placement.num_servers, members or NoMembers())
        self._on_table = on_table or (lambda table: None)
        shape = (placement.num_servers, placement.model.num_layers, placement.model.num_experts)
        self._take_called = take_called or (lambda: np.zeros(shape, np.int64))
        self._older_epoch, self._older_incarnation = older
        self._epoch = ""
        self._drops: list[_AnnouncedDrop] = []
        self._unsynced: tuple[int, LanesInside] | None = None
        self._failed_plans: set[int] = set()
        self._open_plans: set[int] = set()
        self._reported_us = {"compute_us": 0, "waiting_us": 0}
        self._ended = threading.Event()

    @property
    def migrating(self) -> bool:
        """Whether a migration is in progress, as far as this driver knows."""
        return bool(self._open_plans)

    @property
    def incarnation(self) -> int:
        """The incarnation of this server in the log, 0 if it is not up."""
        up = self.rank in self._states.up
        return self._states.incarnations[self.rank] if up else 0

    def start(self) -> None:
        """Begin to follow."""
        self.log.expect(self._bounds, self.report)
        self.log.follow()
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        """End following."""
        self._ended.set()
        self.log.close()
        self.log.wake()

    def _run(self) -> None:
        while not self._ended.is_set():
            waiting = bool(self._drops) or self._unsynced is not None
            entry = self.log.next(POLL_INTERVAL_S if waiting else None)
            try:
                if entry is not None:
                    self._handle_or_skip(entry)
                if self.log.caught_up():
                    self.acknowledge()
            except StoreRestartedError:
                pass  # nobody waits for what was to be said; the next entry is a NewLog
            except StoreUnavailable:
                return
            except PrismError as error:  # the store refuses it: it is full
                self.log.skip(error)

    def _handle_or_skip(self, entry: log_entries.LogEntry | NewLog) -> None:
        """Handle an entry; one that fails (its slot does not exist) does not end the following."""
        try:
            self.handle(entry)
        except RuntimeFailure:
            raise
        except Exception as error:
            what = f"entry {entry.number} of the run's log"
            kind = "its beginning" if isinstance(entry, NewLog) else entry.kind
            self.log.skip(InputError(" ".join(str(error).split()), source=f"{what}: {kind}"))

    def handle(self, entry: log_entries.LogEntry | NewLog) -> None:
        """Act on one entry."""
        match entry:
            case NewLog():
                self._begin_log(entry)
            case log_entries.ServerJoined() if self._is_older(entry.server, entry.incarnation):
                pass
            case log_entries.ServerJoined():
                self._set_up(entry.server, entry.experts)
                self._states.join(entry.server, entry.incarnation, (entry.host, entry.port))
            case log_entries.ServerDown() if entry.reason == log_entries.JOINS_ANEW:
                pass  # what it holds is not gone: the next entry says so
            case log_entries.ServerDown() | log_entries.ServerLeft():
                reason = entry.reason if isinstance(entry, log_entries.ServerDown) else None
                if self._states.end(entry.server, entry.incarnation, reason):
                    self._set_down(entry.server)
            case log_entries.ExpertsLoaded():
                for change in entry.experts:
                    self._forget_drops_of(change.gpu, change.pair)
                    self._apply_own("load", change.gpu, change.pair, change.slot)
                    self.expert_map.change(change.gpu, change.pair, True)
            case log_entries.DropsAnnounced():
                for change in entry.experts:
                    self.expert_map.change(change.gpu, change.pair, False)
                self._note_drops(entry.plan, entry.experts)
            case log_entries.ReviewStarted():
                self._report_calls(entry.review)
            case log_entries.MigrationStarted():
                self._open_plans.add(entry.plan)
                self.expert_map.set_migrating(True)
            case log_entries.MigrationFinished():
                self._open_plans.discard(entry.plan)
                self.expert_map.set_migrating(self.migrating)
            case log_entries.TableBegan():
                self._on_table(entry.execution)
            case log_entries.StepFailed():
                # loads that had begun by then fail as well, for the same reason
                if entry.server == self.name and entry.plan not in self._failed_plans:
                    self._failed_plans.add(entry.plan)
                    self.report(entry.reason)
            case log_entries.LogMessage() if self.rank == 0:
                self.report(entry.text)

    # ------------------------------------------------------------------------------------- members

    def _begin_log(self, new: NewLog) -> None:
        """Take over what a new log begins with."""
        self._forget_drops(lambda drop: drop.plan is not None)
        self._failed_plans.clear()
        self._open_plans = set(new.open_plans)
        self.expert_map.set_migrating(self.migrating)
        self._epoch = new.epoch
        if new.execution is not None:
            self._on_table(new.execution)
        up, down = self._states.begin(new)
        if self._is_older(self.rank, self._states.incarnations[self.rank]):
            up.pop(self.rank, None)
            self._states.up.discard(self.rank)
        down = [server for server in down if server != self.rank]
        self._forget_drops(lambda drop: self._server_of_gpu[drop.gpu] in {*up, *down})
        held = {server: pairs_of(experts) for server, experts in up.items()}
        if self.rank in up:
            self._set_own(up[self.rank])
        else:  # its worker has still to join
            own = self.compute.held()
            held[self.rank] = [(self.own_gpus[gpu], pair) for gpu, pair, _ in own]
        self.expert_map.set_all(held, down)  # at once, for experts have moved from one to another
        self._unsynced = (new.number + 1, self._lanes_inside()) if new.number >= 0 else None

    def _is_older(self, server: int, incarnation: int) -> bool:
        """Whether this is an incarnation of this server that an earlier process was."""
        is_old = incarnation <= self._older_incarnation and self._epoch == self._older_epoch
        return server == self.rank and is_old

    def _set_up(self, server: int, held: list[log_entries.HeldExpert]) -> None:
        self._forget_drops(lambda drop: self._server_of_gpu[drop.gpu] == server)
        if server == self.rank:
            self._set_own(held)
        self.expert_map.set_up(server, pairs_of(held))

    def _set_down(self, server: int) -> None:
        if server != self.rank:  # this driver can compute with its own experts all the same
            self._forget_drops(lambda drop: self._server_of_gpu[drop.gpu] == server)
            self.expert_map.set_down(server)

    def _set_own(self, held: Iterable[log_entries.HeldExpert]) -> None:
        """The worker of this server holds these, in these slots, and no others."""
        known = {(self.own_gpus[gpu], pair): slot for gpu, pair, slot in self.compute.held()}
        now = {(gpu, pair): slot for gpu, pair, slot in held if gpu in self.own_gpus}
        for (gpu, pair), slot in now.items():
            if known.get((gpu, pair)) != slot:
                self._apply_own("load", gpu, pair, slot)
        gone = [log_entries.ExpertChange(0, *place, 0) for place in known.keys() - now.keys()]
        self._note_drops(None, gone)

    # --------------------------------------------------------------------------------------- drops

    def _apply_own(self, kind: Literal["load", "drop"], gpu: int, pair: int, slot: int) -> None:
        if gpu in self.own_gpus:
            self.compute.apply(Change(kind, pair, self.own_gpus.index(gpu), slot))

    def _lanes_inside(self, layer: int | None = None) -> LanesInside:
        """The lanes that are inside of a layer, or of this one."""
        inside = []
        for lane in self.lanes():
            passes = lane.passes  # read before the layer: if it changes meanwhile, this pass ended
            if passes % 2 and layer in (None, lane.layer):
                inside.append((lane, passes))
        return tuple(inside)

    def _note_drops(self, plan: int | None, experts: Iterable[log_entries.ExpertChange]) -> None:
        """Note which lanes are inside the layers of drops; routing no longer uses the experts."""
        inside: dict[int, LanesInside] = {}
        for step, gpu, pair, _ in experts:
            layer = pair // self.num_experts
            if layer not in inside:
                inside[layer] = self._lanes_inside(layer)
            self._drops.append(_AnnouncedDrop(plan, step, gpu, pair, inside[layer]))

    def _forget_drops(self, which: Callable[[_AnnouncedDrop], bool]) -> None:
        """Forget drops that will not be: the expert stays."""
        self._drops = [drop for drop in self._drops if not which(drop)]

    def _forget_drops_of(self, gpu: int, pair: int) -> None:
        self._forget_drops(lambda drop: (drop.gpu, drop.pair) == (gpu, pair))

    def acknowledge(self) -> None:
        """Acknowledge what no lane depends on any longer; only when the log was read to its end."""
        self._acknowledge_drops()
        self._acknowledge_new_log()

    def _acknowledge_drops(self) -> None:
        """Acknowledge the drops on which no lane depends any longer."""
        settled: dict[int, list[int]] = {}
        unsettled = []
        for drop in self._drops:
            if not drop.settled():
                unsettled.append(drop)
                continue
            self._apply_own("drop", drop.gpu, drop.pair, 0)
            if drop.plan is not None:
                settled.setdefault(drop.plan, []).append(drop.step)
        self._drops = unsettled
        for plan, steps in settled.items():
            self.log.append(log_entries.DropsAcknowledged(plan, self.rank, steps))

    def _acknowledge_new_log(self) -> None:
        """Acknowledge all drops that were announced before the log began for this driver."""
        if self._unsynced is None:
            return
        read, lanes_inside = self._unsynced
        if _settled(lanes_inside) and all(drop.plan is not None for drop in self._drops):
            self._unsynced = None
            self.log.append(log_entries.DriverSynced(self.rank, read))

    def _report_calls(self, review: int) -> None:
        called = self._take_called()
        self.log.put_bytes(f"calls/{self.rank}/{review}", zlib.compress(called.tobytes(), 1))
        counted = self.counters.to_json()
        times = {name: counted[name] - before for name, before in self._reported_us.items()}
        self._reported_us = {name: counted[name] for name in times}
        self.log.put(f"times/{self.rank}/{review}", times)
        self.log.append(log_entries.CallsReported(review, self.rank))


def older_incarnation(client: StoreClient, rank: int) -> tuple[str, int]:
    """The store's epoch, and a server's last incarnation in it, before its process starts a worker.

    Raises
    ------
    RuntimeFailure
        The store does not answer.
    """
    status = client.status()
    members = status["members"]
    return str(status["epoch"]), int(members[rank]["incarnation"]) if members else 0
