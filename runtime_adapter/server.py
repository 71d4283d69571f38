"""One server of a run: its front (this process), its worker, its links to the others."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import json
import multiprocessing
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from prism_plan.errors import PrismError
from prism_plan.faults import run_process
from prism_plan.model import ModelShape
from prism_plan.placement import Placement
from prism_plan.placement_file import placement_to_json
from prism_plan.simulate.network import Network
from prism_plan.simulate.routes import Route
from runtime_adapter import PROGRAM
from runtime_adapter.agent import Loader
from runtime_adapter.changes import News
from runtime_adapter.compute import Compute
from runtime_adapter.counters import Counters
from runtime_adapter.dispatch import Dispatcher
from runtime_adapter.follow import Follower
from runtime_adapter.lines import Line, PlaneLine
from runtime_adapter.links import (
    ABORTED,
    Meeting,
    NameTaken,
    RuntimeFailure,
    ServerLost,
    check_run,
    get,
    group,
    join_store,
    put,
    send,
)
from runtime_adapter.outbox import Outbox, hold_back_little
from runtime_adapter.parallel import in_parallel
from runtime_adapter.planes import Plane, Planes, card_name, check_cards, make_planes
from runtime_adapter.routing import Router
from runtime_adapter.scheduler import SchedulerConfig, run_scheduler
from runtime_adapter.table import HolderTable
from runtime_adapter.wire import HEADER_BYTES, OVER, Header, put_header
from runtime_adapter.worker import WorkerConfig, run_worker


@dataclass(frozen=True, eq=False)
class Movable:
    """That experts may move: what brings them to this server, and who decides on the first."""

    loader: Loader
    scheduler: SchedulerConfig


@dataclass(frozen=True, eq=False)
class ServerConfig:
    """What a server of a run is.

    ``facts`` must be equal on all servers (placement digest, route, ...); ``states`` and ``width``
    as in WorkerConfig; ``most_tokens`` of this server's own steps; ``lanes`` requests at once;
    ``threads`` of the CPU that the worker may take for a call;
    ``movable`` where experts may move; ``planes`` as in WorkerConfig.
    """

    meeting: Meeting
    placement: Placement
    model: ModelShape
    network: Network
    compute: Compute
    facts: dict[str, Any]
    states: torch.dtype
    width: int
    most_tokens: int
    route: Route = "cover"
    lanes: int = 1
    rtt_s: float = 0.0
    threads: int = 1
    movable: Movable | None = None
    planes: Planes | None = None


class Server:
    """Starts a worker and meets all other servers; a context manager that ends both.

    ``lanes`` are the dispatchers of the requests that run at once. ``report`` is told what a
    reader of the log has to know, once each.

    Raises
    ------
    RuntimeFailure
        A port is in use, a server is not there in time, the worker did not start.
    InputError
        The servers do not agree on what they run.
    """

    def __init__(self, config: ServerConfig, report: Callable[[str], None]) -> None:
        self.config = config
        self.me = config.meeting.me
        self.name = config.placement.servers[self.me]
        self.report = report
        self.table = HolderTable(config.placement)
        if hasattr(config.compute, "table"):
            config.compute.table = self.table
        self.counters = Counters(config.model.num_layers, config.model.num_experts)
        self.lanes: list[Dispatcher] = []
        self.store: dist.TCPStore | None = None
        self._worker: Any = None
        self._scheduler: Any = None
        self._follower: Follower | None = None
        self._groups: dict[int, Any] = {}
        self._planes: dict[tuple[int, int, int], Plane] = {}
        servers = config.meeting.servers
        self._over: Any = multiprocessing.get_context("spawn").Array(
            ctypes.c_bool, servers, lock=False
        )
        self._finishing = False
        self._ended = threading.Event()
        self._lost = threading.Lock()
        self._reported: set[int] = set()
        self._silent: set[int] = set()  # fronts that hang, their workers answering

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException as error:
            self._give_up(error)
            self.close()
            raise
        return self

    def _give_up(self, error: BaseException) -> None:
        """Tell those that wait for this server why it does not come."""
        if self.store is None or isinstance(error, NameTaken):
            return
        reason = str(error) if isinstance(error, PrismError) else "it was stopped"
        with contextlib.suppress(RuntimeError):
            said = json.dumps(f"server {self.name!r} does not join: {reason}")
            self.store.compare_set(ABORTED, "", said)  # the first reason is the reason
            if self.me == 0:
                time.sleep(0.2)  # the others read it from the store that this server hosts

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self) -> None:
        config, meeting = self.config, self.config.meeting
        others = [m for m in range(meeting.servers) if m != self.me]
        # in a thread of its own, for what waits in the store cannot be interrupted
        (self.store,) = in_parallel([partial(join_store, meeting, host_it=self.me == 0)])
        store = self.store
        check_run(store, meeting, config.facts, self.name)
        if self.me == 0:
            put(store, "movable", config.movable is not None)
        if config.planes is not None and config.planes.backend == "nccl":
            check_cards(store, meeting, card_name(config.planes.device), self.table.servers)
        put(store, f"tokens/{self.me}", config.most_tokens)
        most = max(
            int(get(store, f"tokens/{n}", meeting.join_s, f"server {name!r}"))
            for n, name in enumerate(self.table.servers)
        )
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        worker = WorkerConfig(
            meeting=meeting,
            placement=config.placement,
            model=config.model,
            compute=config.compute,
            states=config.states,
            width=config.width,
            most_tokens=most,
            lanes=max(config.facts.get("lanes", [config.lanes])),
            rtt_s=config.rtt_s,
            threads=config.threads,
            over=self._over,
            loader=config.movable.loader if config.movable else None,
            planes=config.planes,
        )
        self._worker = context.Process(
            target=run_process, args=(PROGRAM, run_worker, worker, theirs), daemon=True
        )
        self._worker.start()
        theirs.close()
        if config.movable is not None and self.me == 0:
            self._scheduler = context.Process(
                target=run_process,
                args=(PROGRAM, run_scheduler, config.movable.scheduler),
                daemon=True,
            )
            self._scheduler.start()
        groups = in_parallel([partial(group, meeting, self.me, m, 0) for m in others])
        if config.planes is not None:
            pairs = [(self.me, m) for m in others]
            job = partial(make_planes, config.planes, meeting, pairs, config.lanes, 0)
            (self._planes,) = in_parallel([job])  # a thread that can be interrupted, as above
        try:
            if not ours.poll(meeting.join_s):
                raise RuntimeFailure(
                    f"its worker did not meet those of all other servers within {meeting.join_s:g} "
                    "s; see whether one of them hangs"
                )
            wrong = ours.recv()
        except EOFError:
            raise RuntimeFailure("the worker ended while it was starting") from None
        if wrong:
            raise RuntimeFailure(wrong)
        self._groups = dict(zip(others, groups, strict=True))
        hold_back_little()
        timeout = datetime.timedelta(seconds=meeting.timeout_s)
        outbox = Outbox(timeout)
        self.lanes = [
            Dispatcher(
                config.model,
                Router(self.table, self.me, config.model, config.network, config.route),
                {m: self._line(m, lane, timeout, outbox) for m in others},
                config.compute,
                self.counters,
                timeout_s=meeting.timeout_s,
                rtt_s=config.rtt_s,
                on_lost=self._on_lost,
            )
            for lane in range(config.lanes)
        ]
        if config.movable is not None:
            self._follower = Follower(
                self.me, config.placement, self.table, config.compute, self.counters, self.lanes,
                News(meeting, f"front {self.me}"), self.report,
            )  # fmt: skip
            self._follower.start()
        threading.Thread(target=self._watch, args=(others,), daemon=True).start()

    def _line(self, m: int, lane: int, timeout: datetime.timedelta, outbox: Outbox) -> Line:
        made, plane = self._groups[m], self._planes.get((self.me, m, lane))
        if plane is None:
            return Line(made, lane, timeout, outbox)
        return PlaneLine(made, lane, timeout, outbox, plane)

    # -------------------------------------------------------------------------------------- health

    def _on_lost(self, lost: ServerLost) -> None:
        with self._lost:
            if lost.server in self._reported:
                return
            self._reported.add(lost.server)
        self.report(str(lost))

    def _watch(self, others: list[int]) -> None:
        """Notice servers that give no sign of life, whether or not they are called."""
        timeout_s = self.config.meeting.timeout_s
        try:
            store = join_store(self.config.meeting, host_it=False)
        except RuntimeFailure:
            return
        worker, front = "beat", "front"  # of each server; one may hang alone
        seen = {(kind, n): ("", time.monotonic()) for n in others for kind in (worker, front)}
        beats = 0
        while not self._ended.wait(min(timeout_s / 4, 1.0)):
            self._watch_scheduler()
            self._watch_worker()
            beats += 1
            try:
                store.set(f"{front}/{self.me}", str(beats))
            except RuntimeError:
                self._store_lost()
                return
            for (kind, n), (before, since_s) in seen.items():
                key = f"{kind}/{n}"
                try:
                    beat = store.get(key).decode() if store.check([key]) else ""
                    # none leaves before all have finished, so until then silence is no rest
                    over = self._finishing and store.check([f"finished/{n}"])
                except RuntimeError:
                    self._store_lost()
                    return
                now = time.monotonic()
                # fronts beat less often, and of a server that hangs as a whole the worker is told
                patience_s = timeout_s if kind == worker else timeout_s + 2.0
                if beat != before or over:
                    seen[kind, n] = (beat, now)
                elif now - since_s > patience_s and not self.table.lost(n):
                    if kind == worker:
                        self.table.lose(n)
                        reason = f"no sign of life for {timeout_s:g} s"
                        self._on_lost(ServerLost(n, self.table.servers[n], reason))
                    elif n not in self._silent:
                        self._silent.add(n)
                        name = self.table.servers[n]
                        self.report(
                            f"server {name!r}: the process that serves its requests gives no sign "
                            f"of life for {patience_s:g} s; nobody waits for them"
                        )

    def _watch_worker(self) -> None:
        if self._worker is None or self._worker.is_alive() or self._ended.is_set():
            return
        self._worker = None
        self.report("its worker has ended: the others take this server for lost")

    def _watch_scheduler(self) -> None:
        if self._scheduler is None or self._scheduler.is_alive():
            return
        self._scheduler = None
        if self._follower is not None:
            self._follower.migrating = False
        self.report("the scheduler has ended: no more migrations")
        with contextlib.suppress(RuntimeError):
            put(self.store, "movable", False)  # for whoever asks from now on

    def _store_lost(self) -> None:
        if self.me == 0 or self._ended.is_set():
            return
        host = self.table.servers[0]
        self.report(f"the store on {host!r} is lost: no migrations and no news of other servers")
        if not self.table.lost(0):
            self.table.lose(0)
            self._on_lost(ServerLost(0, host, "it hosts the store, which is gone"))

    # ---------------------------------------------------------------------------------------- time

    def together(self, name: str) -> None:
        """Wait until every server is here; a barrier through the store.

        Raises
        ------
        RuntimeFailure
            Not all come within the time to join.
        """
        assert self.store is not None
        put(self.store, f"{name}/{self.me}", 1)
        for n in range(self.config.meeting.servers):
            get(self.store, f"{name}/{n}", self.config.meeting.join_s)

    def agree_on_start(self, delay_s: float = 0.5) -> float:
        """A time of ``time.monotonic`` at which all servers of this machine begin."""
        assert self.store is not None
        self.together("ready")
        if self.me == 0:
            put(self.store, "start", time.time() + delay_s)
        at = float(get(self.store, "start", self.config.meeting.join_s))
        return time.monotonic() + (at - time.time())

    def finish(self, patience_s: float = 3600.0) -> None:
        """Tell that this server has no more requests, and answer others until they have none."""
        assert self.store is not None
        self._finishing = True
        deadline = time.monotonic() + patience_s
        try:
            put(self.store, f"finished/{self.me}", 1)
        except RuntimeError:
            self._store_lost()
        # workers are told over the links, which are there when the store is not
        message = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
        put_header(message.numpy(), Header(OVER))
        for n, made in self._groups.items():
            if not self.table.lost(n):
                with contextlib.suppress(RuntimeError):
                    send(made, message, 1, 0).wait(self.lanes[0].timeout)
        for n in self._groups:
            while (
                not self.table.lost(n)
                and not self._over[n]
                and n not in self._silent
                and self._worker is not None  # it is who hears that they are done
                and time.monotonic() < deadline
            ):
                time.sleep(0.02)
        while self.migrating and time.monotonic() < deadline:
            time.sleep(0.05)
        if self.me == 0:
            time.sleep(0.5)  # the others read the last news from the store that is here
        self._ended.set()

    @property
    def migrating(self) -> bool:
        """Whether experts are on the move."""
        return self._follower is not None and self._follower.migrating and not self.table.lost(0)

    def held(self) -> list[dict[str, list[int]]]:
        """What this server's GPUs hold now, as a placement file has it."""
        shape = self.config.placement.on_gpu.shape
        stands = self.config.placement.replace(on_gpu=self.table.on_gpu().reshape(shape))
        gpus = placement_to_json(stands)["servers"][self.me]["gpus"]
        return [gpu["experts"] for gpu in gpus]

    def migrations(self) -> list[dict[str, Any]]:
        """What the reviews decided, as in a simulation's report; of the first server."""
        if self._scheduler is None or self.store is None or not self.store.check(["migrations"]):
            return []
        found: list[dict[str, Any]] = get(self.store, "migrations", self.config.meeting.join_s)
        return found

    def close(self) -> None:
        """End the worker and the scheduler."""
        self._ended.set()
        for plane in self._planes.values():
            plane.close()
        for process in (self._scheduler, self._worker):
            if process is not None and process.is_alive():
                process.terminate()
                process.join(5)
                if process.is_alive():
                    process.kill()
