"""A client of a run's store, for threads of one process: it waits where the store is away.

Every request may be repeated: a store that has done it already answers as it did then. So a
connection that breaks, or a store that is started again, is no error before the time limit of the
request is over. What belongs to the time before a restart is refused by the store, which has
a new *epoch* then (:class:`StoreRestartedError`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any

from prism_plan.errors import InputError
from runtime_adapter.control.store.messages import (
    MAX_FRAME_BYTES,
    MAX_PART_BYTES,
    NoRun,
    StoreRestartedError,
    StoreUnavailable,
    pack,
    raise_error,
    unpack,
)
from runtime_adapter.transport.dialing import dial
from runtime_adapter.transport.handshake import Claim, HandshakeFailed
from runtime_adapter.transport.rendezvous import NameTaken, RuntimeFailure
from runtime_adapter.transport.secrets import NO_SECRET, RunSecret
from runtime_adapter.transport.signed_frames import FrameError, SignedFrames

__all__ = ["NoRun", "StoreAddress", "StoreClient", "StoreRestartedError", "StoreUnavailable"]

#: Seconds without an answer after which a request is sent again on a new connection; doubled with
#: every such failure, for a slow link is not a broken one, and as before after an answer.
FIRST_PATIENCE_S, MAX_PATIENCE_S = 1.0, 8.0
#: Added for each byte that is sent: no link is slower.
SLOWEST_LINK_BYTES_S = 50_000.0
RETRY_INTERVAL_S = 0.1
#: So many failed handshakes in a row are no accident, to a client that has never been accepted.
MAX_REFUSALS = 5
#: A name that is taken for so long is that of another living server. A server that was killed and
#: is there again at once finds its own name taken, until the store misses its heartbeats.
NAME_TAKEN_S = 5.0
#: Connections that are kept open while no request uses them.
MAX_IDLE = 3
POLL_INTERVAL_S = 0.2


@dataclass(frozen=True)
class StoreAddress:
    """Where a run's store listens, and the secret of the run."""

    host: str
    port: int
    secret: RunSecret = NO_SECRET

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class _Connection:
    """An authenticated connection, used by one request at a time."""

    def __init__(self, address: StoreAddress, name: str, timeout_s: float) -> None:
        claim = Claim("control", server=name)
        self._socket, session = dial((address.host, address.port), claim, address.secret, timeout_s)
        self._frames = SignedFrames(self._socket, session, MAX_FRAME_BYTES)

    def exchange(self, frame: bytes, patience_s: float) -> bytes:
        self._socket.settimeout(patience_s + len(frame) / SLOWEST_LINK_BYTES_S)
        self._frames.send(frame)
        self._socket.settimeout(patience_s)  # of each piece of the answer
        return self._frames.receive()

    def abort(self) -> None:
        """Let the thread that waits for an answer fail."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._frames.close()
        with contextlib.suppress(OSError):
            self._socket.close()


class StoreClient:
    """A client of the store; ``name`` says which process it is, "worker 0", "scheduler", "move".

    Connects lazily, and again where needed. A client that has started the run starts it once more,
    with the same facts, if the store has forgotten it. All methods raise

    * StoreUnavailable if the store does not answer within the request's time limit,
    * HandshakeFailed (a RuntimeFailure) if it has another secret, or is something else,
    * InputError where the store refuses the request's values, LimitReached where it is full,
    * StoreRestartedError if the request names an epoch that is over.
    """

    def __init__(self, address: StoreAddress, name: str) -> None:
        self.address = address
        self.name = name
        self._lock = threading.Lock()
        self._idle: list[_Connection] = []
        self._in_use: set[_Connection] = set()
        self._ids = itertools.count()
        self._run: dict[str, Any] | None = None
        self._has_connected = False
        self._patience_s = FIRST_PATIENCE_S
        self._closed = threading.Event()

    def close(self) -> None:
        """Close all connections; requests that wait raise StoreUnavailable."""
        self._closed.set()
        with self._lock:
            for connection in self._in_use:
                connection.abort()
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    # ------------------------------------------------------------------ one request

    def request(self, method: str, timeout_s: float = 30.0, **fields: Any) -> Any:
        """Send a request, again if need be, and return its result; raises as the class says."""
        return self._request(method, timeout_s, fields)[0]

    def _request(
        self, method: str, timeout_s: float, fields: dict[str, Any], body: bytes = b"",
        wait_s: float = 0.0,
    ) -> tuple[Any, bytes]:  # fmt: skip
        """Result and body of an answer that may be due only after ``wait_s``."""
        deadline = time.monotonic() + timeout_s
        reason = "no answer"
        refusals = 0
        while True:
            left_s = deadline - time.monotonic()
            if self._closed.is_set() or left_s <= 0:
                raise StoreUnavailable(
                    f"the run's store at {self.address} does not answer"
                    + ("" if self._closed.is_set() else f" within {timeout_s:g} s ({reason:.120})")
                )
            frame = pack({"id": next(self._ids), "method": method, **fields}, body)
            try:
                answer, answer_body = self._exchange(frame, left_s, wait_s)
            except HandshakeFailed as error:
                refusals += 1
                if not self._has_connected and refusals >= MAX_REFUSALS:
                    # a wrong secret, not a store that has just ended
                    raise HandshakeFailed(f"``store`` {self.address}: {error.message}") from error
                reason = str(error)
                self._closed.wait(min(RETRY_INTERVAL_S, left_s))
                continue
            except (OSError, EOFError, FrameError, InputError) as error:
                strerror = getattr(error, "strerror", None)
                reason = str(strerror or error).lower() or type(error).__name__
                self._closed.wait(min(RETRY_INTERVAL_S, left_s))
                continue
            restarts_run = answer.get("has_run") is False and method != "start_run"
            if restarts_run and self._run is not None:
                self._request("start_run", max(left_s, 1.0), {"run": self._run})
            try:
                raise_error(answer)
            except NoRun as error:  # whoever has started the run does so again
                reason = str(error)
                self._closed.wait(min(RETRY_INTERVAL_S, left_s))
                continue
            return answer.get("result"), answer_body

    def _exchange(self, frame: bytes, left_s: float, wait_s: float) -> tuple[dict[str, Any], bytes]:
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        is_new = connection is None
        patience_s = min(self._patience_s, max(left_s, 0.05))
        try:
            if connection is None:
                connection = _Connection(self.address, self.name, patience_s)
                self._has_connected = True
            with self._lock:
                self._in_use.add(connection)
            if self._closed.is_set():
                raise ConnectionError("closed")
            raw = connection.exchange(frame, patience_s + wait_s)
            answer = unpack(raw, "an answer of the run's store")
        except BaseException as error:
            if is_new and isinstance(error, TimeoutError):
                self._patience_s = min(2 * self._patience_s, MAX_PATIENCE_S)
            with self._lock:  # idle ones are as old, or older
                stale, self._idle = self._idle, []
                self._in_use.discard(connection)
            for other in (*stale, *([connection] if connection else [])):
                other.close()
            raise
        self._patience_s = FIRST_PATIENCE_S
        with self._lock:
            self._in_use.discard(connection)
            keeps = len(self._idle) < MAX_IDLE and not self._closed.is_set()
            if keeps:
                self._idle.append(connection)
        if not keeps:
            connection.close()
        return answer

    # ------------------------------------------------------------------ the run and its members

    def run(self, timeout_s: float = 30.0) -> dict[str, Any]:
        """``epoch`` of the store, and ``run`` as it was started, or ``None``."""
        return dict(self.request("run", timeout_s))

    def start_run(self, run: dict[str, Any], timeout_s: float = 30.0) -> dict[str, Any]:
        """Start a run, or find it started; returns ``epoch``, ``run`` and whether it has ``begun``.

        ``run`` has ``facts`` (an object that the caller compares), ``servers`` (names),
        ``timeout_s``, ``bounds`` [GPUs of all servers, (layer, expert) pairs], ``gpus`` (the number
        of each server; may be left out where every server has one), ``movable``, and ``scheduler``
        (an object for the scheduler, or ``None``). Of a run that has begun before the store was
        restarted ``begun`` may be true as well.
        """
        answer = dict(self.request("start_run", timeout_s, run=run))
        self._run = answer["run"]
        return answer

    def join(
        self, server: int, host: str, port: int, held: list[Any], after: int,
        timeout_s: float = 30.0,
    ) -> int:  # fmt: skip
        """Join the run as a server whose worker answers at an address; returns the incarnation.

        It is greater than ``after``, the last incarnation that this process knows of (0: none), and
        than all that the store knows. ``held`` lists [GPU of all servers, pair, slot] of every
        expert that its GPUs hold. Waits where nobody has started the run yet.

        Raises
        ------
        NameTaken
            Another process is this server, and alive. Others as the class says.
        """
        fields = {
            "server": server, "host": host, "port": port, "after": after,
            "held": [list(expert) for expert in held], "token": uuid.uuid4().hex,
        }  # fmt: skip
        started_s = time.monotonic()
        while True:
            left_s = max(timeout_s - (time.monotonic() - started_s), 0.1)
            try:
                return int(self._request("join", left_s, fields)[0])
            except NameTaken:
                if time.monotonic() - started_s > min(NAME_TAKEN_S, timeout_s):
                    raise
                self._closed.wait(POLL_INTERVAL_S)

    def heartbeat(
        self, server: int, incarnation: int, kind: str, timeout_s: float = 10.0, **info: Any
    ) -> dict[str, Any]:
        """Say that a process lives; returns ``state`` and ``epoch``.

        ``kind`` is "worker", "driver" or "scheduler" (whose ``server`` is 0). ``state`` is "up" or
        "left" if this incarnation is, otherwise "down": the worker has to join again. A driver's
        ``info``: ``suspects`` (servers that do not answer it), ``requests`` {"running", "done",
        "failed"}, ``finished``, ``error``; a scheduler's: ``migration`` (a text).
        """
        fields = {"server": server, "incarnation": incarnation, "kind": kind, "info": info}
        return dict(self._request("heartbeat", timeout_s, fields)[0])

    def members(self, timeout_s: float = 30.0) -> list[dict[str, Any]]:
        """Of each server ``name``, ``state``, ``incarnation``, ``since_s``, ``address`` and more.

        ``state`` is "absent", "joining" (its driver is there), "up", "down" or "left"; ``since_s``
        the seconds in this state; ``worker_silent_s`` and ``driver_silent_s`` those since the last
        heartbeat, or ``None``; ``info`` what its driver says; ``experts`` how many it holds;
        ``address`` [host, port], or ``None``. Empty while there is no run.
        """
        return list(self.request("members", timeout_s))

    def leave(self, server: int, incarnation: int, timeout_s: float = 30.0) -> None:
        """Leave the run in good order."""
        self.request("leave", timeout_s, server=server, incarnation=incarnation)

    def begin_when_all(self, server: int, timeout_s: float = 30.0) -> float | None:
        """Seconds from now to the begin of the run, negative if it has begun; or ``None``.

        ``None`` while servers are missing at the first start: ask again.
        """
        seconds = self.request("begin", timeout_s, server=server)
        return None if seconds is None else float(seconds)

    def status(self, timeout_s: float = 30.0) -> dict[str, Any]:
        """What the store knows, for people: see :meth:`StoreMethods.status`."""
        return dict(self.request("status", timeout_s))

    # ------------------------------------------------------------------ the log and values

    def append(
        self, entry: dict[str, Any], epoch: str, timeout_s: float = 30.0, token: str | None = None
    ) -> int:
        """Append an entry to the log; returns its number.

        Who repeats this after StoreUnavailable gives each time the same ``token``, any unique text.
        """
        fields = {"entry": json.dumps(entry), "epoch": epoch, "token": token or uuid.uuid4().hex}
        return int(self._request("append", timeout_s, fields)[0])

    def read(
        self, epoch: str | None, after: int, wait_s: float, timeout_s: float = 30.0
    ) -> dict[str, Any]:
        """The entries after a number: ``epoch``, ``entries`` [[number, text], ...], ``snapshot``.

        A ``snapshot`` is there if the epoch differs (``None`` does) or entries after that number
        are not kept any more: the state at its ``number``, after which ``entries`` continue.
        Waits up to ``wait_s`` for the first entry, and for a run.
        """
        fields = {"epoch": epoch, "after": after, "wait_s": wait_s}
        return dict(self._request("read", timeout_s, fields, wait_s=wait_s)[0])

    def put(self, key: str, data: bytes, epoch: str, timeout_s: float = 60.0) -> None:
        """Write a value; long ones in parts, and the key itself last."""
        parts = range(0, len(data), MAX_PART_BYTES) if len(data) > MAX_PART_BYTES else ()
        for part, start in enumerate(parts):
            fields = {"key": f"{key}#{part}", "epoch": epoch, "parts": 0}
            self._request("put", timeout_s, fields, data[start : start + MAX_PART_BYTES])
        fields = {"key": key, "epoch": epoch, "parts": len(parts)}
        self._request("put", timeout_s, fields, b"" if parts else data)

    def get(self, key: str, timeout_s: float = 60.0) -> bytes:
        """Read a value; raises InputError where it is not there."""
        parts, body = self._request("get", timeout_s, {"key": key})
        pieces = [
            self._request("get", timeout_s, {"key": f"{key}#{part}"})[1] for part in range(parts)
        ]
        return b"".join(pieces) if parts else body

    def has(self, keys: list[str], timeout_s: float = 30.0) -> bool:
        """Whether all these keys are there."""
        return bool(self.request("has", timeout_s, keys=keys))

    def delete(self, prefix: str, timeout_s: float = 30.0) -> None:
        """Delete all keys that begin with ``prefix``."""
        self.request("delete", timeout_s, prefix=prefix)


def check_answers(address: StoreAddress, timeout_s: float) -> None:
    """Raise RuntimeFailure unless a store answers at this address in time."""
    client = StoreClient(address, "status")
    try:
        client.run(timeout_s)
    except StoreUnavailable as error:
        raise RuntimeFailure(str(error)) from error
    finally:
        client.close()
