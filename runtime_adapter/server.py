"""One server of a run: its driver (this process), its worker, its links to the others."""

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

from prism_plan.cli.internal_errors import run_process
from prism_plan.errors import PrismError
from prism_plan.io.placement import placement_to_json
from prism_plan.model import ModelShape
from prism_plan.placement import Placement
from prism_plan.simulate.network import Network
from prism_plan.simulate.routing_policies import Route
from runtime_adapter import PROGRAM
from runtime_adapter.control.event_log import BEAT, EventLog
from runtime_adapter.control.liveness import BEAT_GRACE_S, SignsOfLife
from runtime_adapter.control.log_follower import LogFollower
from runtime_adapter.control.migration_executor import Loader
from runtime_adapter.control.scheduler import SchedulerConfig, run_scheduler
from runtime_adapter.expert_worker import WorkerConfig, run_worker
from runtime_adapter.moe.compute import Compute
from runtime_adapter.moe.counters import Counters
from runtime_adapter.moe.dispatch import Dispatcher
from runtime_adapter.moe.expert_map import ExpertMap
from runtime_adapter.moe.routing import Router
from runtime_adapter.transport.connection import Connection, NcclConnection
from runtime_adapter.transport.messages import (
    ALIVE,
    HEADER_BYTES,
    OVER,
    SIGNS_LANE,
    Header,
    MessageBuffer,
    put_header,
)
from runtime_adapter.transport.nccl_channel import (
    DataChannel,
    DataChannels,
    card_name,
    check_cards,
    make_channels,
)
from runtime_adapter.transport.parallel import in_parallel, in_time
from runtime_adapter.transport.rendezvous import (
    ABORTED,
    FOREVER,
    MAX_START_S,
    STORE_TIMEOUT_S,
    NameTaken,
    Rendezvous,
    RuntimeFailure,
    ServerLost,
    ask_store,
    check_run,
    get,
    get_number,
    group,
    join_store,
    put,
    send,
)
from runtime_adapter.transport.send_queue import SendQueue, limit_unsent_bytes

#: A server that says that it has steps of more tokens is none of ours.
MAX_TOKENS = 1 << 24


@dataclass(frozen=True, eq=False)
class MigrationConfig:
    """That experts may move: what brings them to this server, and who decides on the first."""

    loader: Loader
    scheduler: SchedulerConfig


