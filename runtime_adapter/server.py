"""A server of a run, in its driver process: its start, its place among the others, its end.

The driver starts the server's worker, again if it dies, and, on the first server of a run where
nobody listens at the store's address, the store. It pings all other servers' workers, tells the
store whom it suspects, and follows the log.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Self

from prism_plan.cli.internal_errors import run_process
from prism_plan.errors import InputError, PrismError
from prism_plan.io.json import parse_json
from prism_plan.io.placement import placement_to_json
from runtime_adapter import PROGRAM
from runtime_adapter.control.event_log import EventLog
from runtime_adapter.control.log_follower import LogFollower, older_incarnation
from runtime_adapter.control.store.client import StoreClient
from runtime_adapter.moe.counters import Counters
from runtime_adapter.moe.remote_dispatcher import RemoteDispatcher
from runtime_adapter.moe.router import Router
from runtime_adapter.own_store import OwnStore, somebody_listens
from runtime_adapter.peer_table import PeerTable
from runtime_adapter.request_counts import RequestCounts
from runtime_adapter.server_config import ServerConfig
from runtime_adapter.shared_status import SharedStatus
from runtime_adapter.transport import wire_format as wire
from runtime_adapter.transport.connection import Connection, NcclConnection
from runtime_adapter.transport.dialing import dial
from runtime_adapter.transport.failure_detector import HEARTBEAT_MARGIN_S
from runtime_adapter.transport.handshake import Claim, HandshakeFailed
from runtime_adapter.transport.nccl_channel import card_id, require_own_card
from runtime_adapter.transport.rendezvous import NameTaken, RuntimeFailure
from runtime_adapter.transport.send_queue import SendQueue
from runtime_adapter.weights.expert_map import ExpertMap
from runtime_adapter.worker_process import WorkerConfig, run_worker

#: Between two questions to the store, while this server waits for others.
POLL_INTERVAL_S = 0.1
#: Between two heartbeats of the driver, at most.
HEARTBEAT_INTERVAL_S = 0.5
#: A worker may take so long to start, whatever the time to join: PyTorch loads slowly at times.
WORKER_START_S = 60.0
#: A process that dies more often is not started again.
MAX_DEATHS, DEATHS_WITHIN_S = 5, 60.0
#: A scheduler that is silent for so long beyond the timeout is not waited for at the end: it is
#: started again within that time.
SCHEDULER_MARGIN_S = 30.0
#: A store that this server started gets so long to notice that all have left.
STORE_END_S = 3.0
#: What a server says to the others, by the store, when it cannot join.
DOES_NOT_JOIN = "does not join: "


class LocalServer:
    """Takes part in a run as one of its servers, as a context.

    ``lanes`` are the dispatchers of the requests that run at once; ``requests`` counts them.
    ``report`` gets lines for this server's log. ``fill`` loads the experts that the placement gives
    this server; it is called where the run begins. A server that joins a run that has begun
    (``joined_later``) has none, and gets what it needs by a migration.

    Raises
    ------
    RuntimeFailure
        A port is in use, there is no store, or the worker did not start.
    NameTaken
        The run has a server of that name, which is alive.
    InputError
        The servers do not agree on what they run.
    """

    def __init__(
        self, config: ServerConfig, report: Callable[[str], None],
        fill: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.config = config
        self.rank = config.rendezvous.rank
        self.name = config.name
        self.report = report
        self.expert_map = ExpertMap(config.placement)
        self.counters = Counters(config.model.num_layers, config.model.num_experts)
        self.requests = RequestCounts()
        self.lanes: list[RemoteDispatcher] = []
        self.joined_later = False
        self._fill = fill
        self._client = StoreClient(config.store_address, f"driver {self.rank}")
        self._log = EventLog(config.store_address, f"driver {self.rank}")
        self._peers = PeerTable(config, self.expert_map, report)
        self._status = SharedStatus.create()
        self._own_store: OwnStore | None = None
        self._worker: Any = None
        self._follower: LogFollower | None = None
        self._may_abort = False
        self._finished = False
        self._left = False
        self._has_store = True
        self._stopped = threading.Event()
        self._hung: set[int] = set()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException as error:
            self._abort(error)
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --------------------------------------------------------------------------------------- start

    def _start(self) -> None:
        config = self.config
        if self.rank == 0 and not somebody_listens(config.store_address):
            self._own_store = OwnStore(config)
            self._own_store.wait_until_listening()
        self.joined_later = begun = self._start_run()
        threading.Thread(target=self._send_heartbeats, daemon=True, name="heartbeats").start()
        if begun:
            self.expert_map.set_up(self.rank, ())
            self.report("the run has begun: this server joins without experts, and gets its own")
        else:
            self._fill()
        config.compute.use(self.expert_map)
        if config.channels is not None and config.channels.backend == "nccl":
            self._require_own_card(begun)
        older = older_incarnation(self._client, self.rank)
        self._start_worker()
        self._create_lanes()
        self._follower = LogFollower(
            self.rank, config.placement, self.expert_map, config.compute, self.counters,
            self.lanes, self._log, self.report, self._peers, older,
        )  # fmt: skip
        self._follower.start()
        self._peers.watch()
        threading.Thread(target=self._watch_processes, daemon=True, name="processes").start()

    def _start_run(self) -> bool:
        """Agree with the other servers on what is run; returns whether the run has begun.

        The first server says what it is; the others wait for it.
        """
        config, placement = self.config, self.config.placement
        limit_s = config.rendezvous.rendezvous_timeout_s
        deadline = time.monotonic() + limit_s
        while self.rank != 0 and self._client.run(limit_s)["run"] is None:
            if time.monotonic() > deadline:
                raise RuntimeFailure(
                    f"server {placement.servers[0]!r} did not come within {limit_s:g} s"
                )
            time.sleep(POLL_INTERVAL_S)
        scheduler = config.migration.scheduler
        answer = self._client.start_run(
            {
                "facts": config.facts,
                "servers": list(placement.servers),
                "timeout_s": config.rendezvous.timeout_s,
                "bounds": [placement.on_gpu.shape[0], placement.model.num_pairs],
                "gpus": [len(gpus) for gpus in placement.gpu_capacity],
                "movable": config.migration.movable,
                "scheduler": None if scheduler is None else scheduler.to_json(),
            },
            limit_s,
        )
        if answer["run"]["servers"] == list(placement.servers):
            self._claim_name()
            self._may_abort = not answer["begun"]
        self._require_same_facts(answer["run"])
        return bool(answer["begun"])

    def _require_same_facts(self, run: dict[str, Any]) -> None:
        own = {
            **parse_json(_as_json(self.config.facts), "facts"),
            "servers": list(self.config.placement.servers),
        }
        expected = {**run["facts"], "servers": run["servers"]}
        for key, value in own.items():
            if expected.get(key) != value:
                raise InputError(
                    f"{value!r:.80}",
                    source=f"server {self.name!r}",
                    parameter=key,
                    expected=f"{expected.get(key)!r:.80}, as the first server has it",
                )

    def _claim_name(self) -> None:
        """Wait until an earlier process of this name is down.

        Raises
        ------
        NameTaken
            It is alive.
        """
        began_s = time.monotonic()
        rendezvous = self.config.rendezvous
        waiting = False
        while True:
            member = self._client.members()[self.rank]
            if member["state"] not in ("up", "joining"):
                return
            silent = [member[key] for key in ("worker_silent_s", "driver_silent_s")]
            silent_s = min([seconds for seconds in silent if seconds is not None], default=1e9)
            waited_s = time.monotonic() - began_s
            if silent_s < waited_s - 2 * POLL_INTERVAL_S:  # one came since we look
                raise self._name_taken("is there already")
            if silent_s > HEARTBEAT_MARGIN_S and self._is_refused(member["address"]):
                return  # that process is gone, and its machine says so
            if silent_s > rendezvous.timeout_s + HEARTBEAT_MARGIN_S:
                return
            if waited_s > rendezvous.rendezvous_timeout_s:
                limit_s = rendezvous.rendezvous_timeout_s
                raise self._name_taken(f"is still in the run after {limit_s:g} s")
            if not waiting and waited_s > 2 * HEARTBEAT_INTERVAL_S:
                waiting = True
                self.report("an earlier process of this server is silent: waiting for its end")
            time.sleep(POLL_INTERVAL_S)

    def _name_taken(self, how: str) -> NameTaken:
        return NameTaken(
            f"server {self.name!r} {how}", parameter="server", remedy="start each server once"
        )

    def _is_refused(self, address: Any) -> bool:
        if address is None:
            return True
        claim = Claim("ping", server=self.name)
        try:
            connection, _ = dial(tuple(address), claim, self.config.rendezvous.secret, 0.5)
        except ConnectionRefusedError:
            return True
        except (OSError, HandshakeFailed):
            return False
        connection.close()
        return False

    def _require_own_card(self, begun: bool) -> None:
        assert self.config.channels is not None
        card = card_id(self.config.channels.device)
        epoch = str(self._client.run()["epoch"])
        self._client.put(f"card/{self.rank}", card.encode(), epoch)
        cards, deadline = [], time.monotonic() + self.config.rendezvous.rendezvous_timeout_s
        for n, name in enumerate(self.expert_map.servers):
            while not self._client.has([f"card/{n}"]):
                if begun or time.monotonic() > deadline:
                    break
                time.sleep(POLL_INTERVAL_S)
            found = self._client.has([f"card/{n}"])
            if not found and not begun:
                raise RuntimeFailure(f"server {name!r} did not come in time")
            cards.append(self._client.get(f"card/{n}").decode() if found else "")
        cards[self.rank] = card
        require_own_card(self.rank, cards, self.expert_map.servers)

    def _start_worker(self) -> None:
        """Start the worker and wait until it listens; raises RuntimeFailure where it does not."""
        config = self.config
        context = multiprocessing.get_context("spawn")
        ready, ready_of_worker = context.Pipe()
        max_lanes = max(config.facts.get("lanes", [config.num_lanes]))
        worker_config = WorkerConfig(config, self._status, max_lanes, self._peers.incarnation)
        self._worker = context.Process(
            target=run_process,
            args=(PROGRAM, run_worker, worker_config, ready_of_worker),
            daemon=True,
        )
        self._worker.start()
        ready_of_worker.close()
        timeout_s = max(config.rendezvous.rendezvous_timeout_s, WORKER_START_S)
        try:
            if not ready.poll(timeout_s):
                raise RuntimeFailure(f"its expert worker did not start within {timeout_s:g} s")
            failure = ready.recv()
        except EOFError:
            raise RuntimeFailure("the worker ended while it was starting") from None
        finally:
            ready.close()
        if failure:
            raise RuntimeFailure(failure)

    def _create_lanes(self) -> None:
        """Create a dispatcher for each lane, with connections to all other workers."""
        config = self.config
        send_queue = SendQueue()
        buffer = wire.MessageBuffer(config.max_tokens, config.model.top_k)
        limit_s = config.request_timeout_s

        def connection(n: int, lane: int) -> Connection:
            peer = self._peers.peers[n]
            if config.channels is None:
                return Connection(peer, lane, send_queue, buffer, limit_s)
            interface = config.rendezvous.interface
            return NcclConnection(
                peer, lane, send_queue, buffer, limit_s, config.channels, interface
            )

        self.lanes = [
            RemoteDispatcher(
                config.model,
                Router(self.expert_map, self.rank, config.model, config.network, config.route),
                {n: connection(n, lane) for n in self._peers.peers},
                config.compute,
                self.counters,
                request_timeout_s=limit_s,
                rtt_s=config.rtt_s,
            )
            for lane in range(config.num_lanes)
        ]

    def _abort(self, error: BaseException) -> None:
        """Tell the servers that wait for this one why it does not join."""
        if not self._may_abort or isinstance(error, NameTaken):
            return
        reason = error.message if isinstance(error, PrismError) else "it was stopped"
        self._stopped.set()  # the last heartbeat is to be this one
        with contextlib.suppress(PrismError):
            self._client.heartbeat(
                self.rank, 0, "driver", timeout_s=2.0, error=(DOES_NOT_JOIN + reason)[:400]
            )
            if self._own_store is not None:
                time.sleep(3 * POLL_INTERVAL_S)  # others read it from the store, which ends

    # -------------------------------------------------------------------------------- in the run

    def agree_on_start(self) -> float:
        """Wait until the run begins; returns when it does, by ``time.monotonic``.

        That is in the past where the run has begun before.

        Raises
        ------
        RuntimeFailure
            Not all servers are there in time, or one of them does not join.
        NameTaken
            Another process of this name has joined first.
        """
        limit_s = self.config.rendezvous.rendezvous_timeout_s
        deadline = time.monotonic() + limit_s
        while True:
            if self._status.name_taken[0]:  # by one that was started at the same time
                raise self._name_taken("is there already")
            if self._status.joined[0]:
                seconds = self._client.begin_when_all(self.rank)
                if seconds is not None:
                    return time.monotonic() + seconds
            members = self._client.members()
            missing = [member["name"] for member in members if member["state"] != "up"]
            for member in members:
                error = member["info"].get("error") or ""
                if member["state"] != "up" and error.startswith(DOES_NOT_JOIN):
                    raise RuntimeFailure(f"server {member['name']!r} {error}")
            if time.monotonic() > deadline:
                names = ", ".join(map(repr, missing))
                raise RuntimeFailure(f"server {names} did not come within {limit_s:g} s")
            time.sleep(POLL_INTERVAL_S)

    def _send_heartbeats(self) -> None:
        """Tell the store that this driver lives, whom it suspects and what it does."""
        interval_s = min(self.config.rendezvous.timeout_s / 4, HEARTBEAT_INTERVAL_S)
        limit_s = self.config.rendezvous.timeout_s + HEARTBEAT_MARGIN_S
        answered_s, responds = time.monotonic(), True
        while not self._stopped.wait(interval_s):
            try:
                self._client.heartbeat(
                    self.rank,
                    self._peers.incarnation,
                    "driver",
                    timeout_s=limit_s,
                    suspects=self._peers.silent,
                    requests=self.requests.to_json(),
                    finished=self._finished,
                    error=self.requests.last_error[:400],
                )
            except PrismError as error:
                if responds and not self._left and time.monotonic() - answered_s > limit_s:
                    responds = False
                    self.report(
                        f"no store: {error.message}; nothing moves until it answers, and who is "
                        "lost is not agreed"
                    )
            else:
                answered_s = time.monotonic()
                if not responds:
                    responds = True
                    self.report("the store answers again")

    def _watch_processes(self) -> None:
        """Start the worker, and a store that is this server's, again if they die."""
        deaths: dict[str, deque[float]] = {}

        def may_start(name: str) -> bool:
            times = deaths.setdefault(name, deque(maxlen=MAX_DEATHS))
            now = time.monotonic()
            often = len(times) == MAX_DEATHS and now - times[0] < DEATHS_WITHIN_S
            times.append(now)
            if often:
                self.report(
                    f"{name} has ended, as it did {MAX_DEATHS} times within {DEATHS_WITHIN_S:g} "
                    "s: it is not started again"
                )
            else:
                self.report(f"{name} has ended; it is started again")
            return not often

        watches_worker, watches_store = True, self._own_store is not None
        while not self._stopped.is_set() and (watches_worker or watches_store):
            multiprocessing.connection.wait([self._worker.sentinel], HEARTBEAT_INTERVAL_S)
            if self._stopped.is_set():
                return
            if watches_worker and not self._worker.is_alive():
                watches_worker = may_start("its worker")
                if watches_worker:
                    try:
                        self._start_worker()
                    except RuntimeFailure as error:
                        self.report(f"its worker did not start: {error.message}")
            elif not watches_worker:
                self._stopped.wait(HEARTBEAT_INTERVAL_S)
            if watches_store and self._own_store is not None and self._own_store.ended:
                if self._left:
                    return
                watches_store = may_start("its store")
                if watches_store:
                    self._stopped.wait(1.0)  # until the port is free
                    self._own_store = OwnStore(self.config)

    # ---------------------------------------------------------------------------------------- end

    def finish(self) -> None:
        """Announce that this server has no more requests, and answer others until they have none.

        Waits for every other server that is not down, and for a migration in progress, as the store
        has it. Without a store the other servers say by themselves whether they have finished; who
        says nothing is not waited for beyond the timeout.
        """
        self._status.finished[0] = True
        self._finished = True
        limit_s = self.config.rendezvous.timeout_s + HEARTBEAT_MARGIN_S
        answered_s = time.monotonic()
        while True:
            try:
                status = self._client.status(min(limit_s, 5.0))
            except PrismError:
                silent_s = time.monotonic() - answered_s
                if silent_s > self.config.request_timeout_s or (
                    silent_s > limit_s and not self._peers_need_this_server()
                ):
                    self._has_store = False
                    break
            else:
                answered_s = time.monotonic()
                if self._may_leave(status):
                    break
            self._stopped.wait(POLL_INTERVAL_S)
        self._left = True
        if self._has_store:
            with contextlib.suppress(PrismError):
                self._client.leave(self.rank, self._peers.incarnation, 2.0)

    def _peers_need_this_server(self) -> bool:
        return any(peer.usable and not peer.finished for peer in self._peers.peers.values())

    def _may_leave(self, status: dict[str, Any]) -> bool:
        limit_s = self.config.rendezvous.timeout_s + HEARTBEAT_MARGIN_S
        for n, member in enumerate(status["members"]):
            if n == self.rank or member["state"] in ("down", "left"):
                continue
            if member["info"].get("finished"):
                continue
            driver_silent_s = member["driver_silent_s"]
            absent = member["state"] == "absent" and member["since_s"] > limit_s
            if absent and not self._peers.peers[n].usable:
                continue
            if driver_silent_s is not None and driver_silent_s > limit_s:
                if n not in self._hung and member["state"] == "up":
                    self._hung.add(n)
                    self.report(
                        f"server {member['name']!r}: the process that serves its requests sent no "
                        f"heartbeat for {limit_s:g} s; they are no longer waited for"
                    )
                continue
            return False
        scheduler_silent_s = status["scheduler"]["silent_s"]
        return not (
            self.migrating
            and scheduler_silent_s is not None
            and scheduler_silent_s < limit_s + SCHEDULER_MARGIN_S
        )

    @property
    def migrating(self) -> bool:
        """Whether a migration is in progress, as far as this server knows."""
        return self._follower is not None and self._follower.migrating

    def lost_servers(self) -> list[str]:
        """Names of the servers that are lost now; not those that have left in good order."""
        return self._peers.lost_names

    def held_experts(self) -> list[dict[str, list[int]]]:
        """What this server's GPUs hold now, as a placement file has it."""
        shape = self.config.placement.on_gpu.shape
        held = self.config.placement.replace(on_gpu=self.expert_map.on_gpu().reshape(shape))
        gpus = placement_to_json(held)["servers"][self.rank]["gpus"]
        return [gpu["experts"] for gpu in gpus]

    def migrations(self) -> list[dict[str, Any]]:
        """The reviews' decisions, as in a simulation's report; of the first server."""
        if self.rank != 0 or self.config.migration.scheduler is None or not self._has_store:
            return []
        try:
            if not self._client.has(["migrations"], 5.0):
                return []
            text = self._client.get("migrations", 10.0).decode()
            events = parse_json(text, "the run's store: migrations")
        except (PrismError, UnicodeDecodeError) as error:
            self.report(f"what the reviews decided is not known: {error}")
            return []
        if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
            self.report("what the reviews decided is not known: the store holds something else")
            return []
        return events

    def close(self) -> None:
        """End the worker, and the store where this server has started it."""
        self._stopped.set()
        self._log.close()
        self._peers.close()
        worker = self._worker
        if worker is not None and worker.is_alive():
            worker.terminate()
            worker.join(5)
            if worker.is_alive():
                worker.kill()
        self._client.close()
        if self._own_store is not None:
            self._own_store.close(STORE_END_S if self._left else 0.0)


def _as_json(values: Any) -> str:
    """Facts as they come back from the store: tuples are lists there."""
    import json

    return json.dumps(values)
