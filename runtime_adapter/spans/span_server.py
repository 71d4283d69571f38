"""Executes the spans of this server, for requests of any home, and passes the results on.

What arrives on a connection is executed in the connection's thread, and its result is sent from
there: nothing waits for another thread. The first step alone has a thread of its own, for it may be
a long prompt, or all of a request whose path is this server alone, and the end that its home
decides on comes over the same connection. A request has at most one pass under way, so threads of a
lane hardly ever meet; where they do (chunks of a prompt, a request that is given up), one waits.

Each pass goes along the path from span to span. The server of the last span, the driver, makes a
token, and sends its id to the server of the first span, which begins the next pass with it, and
home (docs/design.md, section 10).
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from prism_plan.errors import PrismError
from prism_plan.model_spec import ModelShape
from runtime_adapter.moe.counters import Counters
from runtime_adapter.moe.emulated_gpu import set_sharp_timers, wait_until
from runtime_adapter.moe.remote_dispatcher import RemoteDispatcher
from runtime_adapter.peer_table import PeerTable
from runtime_adapter.request_repeats import StepFailed, may_pass
from runtime_adapter.server_config import ServerConfig
from runtime_adapter.spans import messages as wire
from runtime_adapter.spans.kv_room import KvRoom
from runtime_adapter.spans.messages import Attempt, RequestSetup, SpanMessage
from runtime_adapter.spans.span_connection import SpanConnection
from runtime_adapter.spans.span_work import SpanWork
from runtime_adapter.transport.peer import ConnectionLost
from runtime_adapter.transport.send_queue import SendQueue
from runtime_adapter.transport.socket_io import keep_alive

#: Between two looks at connections that broke, and at caches that nobody needs any more.
WATCH_INTERVAL_S = 0.2
#: A request waits so long for the caches of an earlier one of its home that are about to be freed.
ROOM_S = 5.0

_HOPS, _HOP_BYTES = Counters.NAMES.index("hops"), Counters.NAMES.index("hop_bytes")
#: Makes a dispatcher by the number of its lane in this process, and the longest step.
NewDispatcher = Callable[[int, int, Counters], RemoteDispatcher]


class SpanLost(ConnectionLost):
    """Another server, by its index, does not answer this one."""

    def __init__(self, server: int, reason: str) -> None:
        self.server = server
        super().__init__(reason)


class _Step(NamedTuple):
    """Some tokens for one span, after ``past`` ones; ``turn`` is the pass."""

    span: int
    past: int
    tokens: int
    turn: int
    flags: int


class _Lane:
    """What this server has of the request that one lane of one home runs now."""

    def __init__(self, model: ModelShape) -> None:
        # held while a step is executed, not while its result is sent: the other side may wait too
        self.lock = threading.Lock()
        self.number = -1
        #: Attempts up to this number are not executed any more.
        self.freed = -1
        self.counters = Counters(model.num_layers, model.num_experts)
        self.dispatcher: RemoteDispatcher | None = None
        self.setup: RequestSetup | None = None
        self.states: list[Any] = []
        self.past: list[int] = []
        self.carried = np.zeros(wire.COUNTED, np.int64)
        self.connections: dict[int, SpanConnection] = {}
        #: What home could not be told yet, for it does not answer.
        self.unsaid: SpanMessage | None = None
        #: Of requests of this home, the last one that each server was told to free, and the servers
        #: that may not know.
        self.last_free: dict[int, Attempt] = {}
        self.unfreed: set[int] = set()

    def goes_to(self, server: int) -> bool:
        """Whether the request that the lane runs now has a span at a server."""
        return self.setup is not None and any(span.server == server for span in self.setup.path)


class SpanServer:
    """Spans of one server; ``deliver`` gets the messages that are for this server as home.

    ``num_lanes`` are those of each home; ``report`` gets lines for this server's log.
    """

    def __init__(
        self, config: ServerConfig, peers: PeerTable, work: SpanWork, num_lanes: list[int],
        new_dispatcher: NewDispatcher, deliver: Callable[[SpanMessage], None],
        report: Callable[[str], None], send_queue: SendQueue,
    ) -> None:  # fmt: skip
        self._config = config
        self._rank = config.rendezvous.rank
        self._peers = peers
        self._work = work
        self._num_lanes = num_lanes
        self._new_dispatcher = new_dispatcher
        self._deliver = deliver
        self._report = report
        self._send_queue = send_queue
        self._chunk_tokens = config.chunk_tokens
        self._rooms = [KvRoom(config.kv_tokens.get(name, 0)) for name in config.placement.servers]
        self._lock = threading.Lock()
        self._lanes: dict[tuple[int, int], _Lane] = {}
        self._incoming: set[socket.socket] = set()
        self._closed = threading.Event()
        #: Dispatchers of all lanes so far, for the follower of the log.
        self.dispatchers: list[RemoteDispatcher] = []

    def start(self) -> None:
        """Begin to look after connections and caches, in a thread."""
        threading.Thread(target=self._watch, daemon=True, name="spans").start()

    def close(self) -> None:
        """End all connections."""
        self._closed.set()
        with self._lock:
            incoming, lanes = list(self._incoming), list(self._lanes.values())
        for connection in incoming:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for lane in lanes:
            for outgoing in list(lane.connections.values()):
                outgoing.close()

    # ---------------------------------------------------------------------------------- connections

    def accept(self, connection: socket.socket, server: str) -> None:
        """Take over an authenticated connection, in a thread of its own."""
        threading.Thread(
            target=self._serve, args=(connection, server), daemon=True, name=f"spans {server}"
        ).start()

    def _serve(self, connection: socket.socket, server: str) -> None:
        config = self._config
        token_bytes = config.width * config.dtype.itemsize
        set_sharp_timers()
        with connection:
            with self._lock:
                self._incoming.add(connection)
            try:
                connection.settimeout(None)
                keep_alive(connection)
                reader = wire.MessageReader(
                    connection, self._num_lanes, config.model.num_layers, token_bytes
                )
                while not self._closed.is_set():
                    message = reader.read()
                    if config.rtt_s:
                        wait_until(time.monotonic() + config.rtt_s / 2)
                    if message.kind == wire.START:  # may be all of a request, whose end comes here
                        threading.Thread(
                            target=self.handle, args=(message,), daemon=True, name="spans start"
                        ).start()
                    else:
                        self.handle(message)
            except OSError:
                pass  # the other side is gone, or dials anew
            except PrismError as error:
                self._report(f"server {server!r}: {error}")
            finally:
                with self._lock:
                    self._incoming.discard(connection)

    def handle(self, message: SpanMessage) -> None:
        """Do what a message asks for."""
        attempt = message.attempt
        if message.kind == wire.FREE:
            self.free(attempt)
            return
        if message.kind == wire.FAILED:
            self._deliver(message)
            return
        if message.kind == wire.TOKEN and attempt.home == self._rank:
            self._deliver(message)
        if message.kind != wire.TOKEN or message.flags & wire.BEGINS:
            self._execute(message)

    # ----------------------------------------------------------------------------------- execution

    def _lane(self, attempt: Attempt) -> _Lane:
        with self._lock:
            key = attempt[:2]
            if key not in self._lanes:
                self._lanes[key] = _Lane(self._config.model)
            return self._lanes[key]

    def _execute(self, message: SpanMessage) -> None:
        """Execute a step, and what follows from it here; tells home where that fails."""
        attempt = message.attempt
        lane = self._lane(attempt)
        try:
            if self._begin(lane, message):
                self._run_all(lane, message)
        except SpanLost as error:
            self._fail(lane, attempt, str(error), may_pass=True, lost=error.server)
        except PrismError as error:
            self._fail(lane, attempt, error.message, may_pass=may_pass(error))
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self._fail(lane, attempt, text, may_pass=may_pass(error))
        if lane.freed >= lane.number:
            self._drop_if_idle(attempt, lane)

    def _begin(self, lane: _Lane, message: SpanMessage) -> bool:
        """Make room for an attempt that is new; False for one that is over."""
        attempt = message.attempt
        with lane.lock:
            newer = max(lane.freed, lane.number)
            if attempt.number < lane.number or attempt.number <= lane.freed:
                if message.kind == wire.START:  # of a home whose clock was set back, or sent twice
                    self._fail(
                        lane, attempt, "it knows a later attempt", may_pass=True, newer=newer
                    )
                return False
            if attempt.number == lane.number:
                return True
            self._drop(attempt, lane)
            if message.setup is None:
                raise StepFailed("it has nothing of this request: it came back", may_pass=True)
            setup = RequestSetup.from_json(
                message.setup, len(self._num_lanes), self._config.model.num_layers
            )
            room = self._rooms[attempt.home]
            if not room.take(attempt[:2], setup.kv_tokens, ROOM_S):
                raise StepFailed(
                    f"a request of {setup.kv_tokens:,} tokens; its home may have {room.limit:,} in "
                    "flight (kv_tokens)",
                    may_pass=room.fits(setup.kv_tokens),
                )
            self._require_dispatcher(lane, attempt, setup)
            lane.setup, lane.number = setup, attempt.number
            lane.carried[:] = 0
            lane.past = [0] * len(setup.path)
            lane.states = [
                self._work.begin(setup, span) if span.server == self._rank else None
                for span in setup.path
            ]
        return True

    def _require_dispatcher(self, lane: _Lane, attempt: Attempt, setup: RequestSetup) -> None:
        """Make the lane's dispatcher, or one for longer steps."""
        tokens = setup.kv_tokens
        if self._chunk_tokens:
            tokens = min(tokens, self._chunk_tokens)
        old = lane.dispatcher
        if old is None or old.max_tokens < tokens:
            number = attempt.lane + max(self._num_lanes) * (1 + attempt.home)
            lane.dispatcher = self._new_dispatcher(number, tokens, lane.counters)
            if old is not None:
                self.dispatchers.remove(old)
                for connection in old.connections.values():
                    connection.close()
            self.dispatchers.append(lane.dispatcher)
        assert lane.dispatcher is not None
        lane.dispatcher.request = setup.request

    def _run_all(self, lane: _Lane, message: SpanMessage) -> None:
        """Run a message's tokens, a prompt's in chunks."""
        attempt, none = message.attempt, np.zeros(wire.COUNTED, np.int64)
        if message.kind == wire.TOKEN:
            step = _Step(0, message.past, 1, message.turn + 1, wire.LAST)
            self._run(lane, attempt, step, message.payload, none)
            return
        step = _Step(message.span, message.past, message.tokens, message.turn, message.flags)
        if message.kind == wire.STATES:
            self._run(lane, attempt, step, message.payload, message.counts)
            return
        chunk = self._chunk_tokens or message.tokens
        ids = message.payload.view(np.int32)
        for begin in range(0, message.tokens, chunk):
            part = ids[begin : begin + chunk]
            last = begin + chunk >= message.tokens
            step = _Step(0, begin, len(part), message.turn, wire.LAST if last else 0)
            self._run(lane, attempt, step, part.view(np.uint8), none)

    def _run(
        self, lane: _Lane, attempt: Attempt, step: _Step, inputs: wire.Bytes, counts: wire.Counts
    ) -> None:
        """Run some tokens through a span and pass them on; a driver of all spans goes on alone."""
        while True:
            done = self._run_span(lane, attempt, step, inputs)
            if done is None:
                return
            setup, outputs = done
            counts = counts + lane.counters.take()
            if step.span + 1 < len(setup.path):
                message = SpanMessage(
                    wire.STATES, attempt, step.span + 1, step.past, step.tokens, step.flags,
                    step.turn, outputs, counts=counts,
                )  # fmt: skip
                if step.turn == 0:
                    message.setup = setup.to_json()
                self._hop(lane, setup.path[step.span + 1].server, message)
                return
            lane.carried += counts
            if not step.flags & wire.LAST:
                return
            token = self._work.token(outputs)
            ended = step.turn + 1 >= setup.new_tokens or self._work.is_end(token)
            inputs = wire.ids_payload([token])
            first = setup.path[0].server
            past = step.past + step.tokens
            self._send_token(lane, attempt, inputs, past, step.turn, first, ended=ended)
            if ended:
                lane.freed = attempt.number
            if ended or first != self._rank:
                return
            step = _Step(0, past, 1, step.turn + 1, wire.LAST)
            counts = np.zeros_like(counts)

    def _run_span(
        self, lane: _Lane, attempt: Attempt, step: _Step, inputs: wire.Bytes
    ) -> tuple[RequestSetup, Any] | None:
        """Run one span; gives the request's setup and the results.

        None where the attempt is over, or has had this step.
        """
        with lane.lock:
            if lane.number != attempt.number or lane.freed >= attempt.number:
                return None
            if not step.span < len(lane.states) or lane.states[step.span] is None:
                raise StepFailed("a span of another server", may_pass=False)
            past = lane.past[step.span]
            if step.past < past:
                return None  # sent twice, over two connections
            if step.past > past:
                raise StepFailed(
                    f"a step after {step.past} tokens, of which it has {past}", may_pass=True
                )
            assert lane.setup is not None
            if past + step.tokens > lane.setup.kv_tokens:
                raise StepFailed("a step beyond the request's own tokens", may_pass=False)
            assert lane.dispatcher is not None
            outputs = self._work.run(
                lane.states[step.span], lane.dispatcher, inputs, past, step.tokens
            )
            lane.past[step.span] += step.tokens
            return lane.setup, outputs

    def _send_token(
        self, lane: _Lane, attempt: Attempt, ids: wire.Bytes, past: int, turn: int, first: int,
        *, ended: bool,
    ) -> None:  # fmt: skip
        """Send a token to the first span's server, which goes on with it, and home."""
        counts, lane.carried = lane.carried, np.zeros_like(lane.carried)
        home = attempt.home
        begins = not ended and first != self._rank
        token = SpanMessage(wire.TOKEN, attempt, 0, past, turn=turn, payload=ids)
        # before anything is sent, for the message that goes home takes them
        for target in {first, home} if begins else {home}:
            if target != self._rank:
                counts[_HOPS] += 1
                counts[_HOP_BYTES] += len(ids)
        token.counts = counts
        if begins:
            token.flags = wire.BEGINS
            self._send(lane, first, token, (attempt.number, turn))
            token.flags = 0  # its bytes are packed
        if ended:
            token.flags = wire.ENDED
        if home == self._rank:
            self._deliver(token)
        elif not (begins and first == home):
            self._send(lane, home, token, None)

    def _hop(self, lane: _Lane, target: int, message: SpanMessage) -> None:
        message.counts[_HOPS] += 1
        message.counts[_HOP_BYTES] += len(message.payload)
        self._send(lane, target, message, (message.attempt.number, message.turn))

    def send(self, target: int, message: SpanMessage, step: tuple[int, int] | None) -> None:
        """Send a message of a lane of this home; raises ConnectionLost."""
        self._send(self._lane(message.attempt), target, message, step)

    def _send(
        self, lane: _Lane, target: int, message: SpanMessage, step: tuple[int, int] | None
    ) -> None:
        if target not in lane.connections:
            home, of_home, _ = message.attempt
            number = of_home + max(self._num_lanes) * (1 + home)
            lane.connections[target] = SpanConnection(
                self._peers.peers[target], number, self._send_queue
            )
        if self._closed.is_set():
            lane.connections[target].close()
        self._peers.wait_for_address(target)
        try:
            lane.connections[target].send(message.pack(), step)
        except ConnectionLost as error:
            raise SpanLost(target, str(error)) from None

    def _fail(
        self, lane: _Lane, attempt: Attempt, text: str, *, may_pass: bool, **more: int
    ) -> None:
        """Tell home that a step cannot be done here.

        ``more`` may have the index of a server that is ``lost``, or that there were attempts up to
        ``newer``.
        """
        name = self._config.name
        failed = SpanMessage(wire.FAILED, attempt)
        failed.setup = {"text": f"server {name!r}: {text}"[:1000], "may_pass": may_pass, **more}
        if attempt.home == self._rank:
            self._deliver(failed)
            return
        lane.unsaid = failed
        self._say_unsaid(lane)

    def _say_unsaid(self, lane: _Lane) -> None:
        """Tell home what it has not been told, or keep it: it may wait for a token that long."""
        failed = lane.unsaid
        if failed is not None and self._peers.peers[failed.attempt.home].usable:
            with contextlib.suppress(ConnectionLost):
                self._send(lane, failed.attempt.home, failed, None)
                lane.unsaid = None

    # --------------------------------------------------------------------------------------- caches

    def free(self, attempt: Attempt) -> None:
        """An attempt is over: its caches are freed, now or when the step under way has ended.

        Its first step may still be on its way here, and is not executed then.
        """
        lane = self._lane(attempt)
        lane.freed = max(lane.freed, attempt.number)
        self._drop_if_idle(attempt, lane)

    def send_free(self, target: int, attempt: Attempt) -> None:
        """Let another server free an attempt of this home, when it answers again at the latest."""
        lane = self._lane(attempt)
        lane.last_free[target] = attempt
        try:
            self._send(lane, target, SpanMessage(wire.FREE, attempt), None)
        except ConnectionLost:
            lane.unfreed.add(target)

    def _send_unfreed(self, lane: _Lane) -> None:
        """Tell servers that answer again what they missed."""
        for target in list(lane.unfreed):
            if self._peers.peers[target].usable:
                lane.unfreed.discard(target)
                self.send_free(target, lane.last_free[target])

    def _drop_if_idle(self, attempt: Attempt, lane: _Lane) -> None:
        if lane.lock.acquire(blocking=False):
            try:
                if lane.freed >= lane.number:
                    self._drop(attempt, lane)
            finally:
                lane.lock.release()

    def _drop(self, attempt: Attempt, lane: _Lane) -> None:
        """Free the caches of a lane."""
        lane.states, lane.past, lane.setup = [], [], None
        for connection in list(lane.connections.values()):
            connection.forget(lane.number)
        self._rooms[attempt.home].give_back(attempt[:2])

    def cached_tokens(self) -> int:
        """Tokens that requests have in caches of this server now, each span counted."""
        with self._lock:
            return sum(sum(lane.past) for lane in self._lanes.values())

    def take_called(self) -> npt.NDArray[np.int64]:
        """Calls of each expert in spans of this server since the last time, by home, [N, L, E]."""
        model = self._config.model
        called = np.zeros((len(self._num_lanes), model.num_layers, model.num_experts), np.int64)
        with self._lock:
            lanes = list(self._lanes.items())
        for (home, _), lane in lanes:
            called[home] += lane.counters.take_called()
        return called

    # ------------------------------------------------------------------------------------- watching

    def _watch(self) -> None:
        """Make broken connections anew, and free caches of homes that are down."""
        while not self._closed.wait(WATCH_INTERVAL_S):
            with self._lock:
                lanes = list(self._lanes.items())
            for (home, number), lane in lanes:
                attempt = Attempt(home, number, lane.number)
                for server, connection in list(lane.connections.items()):
                    try:
                        connection.renew()
                    except ConnectionLost as error:
                        if server in lane.last_free:
                            lane.unfreed.add(server)
                        # what is kept may be of an attempt before, and for a server of its path;
                        # home may lack tokens of one that has ended here
                        needed = server == home or (
                            lane.freed < lane.number and lane.goes_to(server)
                        )
                        if needed and lane.number >= 0:
                            self._fail(lane, attempt, str(error), may_pass=True, lost=server)
                self._say_unsaid(lane)
                self._send_unfreed(lane)
                if home != self._rank and self._peers.is_down(home) and lane.freed < lane.number:
                    lane.freed = lane.number
                    # its worker may have been lost alone, and its requests go on
                    self._fail(lane, attempt, "its home was taken for lost", may_pass=True)
                if lane.states and lane.freed >= lane.number:
                    self._drop_if_idle(attempt, lane)
