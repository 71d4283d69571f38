"""Runs the requests of this home over paths of several servers, and waits for their tokens."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from prism_plan.errors import InputError
from prism_plan.execution_table import Span, spans
from runtime_adapter.moe.counters import Counters
from runtime_adapter.peer_table import PeerTable
from runtime_adapter.request_repeats import StepFailed
from runtime_adapter.server_config import ServerConfig
from runtime_adapter.spans import messages as wire
from runtime_adapter.spans.kv_room import KvRoom
from runtime_adapter.spans.messages import Attempt, RequestSetup, SpanMessage
from runtime_adapter.spans.request_path import PathCosts, path_of_home
from runtime_adapter.spans.span_server import SpanServer
from runtime_adapter.transport.peer import ConnectionLost
from runtime_adapter.transport.rendezvous import RequestTimeout, ServerLost
from runtime_adapter.weights.expert_map import ExpertMap

#: Attempts are numbered below this.
MAX_NUMBER = 1 << 62
#: A server of the table that has no address yet, for it is about to join, is waited for so long.
FIRST_ADDRESS_S = 1.0
#: Between two looks at the servers that a request waits for.
LOOK_INTERVAL_S = 0.25


class PathRequests:
    """Requests of one home; ``counters`` are its own, in which all servers' counts are added up.

    ``kv_tokens`` of the home bound the tokens that its requests have in flight, wherever they are
    executed.
    """

    def __init__(
        self, config: ServerConfig, peers: PeerTable, expert_map: ExpertMap, counters: Counters
    ) -> None:
        self._config = config
        self._rank = config.rendezvous.rank
        self._peers = peers
        self._expert_map = expert_map
        self._counters = counters
        # ascends also where this home was restarted, unless its clock was set back meanwhile
        self._numbers = itertools.count(time.time_ns() // 1000)
        self._lock = threading.Lock()
        self._events: dict[Attempt, queue.SimpleQueue[SpanMessage]] = {}
        self._room = KvRoom(config.kv_tokens.get(config.name, 0))
        #: Servers that do not answer another one of a path, and until when to do without them.
        self._avoided_until_s: dict[int, float] = {}
        self._table = config.placement.execution_table
        self.spans: SpanServer | None = None
        #: By which paths around lost servers are chosen, where a cluster's figures are known.
        self.costs: PathCosts | None = None

    def path(self) -> tuple[Span, ...]:
        """Where a request that begins now executes."""
        if self.spans is None:
            return tuple(spans(np.full(self._config.model.num_layers, self._rank)))
        row = self._table[self._rank]
        for n in set(row.tolist()) - {self._rank}:
            self._peers.wait_for_address(n, FIRST_ADDRESS_S)
        now = time.monotonic()
        lost = [
            n
            for n, peer in self._peers.peers.items()
            if self._expert_map.lost(n)
            or not peer.usable
            or self._avoided_until_s.get(n, now) > now
        ]
        return path_of_home(
            row, self._config.placement, self._expert_map, self._rank, lost, self.costs
        )

    def begin_table(self, table: list[list[int]]) -> None:
        """Requests that start from now on execute by this table [N][L]."""
        self._table = np.array(table, np.int32)

    def is_home(self, path: tuple[Span, ...]) -> bool:
        """Whether all layers of a path execute here."""
        return all(span.server == self._rank for span in path)

    @contextlib.contextmanager
    def room(self, lane: int, tokens: int) -> Iterator[None]:
        """In the block, a request of a lane may have so many tokens in caches; waits for others.

        Raises
        ------
        InputError
            The home's users may never have so many in flight.
        """
        if not self._room.take(lane, tokens):
            raise InputError(
                f"a request of {tokens:,} tokens, prompt and answer",
                expected=f"at most {self._room.limit:,}, for which there is memory "
                f"(kv_tokens of {self._config.name!r})",
            )
        try:
            yield
        finally:
            self._room.give_back(lane)

    def deliver(self, message: SpanMessage) -> None:
        """Take a token, or a failure; called in the thread of a connection."""
        with self._lock:
            events = self._events.get(message.attempt)
        if events is not None:
            events.put(message)

    def run(
        self, lane: int, setup: RequestSetup, ids: list[int], add: Callable[[int], None]
    ) -> None:
        """Run a request of a lane to its end; ``ids`` are its prompt and the tokens so far.

        ``add`` gets each token as it arrives here.

        Raises
        ------
        StepFailed
            A server of the path cannot do a step.
        ServerLost
            A server of the path does not answer.
        RequestTimeout
            No token has come for the run's ``request_timeout_s``.
        """
        attempt = Attempt(self._rank, lane, next(self._numbers))
        events: queue.SimpleQueue[SpanMessage] = queue.SimpleQueue()
        with self._lock:
            self._events[attempt] = events
        try:
            self._start(attempt, setup, ids)
            self._wait(events, setup, add)
        except ConnectionLost as error:
            raise StepFailed(str(error), may_pass=True) from None
        finally:
            with self._lock:
                del self._events[attempt]
            self._free(attempt, setup)

    def _start(self, attempt: Attempt, setup: RequestSetup, ids: list[int]) -> None:
        assert self.spans is not None
        first = setup.path[0].server
        payload = wire.ids_payload(ids)
        message = SpanMessage(
            wire.START, attempt, 0, 0, len(ids), wire.LAST, 0, payload, setup.to_json()
        )
        if first == self._rank:
            self.spans.handle(message)
            return
        self.spans.send(first, message, (attempt.number, 0))
        self._counters.count(hops=1, hop_bytes=len(payload))

    def _wait(
        self, events: queue.SimpleQueue[SpanMessage], setup: RequestSetup,
        add: Callable[[int], None],
    ) -> None:  # fmt: skip
        turn, since_s = 0, time.monotonic()
        while True:
            try:
                event = events.get(timeout=LOOK_INTERVAL_S)
            except queue.Empty:
                self._look(setup, since_s)
                continue
            if event.kind == wire.FAILED:
                self._raise_failed(event)
            if event.turn > turn:
                raise StepFailed("a token was lost on its way home", may_pass=True)
            if event.turn < turn:
                continue  # sent twice, over two connections
            turn, since_s = turn + 1, time.monotonic()
            (token,) = event.ids()
            if token < 0:
                raise StepFailed("a token that is none", may_pass=False)
            self._counters.add(event.counts)
            add(token)
            if event.ends:
                return

    def _look(self, setup: RequestSetup, since_s: float) -> None:
        """Decide whether a token is waited for."""
        for span in setup.path:
            if span.server != self._rank and not self._peers.peers[span.server].usable:
                name = self._config.placement.servers[span.server]
                raise ServerLost(span.server, name, "it executes layers of this request")
        limit_s = self._config.request_timeout_s
        if time.monotonic() - since_s > limit_s:
            raise RequestTimeout(limit_s, "the servers of its path answer pings, but send no token")

    def _raise_failed(self, event: SpanMessage) -> None:
        said = event.setup if isinstance(event.setup, dict) else {}
        newer = said.get("newer")
        if isinstance(newer, int) and 0 <= newer < MAX_NUMBER:
            self._numbers = itertools.count(newer + 1)
        lost = said.get("lost")
        if isinstance(lost, int) and lost in self._peers.peers:
            limit_s = self._config.rendezvous.timeout_s
            self._avoided_until_s[lost] = time.monotonic() + limit_s
        raise StepFailed(
            str(said.get("text", "a server cannot do a step"))[:1000],
            may_pass=said.get("may_pass") is True,
        )

    def _free(self, attempt: Attempt, setup: RequestSetup) -> None:
        """Let all servers of the path free the request's caches."""
        assert self.spans is not None
        self.spans.free(attempt)
        for server in sorted({span.server for span in setup.path} - {self._rank}):
            self.spans.send_free(server, attempt)