@dataclass(frozen=True, eq=False)
class ServerConfig:
    """What a server of a run is.

    ``facts`` must be equal on all servers (placement digest, route, ...); ``states`` and ``width``
    as in WorkerConfig; ``most_tokens`` of this server's own steps; ``lanes`` requests at once;
    ``threads`` of the CPU that the worker may take for a call;
    ``movable`` where experts may move; ``channels`` as in WorkerConfig.
    """

    rendezvous: Rendezvous
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
    movable: MigrationConfig | None = None
    channels: DataChannels | None = None


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
        self.rank = config.rendezvous.rank
        self.name = config.placement.servers[self.rank]
        self.report = report
        self.table = ExpertMap(config.placement)
        if hasattr(config.compute, "table"):
            config.compute.table = self.table
        self.counters = Counters(config.model.num_layers, config.model.num_experts)
        self.lanes: list[Dispatcher] = []
        self.store: dist.TCPStore | None = None
        self._worker: Any = None
        self._scheduler: Any = None
        self._follower: LogFollower | None = None
        self._groups: dict[int, Any] = {}
        self._channels: dict[tuple[int, int, int], DataChannel] = {}
        servers = config.rendezvous.world_size
        spawning = multiprocessing.get_context("spawn")
        self._over: Any = spawning.Array(ctypes.c_bool, servers, lock=False)
        self._signs: Any = spawning.Array(ctypes.c_int64, servers, lock=False)
        self._ended = threading.Event()
        self._lost = threading.Lock()
        self._reported: set[int] = set()
        self._silent: set[int] = set()  # drivers that hang, their workers answering
        self._worker_lives = True
        self._finishing = False
        self._begun = False  # all servers have agreed on a start
        self._store_looks = 0
        self._store_answers = True
        self._scheduler_answers = True

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
        reason = error.message if isinstance(error, PrismError) else "it was stopped"
        with contextlib.suppress(RuntimeFailure):
            said = json.dumps(f"server {self.name!r} does not join: {reason}")
            # the first reason is the reason
            ask_store(partial(self.store.compare_set, ABORTED, "", said))
            if self.rank == 0:
                time.sleep(0.2)  # the others read it from the store that this server hosts

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self) -> None:
        config, rendezvous = self.config, self.config.rendezvous
        others = [m for m in range(rendezvous.world_size) if m != self.rank]
        self.store = join_store(rendezvous, host_it=self.rank == 0)
        store = self.store
        check_run(store, rendezvous, config.facts, self.name)
        if self.rank == 0:
            put(store, "timeout", rendezvous.timeout_s)
            put(store, "movable", config.movable is not None)
        if config.channels is not None and config.channels.backend == "nccl":
            check_cards(store, rendezvous, card_name(config.channels.device), self.table.servers)
        most = self._agree_on_tokens(store)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        worker = WorkerConfig(
            rendezvous=rendezvous,
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
            signs=self._signs,
            loader=config.movable.loader if config.movable else None,
            channels=config.channels,
        )
        self._worker = context.Process(
            target=run_process, args=(PROGRAM, run_worker, worker, theirs), daemon=True
        )
        self._worker.start()
        theirs.close()
        if config.movable is not None and self.rank == 0:
            self._scheduler = context.Process(
                target=run_process,
                args=(PROGRAM, run_scheduler, config.movable.scheduler),
                daemon=True,
            )
            self._scheduler.start()
        groups = in_parallel([partial(group, rendezvous, self.rank, m, 0) for m in others])
        if config.channels is not None:
            pairs = [(self.rank, m) for m in others]
            job = partial(make_channels, config.channels, rendezvous, pairs, config.lanes, 0)
            number = max(len(pairs) * config.lanes, 1)  # one after the other
            try:
                self._channels = in_time(
                    job, 2 * number * rendezvous.rendezvous_timeout_s + STORE_TIMEOUT_S
                )
            except TimeoutError as error:
                raise RuntimeFailure(
                    f"``transport`` {config.channels.backend}: the other servers' workers do "
                    "not answer"
                ) from error
        try:
            if not ours.poll(rendezvous.rendezvous_timeout_s):
                raise RuntimeFailure(
                    "its worker did not meet those of all other servers within "
                    f"{rendezvous.rendezvous_timeout_s:g} s; see whether one of them hangs"
                )
            wrong = ours.recv()
        except EOFError:
            raise RuntimeFailure("the worker ended while it was starting") from None
        if wrong:
            raise RuntimeFailure(wrong)
        self._groups = dict(zip(others, groups, strict=True))
        limit_unsent_bytes()
        timeout = datetime.timedelta(seconds=rendezvous.timeout_s)
        send_queue = SendQueue(timeout)
        rooms = {m: self._room_of(store, m) for m in others}
        self.lanes = [
            Dispatcher(
                config.model,
                Router(self.table, self.rank, config.model, config.network, config.route),
                {m: self._line(m, lane, timeout, send_queue, rooms[m]) for m in others},
                config.compute,
                self.counters,
                timeout_s=rendezvous.timeout_s,
                rtt_s=config.rtt_s,
                on_lost=self._on_lost,
            )
            for lane in range(config.lanes)
        ]
        if config.movable is not None:
            self._follower = LogFollower(
                self.rank, config.placement, self.table, config.compute, self.counters, self.lanes,
                EventLog(rendezvous, f"driver {self.rank}"), self.report,
            )  # fmt: skip
            self._follower.start()
        threading.Thread(target=self._watch, args=(others,), daemon=True).start()

    def _agree_on_tokens(self, store: dist.TCPStore) -> int:
        """The most tokens of any server's step, for which this server's worker gets memory."""
        rendezvous = self.config.rendezvous
        put(store, f"tokens/{self.rank}", self.config.most_tokens)
        most = max(
            int(
                get_number(
                    store,
                    f"tokens/{n}",
                    rendezvous.rendezvous_timeout_s,
                    MAX_TOKENS,
                    f"server {name!r}",
                    whole=True,
                )
            )
            for n, name in enumerate(self.table.servers)
        )
        put(store, f"room/{self.rank}", most)
        return most

    def _room_of(self, store: dist.TCPStore, m: int) -> MessageBuffer:
        """What another server's worker has memory for, as it says."""
        name = self.table.servers[m]
        tokens = get_number(
            store, f"room/{m}", self.config.rendezvous.rendezvous_timeout_s, MAX_TOKENS,
            f"server {name!r}", whole=True,
        )  # fmt: skip
        return MessageBuffer(int(tokens), self.config.model.top_k)

    def _line(
        self,
        m: int,
        lane: int,
        timeout: datetime.timedelta,
        send_queue: SendQueue,
        room: MessageBuffer,
    ) -> Connection:
        made, channel = self._groups[m], self._channels.get((self.rank, m, lane))
        if channel is None:
            return Connection(made, lane, timeout, send_queue, room)
        return NcclConnection(made, lane, timeout, send_queue, room, channel)

    # -------------------------------------------------------------------------------------- health

    def _on_lost(self, lost: ServerLost) -> None:
        with self._lost:
            if lost.server in self._reported:
                return
            self._reported.add(lost.server)
        self.report(str(lost))

    def _watch(self, others: list[int]) -> None:
        """Notice processes that give no sign of life, whether or not they are called.

        Here without the store, which may be lost or hang itself: signs of other drivers come over
        the links. Those that only the store tells of are looked for in threads of their own.
        """
        signs = SignsOfLife()
        threading.Thread(target=self._watch_store, args=(others,), daemon=True).start()
        for m in others:
            threading.Thread(target=self._show_life, args=(m,), daemon=True).start()
        while not self._ended.wait(self._period_s):
            self._watch_scheduler()
            self._watch_worker(signs)
            if self._worker_lives:  # it is who hears of the others
                for n in others:
                    self._watch_driver(signs, n)
            if signs.silent_s("store", self._store_looks) > self._patience_s:
                self._store_hangs()

    @property
    def _period_s(self) -> float:
        """Between two looks, and two signs of life."""
        return min(self.config.rendezvous.timeout_s / 4, 1.0)

    @property
    def _patience_s(self) -> float:
        """For drivers: of a server that hangs as a whole, others are to be told of the worker."""
        return self.config.rendezvous.timeout_s + BEAT_GRACE_S

    def _limit_s(self, sign: object, timeout_s: float, *, begun: bool = False) -> float:
        """How long a process may be silent; one that has not begun yet as long as it may join.

        All servers are known to have ``begun`` when they have agreed on a start, also one that
        hangs before its first sign.
        """
        return (
            timeout_s
            if sign or begun
            else max(timeout_s, self.config.rendezvous.rendezvous_timeout_s)
        )

    def _show_life(self, m: int) -> None:
        """Tell another server over its link that this driver lives, until one of the two ends."""
        message = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
        put_header(message.numpy(), Header(ALIVE))
        with contextlib.suppress(RuntimeError):
            while not self._ended.is_set():
                send(self._groups[m], message, 1, SIGNS_LANE).wait(FOREVER)
                self._ended.wait(self._period_s)

    def _watch_driver(self, signs: SignsOfLife, n: int) -> None:
        sign, begun = self._signs[n], self._begun
        if (
            signs.silent_s((n, begun), sign) <= self._limit_s(sign, self._patience_s, begun=begun)
            or n in self._silent
            or self.table.lost(n)
            or self._over[n]  # it needs nobody any more
        ):
            return
        self._silent.add(n)
        self.report(
            f"server {self.table.servers[n]!r}: the process that serves its requests gives no sign "
            f"of life for {self._patience_s:g} s; nobody waits for them"
        )

    def _watch_store(self, others: list[int]) -> None:
        """Give signs of life in the store and look for those of other workers, and the scheduler.

        A store that hangs holds this thread up, and so ``_store_looks``.
        """
        timeout_s = self.config.rendezvous.timeout_s
        signs = SignsOfLife()
        try:
            store = join_store(self.config.rendezvous, host_it=False)
            while not self._ended.wait(self._period_s):
                self._store_looks += 1
                store.set(f"driver/{self.rank}", str(self._store_looks))
                for n in others:
                    sign, begun = _sign(store, f"beat/{n}"), self._begun
                    silent_s = signs.silent_s((n, begun), sign)
                    # none leaves before all have finished, so until then silence is no rest
                    over = self._finishing and store.check([f"finished/{n}"])
                    limit_s = self._limit_s(sign, timeout_s, begun=begun)
                    if silent_s > limit_s and not over:
                        self._lose_silent(n)
                if self.config.movable is not None:
                    self._hear_of_scheduler(signs, _sign(store, BEAT))
        except (RuntimeError, RuntimeFailure):
            self._store_lost()

    def _watch_worker(self, signs: SignsOfLife) -> None:
        """A worker that has ended or hangs: this server is lost to the others."""
        if not self._worker_lives:
            return
        if self._worker is not None and not self._worker.is_alive():
            self._worker_lives = False
            self._worker = None
            self.report("its worker has ended: the others take this server for lost")
        elif signs.silent_s(self.rank, self._signs[self.rank]) > self._patience_s:
            self._worker_lives = False
            self.report(
                f"its worker gives no sign of life for {self._patience_s:g} s: the others take "
                "this server for lost"
            )

    def _watch_scheduler(self) -> None:
        if self._scheduler is None or self._scheduler.is_alive():
            return
        self._scheduler = None
        self._scheduler_answers = False
        self.report("the scheduler has ended: no more migrations")
        with contextlib.suppress(RuntimeFailure):
            put(self.store, "movable", False)  # for whoever asks from now on

    def _hear_of_scheduler(self, signs: SignsOfLife, sign: bytes) -> None:
        """One that hangs may go on later; until then nobody waits for what it moves."""
        answers = signs.silent_s(BEAT, sign) <= self._limit_s(sign, self._patience_s)
        if self.rank == 0 and self._scheduler is None:
            return  # it has ended, which was told
        if self._scheduler_answers and not answers and self.rank == 0:
            self.report(
                f"the scheduler gives no sign of life for {self._patience_s:g} s: no migrations "
                "until it does"
            )
        self._scheduler_answers = answers

    def _lose_silent(self, n: int) -> None:
        if self.table.lost(n):
            return
        self.table.lose(n)
        reason = f"no sign of life for {self.config.rendezvous.timeout_s:g} s"
        self._on_lost(ServerLost(n, self.table.servers[n], reason))

    def _store_lost(self) -> None:
        if self.rank == 0 or self._ended.is_set():
            return
        host = self.table.servers[0]
        self._store_answers = False
        if self._finishing and self._over[0]:
            return  # it has left in good order, for it and this server need nobody any more
        self.report(f"the store on {host!r} is lost: no migrations and no log of other servers")
        if not self.table.lost(0):
            self.table.lose(0)
            self._on_lost(ServerLost(0, host, "it hosts the store, which is gone"))

    def _store_hangs(self) -> None:
        """Its host's worker may answer all the same, so that server is not lost."""
        if not self._store_answers:
            return
        self._store_answers = False
        self.report(
            f"the store on {self.table.servers[0]!r} does not answer for {self._patience_s:g} s: "
            "no migrations and no log of other servers"
        )

    # ---------------------------------------------------------------------------------------- time

    def together(self, name: str) -> None:
        """Wait until every server is here; a barrier through the store.

        Raises
        ------
        RuntimeFailure
            Not all come within the time to join.
        """
        assert self.store is not None
        put(self.store, f"{name}/{self.rank}", 1)
        for n, server in enumerate(self.table.servers):
            get(
                self.store,
                f"{name}/{n}",
                self.config.rendezvous.rendezvous_timeout_s,
                f"server {server!r}",
            )

    def agree_on_start(self, delay_s: float = 0.5) -> float:
        """A time of ``time.monotonic`` at which all servers of this machine begin."""
        assert self.store is not None
        self.together("ready")
        if self.rank == 0:
            put(self.store, "start", time.time() + delay_s)
        most_s = time.time() + MAX_START_S
        at = get_number(
            self.store, "start", self.config.rendezvous.rendezvous_timeout_s, most_s, whole=False
        )
        self._begun = True
        return time.monotonic() + (at - time.time())

    def finish(self) -> None:
        """Tell that this server has no more requests, and answer others until they have none.

        Of another server it waits as long as its driver gives signs of life; of a migration as long
        as the scheduler does, which abandons one that comes to nothing.
        """
        assert self.store is not None
        self._finishing = True
        with contextlib.suppress(RuntimeFailure):  # who watches the store tells of its end
            finished = partial(self.store.set, f"finished/{self.rank}", "1")
            ask_store(finished, self._patience_s)
        # workers are told over the links, which are there when the store is not
        message = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
        put_header(message.numpy(), Header(OVER))
        for n, made in self._groups.items():
            if not self.table.lost(n):
                with contextlib.suppress(RuntimeError):
                    send(made, message, 1, 0).wait(self.lanes[0].timeout)
        for n in self._groups:
            while self._waits_for(n):
                time.sleep(0.02)
        while self.migrating:
            time.sleep(0.05)
        if self.rank == 0:
            time.sleep(0.5)  # the others read the last log from the store that is here
        self._ended.set()

    def _waits_for(self, n: int) -> bool:
        """Whether another server may still call this one's worker, which hears when it is done."""
        return not (
            self.table.lost(n) or self._over[n] or n in self._silent or not self._worker_lives
        )

    @property
    def migrating(self) -> bool:
        """Whether experts are on the move, as far as this server can be told."""
        return (
            self._follower is not None
            and self._follower.migrating
            and self._scheduler_answers
            and self._store_answers
            and not self.table.lost(0)
        )

    def held(self) -> list[dict[str, list[int]]]:
        """What this server's GPUs hold now, as a placement file has it."""
        shape = self.config.placement.on_gpu.shape
        stands = self.config.placement.replace(on_gpu=self.table.on_gpu().reshape(shape))
        gpus = placement_to_json(stands)["servers"][self.rank]["gpus"]
        return [gpu["experts"] for gpu in gpus]

    def migrations(self) -> list[dict[str, Any]]:
        """What the reviews decided, as in a simulation's report; of the first server."""
        if self._scheduler is None or self.store is None or not self.store.check(["migrations"]):
            return []
        try:
            found = get(self.store, "migrations", self.config.rendezvous.rendezvous_timeout_s)
        except RuntimeFailure as error:
            self.report(f"what the reviews decided is not known: {error}")
            return []
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            self.report("what the reviews decided is not known: the store holds something else")
            return []
        return found

    def close(self) -> None:
        """End the worker and the scheduler."""
        self._ended.set()
        for channel in self._channels.values():
            channel.close()
        for process in (self._scheduler, self._worker):
            if process is not None and process.is_alive():
                process.terminate()
                process.join(5)
                if process.is_alive():
                    process.kill()


def _sign(store: dist.TCPStore, key: str) -> bytes:
    """A sign of life, empty where there is none yet."""
    return bytes(store.get(key)) if store.check([key]) else b""
