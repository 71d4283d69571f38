"""What a worker answers on its port: calls, pings, requests for weights, keys of data channels.

Each connection has a thread of its own, which ends with it. A driver that dials a lane anew takes
the place of its earlier connection, which may be stuck.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from runtime_adapter.call_handler import CallHandler, NcclCallHandler
from runtime_adapter.moe.compute import ExpertCompute
from runtime_adapter.moe.emulated_gpu import set_sharp_timers, wait_until
from runtime_adapter.server_config import ServerConfig
from runtime_adapter.transport import wire_format as wire
from runtime_adapter.transport.c10d_store import PairKeys, PairStore
from runtime_adapter.transport.handed_sockets import hand_over
from runtime_adapter.transport.handshake import Session
from runtime_adapter.transport.nccl_channel import DataChannelBroken, open_channel
from runtime_adapter.transport.peer import PING, pong
from runtime_adapter.transport.send_queue import LONG_BYTES, Sending, SendQueue
from runtime_adapter.transport.socket_io import keep_alive, send_all, wait_in_slices
from runtime_adapter.weights.expert_map import ExpertMap
from runtime_adapter.weights.peer_loader import answer_weight_requests

Handler = Callable[[socket.socket, Session], None]


class WorkerLanes:
    """The handlers of a worker's :class:`~runtime_adapter.transport.listener.Listener`.

    Connections for spans go to the driver by ``to_driver``. ``finished`` says whether this server's
    driver makes no more calls. Compile the unpacking of
    calls before (:func:`~runtime_adapter.transport.wire_kernels.compile_unpacking`).
    """

    def __init__(
        self, config: ServerConfig, expert_map: ExpertMap, to_driver: socket.socket, *,
        finished: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._config = config
        self._expert_map = expert_map
        self._finished = finished
        self._to_driver = to_driver
        self._name = config.placement.servers[config.rendezvous.rank]
        self._send_queue = SendQueue()
        self._lock = threading.Lock()
        self._current: dict[tuple[str, str, int], socket.socket] = {}
        self._keys: dict[tuple[str, int], PairKeys] = {}

    def handlers(self) -> dict[str, Handler]:
        """The handler of each purpose of a connection."""
        return {
            "calls": self.serve_calls,
            "ping": self.answer_pings,
            "weights": self.answer_weights,
            "channel": self.answer_keys,
            "spans": self.hand_over,
        }

    @contextlib.contextmanager
    def _in_place_of_earlier(self, connection: socket.socket, session: Session) -> Iterator[None]:
        claim = session.claim
        place = (claim.purpose, claim.server, claim.lane)
        with self._lock:
            earlier = self._current.pop(place, None)
            self._current[place] = connection
            if earlier is not None:  # under the lock: its thread closes it after leaving
                with contextlib.suppress(OSError):
                    earlier.shutdown(socket.SHUT_RDWR)
        try:
            connection.settimeout(None)
            keep_alive(connection)
            yield
        finally:
            with self._lock:
                if self._current.get(place) is connection:
                    del self._current[place]

    # --------------------------------------------------------------------------------------- calls

    def serve_calls(self, connection: socket.socket, session: Session) -> None:
        """Answer the calls of one lane of one driver until it closes the connection."""
        set_sharp_timers()
        handler: CallHandler | None = None
        with self._in_place_of_earlier(connection, session):
            try:
                wait_in_slices(connection, receiving=False)
                handler = self._call_handler(session)
                self._answer_calls(handler, connection)
            except (OSError, DataChannelBroken):
                pass  # that driver is gone, or dials anew
            except wire.WireError as error:
                self._refuse(connection, session, error)
            finally:
                if handler is not None:
                    handler.close()

    def _call_handler(self, session: Session) -> CallHandler:
        claim, channels = session.claim, self._config.channels
        if channels is None:
            return CallHandler(self._config, claim.max_tokens, self._expert_map)
        rendezvous = self._config.rendezvous
        with self._lock:
            keys = self._keys.pop((claim.server, claim.lane), None)
        if keys is None:
            raise wire.WireError(f"server {claim.server!r} calls without a data channel")
        store = PairStore(keys, rendezvous.timeout_s)
        channel = open_channel(channels, store, 1, rendezvous.interface, rendezvous.timeout_s)
        return NcclCallHandler(self._config, claim.max_tokens, self._expert_map, channel)

    def _answer_calls(self, handler: CallHandler, connection: socket.socket) -> None:
        """Answer calls; OSError when the driver is gone, WireError if it sends something else."""
        rtt_s = self._config.rtt_s
        buffer = memoryview(handler.buffer.numpy())
        queued: Sending | None = None
        try:
            while True:
                _receive_call(handler, connection, buffer)
                if rtt_s:
                    wait_until(time.monotonic() + rtt_s / 2)
                reply = memoryview(self._answer(handler).numpy())
                # not waited for: the driver calls again only after all of it has arrived
                if len(reply) < LONG_BYTES:
                    send_all(connection, reply)
                else:
                    queued = self._send_queue.put(connection, reply)
        finally:
            if queued is not None:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                self._send_queue.cancel(queued)

    @staticmethod
    def _answer(handler: CallHandler) -> torch.Tensor:
        try:
            return handler.answer(handler.header())
        except DataChannelBroken:
            raise
        except Exception as error:
            logging.getLogger(__name__).error("%s", error)
            return handler.header_only(wire.Header(wire.FAILED))

    @staticmethod
    def _refuse(connection: socket.socket, session: Session, error: wire.WireError) -> None:
        """Tell a driver that its calls cannot be answered, and the log why."""
        logging.getLogger(__name__).error("%s (from server %r)", error, session.claim.server)
        reply = np.zeros(wire.HEADER_BYTES, np.uint8)
        wire.put_header(reply, wire.Header(wire.FAILED))
        with contextlib.suppress(OSError):
            connection.sendall(reply.data)
            connection.shutdown(socket.SHUT_WR)
            # what has not been read would reset the connection, and so the answer
            while connection.recv(1 << 16):
                pass

    # -------------------------------------------------------------------------------------- others

    def answer_pings(self, connection: socket.socket, session: Session) -> None:
        """Answer pings until the other side closes the connection."""
        connection.settimeout(None)
        keep_alive(connection)
        with contextlib.suppress(OSError):
            while asked := connection.recv(1):
                if asked != PING:
                    return
                connection.sendall(pong(self._name, self._finished()))

    def answer_weights(self, connection: socket.socket, session: Session) -> None:
        """Answer another worker's requests for the weights of experts that are here."""
        compute = self._config.compute
        if isinstance(compute, ExpertCompute):  # timed work has no weights
            with self._in_place_of_earlier(connection, session):
                answer_weight_requests(compute.store, connection)

    def hand_over(self, connection: socket.socket, session: Session) -> None:
        """Give the connection to this server's driver, which executes layers."""
        hand_over(self._to_driver, connection, session)

    def answer_keys(self, connection: socket.socket, session: Session) -> None:
        """Keep the keys of a data channel that a driver's lane is about to make."""
        place = (session.claim.server, session.claim.lane)
        keys = PairKeys()
        with self._in_place_of_earlier(connection, session):
            with self._lock:
                self._keys[place] = keys
            keys.answer(connection, session)
            with self._lock:
                if self._keys.get(place) is keys:
                    del self._keys[place]


def _receive_call(handler: CallHandler, connection: socket.socket, buffer: memoryview) -> None:
    """Receive one call into the handler's buffer."""
    received, size = 0, 0
    while not size or received < size:
        # all that is there: a driver sends nothing more before it has its answer
        got = connection.recv_into(buffer[received:])
        if not got:
            raise ConnectionResetError("closed by the other side")
        received += got
        size = size or handler.message_bytes(received)
    if received > size:
        raise wire.WireError("a call with bytes behind its end")
