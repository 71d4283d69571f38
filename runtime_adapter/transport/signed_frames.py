"""Messages of a session, each with its length and a signature.

::

    length uint32 | payload | HMAC-SHA256 of (direction, number, payload), its first 16 bytes

The key is the session's, and messages of each direction are numbered, so that none can be changed,
left out, repeated, turned round or moved to another connection without notice.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import socket
import struct

from runtime_adapter.transport.handshake import Session
from runtime_adapter.transport.rendezvous import RuntimeFailure

#: Bytes of a payload, unless a caller sets a lower bound.
MAX_FRAME = 256 << 20
SIGNATURE_BYTES = 16
_LENGTH = struct.Struct("!I")
_NUMBER = struct.Struct("!BQ")
#: What is read at once: a length that is announced takes no memory before its bytes have come.
_CHUNK_BYTES = 1 << 20


class FrameError(RuntimeFailure):
    """A message with a wrong signature or length: the connection is of no use any more."""


class _Signer:
    """Signs one direction of a session, message after message."""

    def __init__(self, session: Session, *, from_client: bool) -> None:
        self._key = session.key
        self._direction = int(from_client)
        self._number = 0

    def sign(self, payload: bytes) -> bytes:
        mac = hmac.new(self._key, _NUMBER.pack(self._direction, self._number), hashlib.sha256)
        mac.update(payload)
        self._number += 1
        return mac.digest()[:SIGNATURE_BYTES]

    def check(self, payload: bytes, signature: bytes) -> None:
        if not hmac.compare_digest(self.sign(payload), signature):
            raise FrameError("a message with a wrong signature; the connection is closed")


def _framed(signer: _Signer, payload: bytes, max_bytes: int) -> bytes:
    if len(payload) > max_bytes:
        raise FrameError(f"a message of {len(payload):,} bytes; at most {max_bytes:,}")
    return b"".join((_LENGTH.pack(len(payload)), payload, signer.sign(payload)))


def _length(raw: bytes, max_bytes: int) -> int:
    length: int = _LENGTH.unpack(raw)[0]
    if length > max_bytes:
        raise FrameError(f"a message of {length:,} bytes; at most {max_bytes:,}")
    return length


class SignedFrames:
    """Signed messages over a blocking socket.

    Methods raise FrameError, and as sockets do OSError (TimeoutError where the socket has a time
    limit); after either the connection is of no use any more.
    """

    def __init__(
        self, connection: socket.socket, session: Session, max_bytes: int = MAX_FRAME
    ) -> None:
        self.connection = connection
        self.session = session
        self._max_bytes = max_bytes
        self._sending = _Signer(session, from_client=session.is_client)
        self._receiving = _Signer(session, from_client=not session.is_client)

    def send(self, payload: bytes) -> None:
        """Send a message."""
        self.connection.sendall(_framed(self._sending, payload, self._max_bytes))

    def receive(self) -> bytes:
        """Wait for the next message; ConnectionError where the other side has closed."""
        length = _length(self._read(_LENGTH.size), self._max_bytes)
        payload = self._read(length)
        self._receiving.check(payload, self._read(SIGNATURE_BYTES))
        return payload

    def _read(self, size: int) -> bytes:
        parts, left = [], size
        while left:
            part = self.connection.recv(min(left, _CHUNK_BYTES))
            if not part:
                raise ConnectionResetError("the other side closed the connection")
            parts.append(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()


class AsyncSignedFrames:
    """Signed messages over asyncio streams; raises as :class:`SignedFrames`."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, session: Session,
        max_bytes: int = MAX_FRAME,
    ) -> None:  # fmt: skip
        self.session = session
        self._reader, self._writer = reader, writer
        self._max_bytes = max_bytes
        self._sending = _Signer(session, from_client=session.is_client)
        self._receiving = _Signer(session, from_client=not session.is_client)

    async def send(self, payload: bytes) -> None:
        """Send a message, and wait until the system takes it."""
        self._writer.write(_framed(self._sending, payload, self._max_bytes))
        await self._writer.drain()

    async def receive(self) -> bytes:
        """Wait for the next message; ConnectionError where the other side has closed."""
        length = _length(await self._read(_LENGTH.size), self._max_bytes)
        payload = await self._read(length)
        self._receiving.check(payload, await self._read(SIGNATURE_BYTES))
        return payload

    async def _read(self, size: int) -> bytes:
        parts, left = [], size
        while left:
            part = await self._reader.read(min(left, _CHUNK_BYTES))
            if not part:
                raise ConnectionResetError("the other side closed the connection")
            parts.append(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()
