"""Stores by which the two sides of a data channel find each other, as torch.distributed wants them.

The worker keeps the keys of one lane of one driver in a dict (:class:`PairKeys`); the driver reads
and writes them over a connection to the worker (:class:`RemoteKeys`), which is authenticated as all
are. Requests and answers are signed frames::

    b"S" | length of key u16 | key | value   ->   b"+"
    b"G" | length of key u16 | key           ->   b"+" | value, or b"-" where there is none
"""

from __future__ import annotations

import contextlib
import datetime
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Protocol

import torch.distributed as dist

from runtime_adapter.transport.handshake import Session
from runtime_adapter.transport.signed_frames import FrameError, SignedFrames

#: Bytes of a request or an answer, and keys of a pair: gloo and NCCL need a few of a few hundred.
MAX_FRAME_BYTES, MAX_KEYS = 1 << 16, 256
#: How often the driver asks for a key that is not there yet.
POLL_INTERVAL_S = 0.005


class Keys(Protocol):
    """What a store needs."""

    def put(self, key: str, value: bytes) -> None:
        """Set a key."""

    def find(self, key: str) -> bytes | None:
        """The value of a key, None if it is not there."""


class PairKeys:
    """The keys of a pair, on the worker's side."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, bytes] = {}

    def put(self, key: str, value: bytes) -> None:
        """Set a key; too many are an error of whoever sets them."""
        with self._lock:
            if len(self._values) >= MAX_KEYS and key not in self._values:
                raise FrameError("a data channel with too many keys")
            self._values[key] = value

    def find(self, key: str) -> bytes | None:
        """The value of a key, None if it is not there."""
        with self._lock:
            return self._values.get(key)

    def answer(self, connection: socket.socket, session: Session) -> None:
        """Answer the driver's requests until it closes the connection."""
        frames = SignedFrames(connection, session, MAX_FRAME_BYTES)
        with contextlib.suppress(OSError, FrameError):
            while True:
                frames.send(self._answer_to(frames.receive()))

    def _answer_to(self, request: bytes) -> bytes:
        try:
            (size,) = struct.unpack_from("!H", request, 1)
            key, rest = request[3 : 3 + size].decode(), request[3 + size :]
        except (struct.error, UnicodeDecodeError) as error:
            raise FrameError("no request for a key of a data channel") from error
        if request[:1] == b"S":
            self.put(key, rest)
            return b"+"
        value = self.find(key)
        return b"-" if value is None else b"+" + value


class RemoteKeys:
    """The keys of a pair, on the driver's side.

    Methods raise OSError or FrameError where the connection is broken.
    """

    def __init__(self, connection: socket.socket, session: Session, timeout_s: float) -> None:
        connection.settimeout(timeout_s)
        self._frames = SignedFrames(connection, session, MAX_FRAME_BYTES)
        self._connection = connection
        self._lock = threading.Lock()

    def put(self, key: str, value: bytes) -> None:
        """Set a key."""
        self._request(b"S", key, value)

    def find(self, key: str) -> bytes | None:
        """The value of a key, None if it is not there."""
        answer = self._request(b"G", key, b"")
        return answer[1:] if answer[:1] == b"+" else None

    def _request(self, kind: bytes, key: str, value: bytes) -> bytes:
        encoded = key.encode()
        with self._lock:
            self._frames.send(kind + struct.pack("!H", len(encoded)) + encoded + value)
            return self._frames.receive()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class PairStore(dist.Store):  # type: ignore[misc]
    """A store of torch.distributed over the keys of a pair; RuntimeError where they cannot be had.

    Keep it as long as the group that is made with it.
    """

    def __init__(self, keys: Keys, timeout_s: float) -> None:
        super().__init__()
        self._keys = keys
        self._timeout_s = timeout_s

    def set(self, key: str, value: str | bytes) -> None:
        """Set a key."""
        with _as_runtime_error():
            self._keys.put(key, value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        """Wait for a key and give its value."""
        return self._find(key, self._timeout_s)

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""
        with _as_runtime_error():
            return all(self._keys.find(key) is not None for key in keys)

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        """Wait until all keys are there."""
        timeout_s = self._timeout_s if timeout is None else timeout.total_seconds()
        for key in keys:
            self._find(key, min(timeout_s, self._timeout_s))

    def _find(self, key: str, timeout_s: float) -> bytes:
        deadline = time.monotonic() + timeout_s
        with _as_runtime_error():
            while (value := self._keys.find(key)) is None:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no {key:.80} within {timeout_s:g} s")
                time.sleep(POLL_INTERVAL_S)
        return value


@contextlib.contextmanager
def _as_runtime_error() -> Iterator[None]:
    try:
        yield
    except (OSError, FrameError) as error:
        raise RuntimeError(f"the keys of a data channel: {error}") from error
