"""The process that answers requests to a run's store.

One thread, which never waits for a single client: of each connection there is one request at a time
in memory, and what strangers may take is bounded before they have shown that they know the secret.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prism_plan.errors import PrismError
from runtime_adapter.control.store.messages import (
    MAX_FRAME_BYTES,
    MAX_KEY,
    MAX_WAIT_S,
    error_fields,
    pack,
    unpack,
)
from runtime_adapter.control.store.methods import StoreMethods, wait_seconds
from runtime_adapter.transport.handshake import Session, accept_session_async
from runtime_adapter.transport.rendezvous import RuntimeFailure
from runtime_adapter.transport.secrets import RunSecret
from runtime_adapter.transport.signed_frames import AsyncSignedFrames, FrameError
from runtime_adapter.transport.stranger_limits import (
    HANDSHAKE_TIMEOUT_S,
    MAX_FAILURES_PER_S,
    MAX_UNAUTHENTICATED,
    REPORT_INTERVAL_S,
)

#: Connections for each server of the run, and for all others.
SERVER_CONNECTIONS, OTHER_CONNECTIONS = 8, 32
#: A connection without a request for so long is closed; its client makes a new one if need be.
IDLE_S = 120.0
#: How long a client may take to receive an answer.
ANSWER_TIMEOUT_S = 60.0
TICK_S = 0.1
#: The service goes on for so long after the run is over, for the answers to those who leave.
LINGER_S = 1.0
#: Bytes of a connection that the kernel keeps unsent.
_UNSENT_BYTES = 32 << 10

Report = Callable[[str], None]


@dataclass(eq=False)
class _Client:
    """An authenticated connection."""

    name: str
    frames: AsyncSignedFrames
    writer: asyncio.StreamWriter
    last_s: float
    busy: bool = False


class Refusals:
    """Counts handshakes that failed; ``report`` gets a line about them once a minute at most."""

    def __init__(self, report: Report, now: Callable[[], float] = time.monotonic) -> None:
        self._report = report
        self._now = now
        self._second = (0.0, 0)
        self._reported_s: float | None = None
        self._count = 0

    def note(self, address: str, reason: str, *, told: bool = True) -> None:
        """A connection from an address was refused; no line about one that is not ``told``."""
        now = self._now()
        began_s, count = self._second
        self._second = (now, 1) if now - began_s >= 1.0 else (began_s, count + 1)
        self._count += 1
        if not told:
            return
        if self._reported_s is None or now - self._reported_s >= REPORT_INTERVAL_S:
            others = f"; {self._count:,} since the last such line" if self._count > 1 else ""
            self._report(f"the store refused a connection from {address}: {reason:.160}{others}")
            self._reported_s, self._count = now, 0

    def pause_s(self) -> float:
        """For how long to accept nobody."""
        began_s, count = self._second
        return max(began_s + 1.0 - self._now(), 0.0) if count >= MAX_FAILURES_PER_S else 0.0


class StoreService:
    """Serves a store at a socket that listens; ``keep`` after its run is over as well.

    ``report`` gets lines about what is wrong, ``tell`` about what happens in the run.
    """

    def __init__(
        self, listener: socket.socket, secret: RunSecret, *, keep: bool, report: Report,
        tell: Report = lambda text: None,
    ) -> None:  # fmt: skip
        self._listener = listener
        self._secret = secret
        self._keep = keep
        self._report = report
        self._appended = asyncio.Event()
        self._store = StoreMethods(on_append=self._wake_readers, tell=tell)
        self._clients: set[_Client] = set()
        self._handshakes: dict[int, asyncio.Task[None]] = {}  # the oldest first
        self._tasks: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count()
        self._refusals = Refusals(report)
        self._began_s = time.monotonic()
        self._internal_errors = 0

    async def serve(self) -> None:
        """Serve until the run is over."""
        self._listener.setblocking(False)
        accepting = asyncio.create_task(self._accept())
        over_s: float | None = None
        try:
            while over_s is None or time.monotonic() < over_s + LINGER_S:
                await asyncio.sleep(TICK_S)
                self._store.tick()
                self._close_idle()
                if self._keep or not self._store.is_over:
                    over_s = None
                elif over_s is None:
                    over_s = time.monotonic()
                if accepting.done():
                    raise RuntimeFailure("the socket of the store failed") from (
                        accepting.exception()
                    )
        finally:
            accepting.cancel()
            for task in (*self._handshakes.values(), *self._tasks):
                task.cancel()

    def _wake_readers(self) -> None:
        self._appended.set()
        self._appended = asyncio.Event()

    # ------------------------------------------------------------------ connections

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._refusals.pause_s())
            try:
                connection, address = await loop.sock_accept(self._listener)
            except OSError as error:  # the other side is gone already, or descriptors are short
                self._refusals.note("the network", error.strerror or str(error))
                await asyncio.sleep(TICK_S)
                continue
            if len(self._handshakes) >= MAX_UNAUTHENTICATED:
                oldest = next(iter(self._handshakes))
                self._handshakes.pop(oldest).cancel()
            number = next(self._numbers)
            task = asyncio.create_task(self._serve_connection(number, connection, address[0]))
            self._handshakes[number] = task
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve_connection(self, number: int, connection: socket.socket, host: str) -> None:
        """Authenticate a connection and answer its requests."""
        writer = None
        accepted = False
        try:
            _set_options(connection)
            reader, writer = await asyncio.open_connection(sock=connection)
            session = await accept_session_async(reader, writer, self._secret, HANDSHAKE_TIMEOUT_S)
            if session.claim.purpose != "control":
                raise RuntimeFailure(f"it asks the store for {session.claim.purpose!r:.40}")
            accepted = True
            self._handshakes.pop(number, None)
            await self._serve_client(session, reader, writer)
        except asyncio.CancelledError:
            # as _accept has it, not at the end of the service, nor for one that was authenticated
            if not accepted and number not in self._handshakes:
                # at first there are those that came, and went, while there was no service
                told = time.monotonic() - self._began_s > HANDSHAKE_TIMEOUT_S
                self._refusals.note(host, "too many connections that say nothing", told=told)
        except (PrismError, OSError, EOFError) as error:  # and TimeoutError
            if not accepted:
                # a client that went away, or looked whether somebody is here, is nothing to tell
                told = not isinstance(error, (ConnectionError, EOFError))
                self._refusals.note(host, str(error) or type(error).__name__, told=told)
        except Exception as error:
            self._note_internal(error)
        finally:
            self._handshakes.pop(number, None)
            if writer is None:
                connection.close()
            else:
                writer.transport.abort()

    async def _serve_client(
        self, session: Session, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        frames = AsyncSignedFrames(reader, writer, session, MAX_FRAME_BYTES)
        name = session.claim.server[:MAX_KEY]
        client = _Client(name, frames, writer, time.monotonic())
        self._make_room()
        self._clients.add(client)
        try:
            while True:
                frame = await frames.receive()
                client.busy, client.last_s = True, time.monotonic()
                answer = await self._answer(frame, name)
                del frame
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    await frames.send(answer)
                del answer
                client.busy, client.last_s = False, time.monotonic()
        except (FrameError, OSError, EOFError):  # it is gone
            pass
        finally:
            self._clients.discard(client)

    def _make_room(self) -> None:
        """Close the connection that was used least, if there are too many."""
        limit = SERVER_CONNECTIONS * self._store.num_servers + OTHER_CONNECTIONS
        while len(self._clients) >= limit:
            oldest = min(self._clients, key=lambda client: (client.busy, client.last_s))
            self._clients.discard(oldest)
            oldest.writer.transport.abort()

    def _close_idle(self) -> None:
        now = time.monotonic()
        for client in list(self._clients):
            if not client.busy and now - client.last_s > IDLE_S:
                client.writer.transport.abort()

    # ------------------------------------------------------------------ requests

    async def _answer(self, frame: bytes, client: str) -> bytes:
        """The answer to a request, whatever the request is."""
        head: dict[str, Any] = {}
        try:
            head, body = unpack(frame, "a request to the run's store")
            method = head.get("method")
            result, answer_body = self._store.call(str(method), head, client, body)
            if method == "read" and result is None:
                result = await self._wait_for_entry(head, client)
            return pack({**self._envelope(head), "result": result}, answer_body)
        except PrismError as error:
            return pack({**self._envelope(head), **error_fields(error)})
        except Exception as error:
            self._note_internal(error)
            failure = RuntimeFailure("the run's store failed at this request")
            return pack({**self._envelope(head), **error_fields(failure)})

    def _envelope(self, head: dict[str, Any]) -> dict[str, Any]:
        number = head.get("id")
        return {
            "id": number if type(number) is int and abs(number) < 1 << 63 else None,
            "epoch": self._store.epoch,
            "has_run": self._store.has_run,
        }

    async def _wait_for_entry(self, head: dict[str, Any], client: str) -> Any:
        deadline = time.monotonic() + wait_seconds(head, MAX_WAIT_S)
        while (left_s := deadline - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._appended.wait()
            result, _ = self._store.call("read", head, client, b"")
            if result is not None:
                return result
        return self._store.nothing_to_read(head)

    def _note_internal(self, error: Exception) -> None:
        """Report an error that no code expects; the first ones, for a client may repeat it."""
        self._internal_errors += 1
        if self._internal_errors <= 3:
            where = error.__traceback__
            while where is not None and where.tb_next is not None:
                where = where.tb_next
            place = f"{where.tb_frame.f_code.co_name}:{where.tb_lineno}" if where else "?"
            self._report(
                f"the store goes on after an internal error: {type(error).__name__}: "
                f"{error!s:.200} [{place}]; please report this line"
            )


def _set_options(connection: socket.socket) -> None:
    """Send small messages at once, and notice a client that is gone without a word."""
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_NOTSENT_LOWAT", _UNSENT_BYTES),
        ("TCP_KEEPIDLE", 30),
        ("TCP_KEEPINTVL", 10),
        ("TCP_KEEPCNT", 3),
    ):
        option = getattr(socket, name, 25 if name == "TCP_NOTSENT_LOWAT" else None)
        if option is not None:
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, option, value)


def run_service(
    listener: socket.socket, secret: RunSecret, *, keep: bool, report: Report,
    tell: Report = lambda text: None,
) -> None:  # fmt: skip
    """Serve a store at a socket that listens, until its run is over; see :class:`StoreService`."""

    async def serve() -> None:
        await StoreService(listener, secret, keep=keep, report=report, tell=tell).serve()

    asyncio.run(serve())
