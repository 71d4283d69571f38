"""The first messages of every connection: each side proves to the other that it knows the secret.

::

    client                                       server
    MAGIC | nonce_c                     -->
                                        <--      MAGIC | nonce_s | proof_s
    length of claim | claim | proof_c   -->
                                        <--      OK

``proof_s`` is an HMAC-SHA256, by the run's secret, of "server" and both nonces, ``proof_c`` one of
"client", both nonces and the claim. Both nonces are fresh random numbers, so nothing that was
recorded is of use later; the two roles differ, so no side can be made to prove for the other. Until
the server has read a valid proof it has kept a kilobyte and believed nothing. The session key, an
HMAC of the same, signs what follows (:mod:`~runtime_adapter.transport.signed_frames`).

Without a secret the key is empty: then the handshake tells servers of this version from anything
else that connects, and nothing more.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
import socket
import struct
import time
from dataclasses import asdict, dataclass
from typing import Any

from runtime_adapter.transport.rendezvous import RuntimeFailure
from runtime_adapter.transport.secrets import RunSecret

#: Begins both sides' first message; the last byte is the version.
MAGIC = b"PRISMRT\x02"
NONCE_BYTES, PROOF_BYTES = 32, 32
#: Bytes of a claim's JSON; a name of any language fits.
MAX_CLAIM_BYTES = 1024
_LENGTH = struct.Struct("!H")
_OK = b"\x01"
_CLOSED = "the other side closed the connection during the handshake"

PURPOSES = ("control", "calls", "ping", "weights", "channel", "spans")
MAX_NAME = 200
MAX_INCARNATION, MAX_LANE, MAX_TOKENS = 1 << 40, 1 << 18, 1 << 24


class HandshakeFailed(RuntimeFailure):
    """The other side does not know the run's secret, or is nothing of this version."""


@dataclass(frozen=True)
class Claim:
    """What a client says of itself; its proof covers this.

    ``purpose`` is one of :data:`PURPOSES`; ``server`` the name of its server, or "scheduler",
    "move", "status"; ``max_tokens`` the longest step that it will send (purpose "calls"). Only the
    first 200 characters of a name are sent.
    """

    purpose: str
    server: str = ""
    incarnation: int = 0
    lane: int = 0
    max_tokens: int = 0


@dataclass(frozen=True)
class Session:
    """A connection whose two sides have proved that they know the secret."""

    claim: Claim
    key: bytes
    is_client: bool


def _digest(secret: RunSecret, *parts: bytes) -> bytes:
    """HMAC of parts, each with its length, so that no two lists of parts look alike."""
    mac = hmac.new(secret.key, digestmod=hashlib.sha256)
    for part in parts:
        mac.update(len(part).to_bytes(4, "big"))
        mac.update(part)
    return mac.digest()


def _proves(found: bytes, expected: bytes) -> bool:
    return hmac.compare_digest(found, expected)


class _Client:
    """The client's messages, whatever carries them."""

    def __init__(self, claim: Claim, secret: RunSecret) -> None:
        self._claim, self._secret = claim, secret
        self._nonce = secrets.token_bytes(NONCE_BYTES)

    def hello(self) -> bytes:
        return MAGIC + self._nonce

    def prove(self, answer: bytes) -> tuple[bytes, Session]:
        """The message after the server's ``answer``, which must be a proof, and the session."""
        if answer[: len(MAGIC)] != MAGIC:
            raise HandshakeFailed("what answers there is no part of a run of this version")
        other, proof = answer[len(MAGIC) :][:NONCE_BYTES], answer[len(MAGIC) + NONCE_BYTES :]
        if not _proves(proof, _digest(self._secret, b"server", self._nonce, other)):
            raise HandshakeFailed(_wrong_secret(self._secret))
        values = asdict(self._claim) | {"server": self._claim.server[:MAX_NAME]}
        claim = json.dumps(values, ensure_ascii=False).encode(errors="replace")
        if len(claim) > MAX_CLAIM_BYTES:
            raise HandshakeFailed(f"a claim of {len(claim):,} bytes; at most {MAX_CLAIM_BYTES:,}")
        own = _digest(self._secret, b"client", self._nonce, other, claim)
        key = _digest(self._secret, b"session", self._nonce, other, claim)
        return _LENGTH.pack(len(claim)) + claim + own, Session(self._claim, key, is_client=True)


class _Server:
    """The server's messages, whatever carries them."""

    def __init__(self, secret: RunSecret) -> None:
        self._secret = secret

    def answer(self, hello: bytes) -> bytes:
        """The answer to a client's first message."""
        if hello[: len(MAGIC)] != MAGIC:
            raise HandshakeFailed("a connection of something that is no part of this run")
        self._other, self._own = hello[len(MAGIC) :], secrets.token_bytes(NONCE_BYTES)
        return MAGIC + self._own + _digest(self._secret, b"server", self._other, self._own)

    def accept(self, claim: bytes, proof: bytes) -> Session:
        """The session of a client that proves its claim."""
        expected = _digest(self._secret, b"client", self._other, self._own, claim)
        if not _proves(proof, expected):
            raise HandshakeFailed(_wrong_secret(self._secret))
        key = _digest(self._secret, b"session", self._other, self._own, claim)
        return Session(_read_claim(claim), key, is_client=False)


def _wrong_secret(secret: RunSecret) -> str:
    if secret.given:
        return "the other side does not know this run's secret; give both the same ``secret_file``"
    return "the other side has a secret, and this one none; give the run's ``secret_file``"


def _claim_length(raw: bytes) -> int:
    length: int = _LENGTH.unpack(raw)[0]
    if length > MAX_CLAIM_BYTES:
        raise HandshakeFailed(f"a claim of {length:,} bytes; at most {MAX_CLAIM_BYTES:,}")
    return length


def _read_claim(raw: bytes) -> Claim:
    """Check a claim; a client that knows the secret may still be of another version."""
    try:
        values: Any = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise HandshakeFailed("a claim that is no JSON") from error
    bounds = {"incarnation": MAX_INCARNATION, "lane": MAX_LANE, "max_tokens": MAX_TOKENS}
    valid = (
        isinstance(values, dict)
        and values.keys() == {"purpose", "server", *bounds}
        and values["purpose"] in PURPOSES
        and isinstance(values["server"], str)
        and len(values["server"]) <= MAX_NAME
        and all(type(values[name]) is int and 0 <= values[name] <= bounds[name] for name in bounds)
    )
    if not valid:
        raise HandshakeFailed(f"a claim out of range: {raw!r:.80}")
    return Claim(**values)


_HELLO_BYTES = len(MAGIC) + NONCE_BYTES
_ANSWER_BYTES = _HELLO_BYTES + PROOF_BYTES


# ---------------------------------------------------------------------------------------- blocking


class _Deadline:
    """Reads and writes of a socket that must all be done within a time."""

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        self._connection = connection
        self._end_s = time.monotonic() + timeout_s

    def _limit(self) -> None:
        left_s = self._end_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("no handshake in time")
        self._connection.settimeout(left_s)

    def read(self, size: int) -> bytes:
        parts, left = [], size
        while left:
            self._limit()
            part = self._connection.recv(left)
            if not part:
                raise ConnectionResetError(_CLOSED)
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def write(self, data: bytes) -> None:
        self._limit()
        self._connection.sendall(data)


def open_session(
    connection: socket.socket, claim: Claim, secret: RunSecret, timeout_s: float
) -> Session:
    """Do the client's part; the connection blocks without a limit afterwards.

    Raises
    ------
    HandshakeFailed
        The other side does not know the secret, refuses this one, or is something else.
    OSError
        The connection is lost or was closed by the other side, as by one that ends or has too many,
        or (TimeoutError) not all is done within ``timeout_s``.
    """
    limited, client = _Deadline(connection, timeout_s), _Client(claim, secret)
    limited.write(client.hello())
    message, session = client.prove(limited.read(_ANSWER_BYTES))
    limited.write(message)
    if limited.read(1) != _OK:
        raise HandshakeFailed("the other side refuses this one")
    connection.settimeout(None)
    return session


def accept_session(connection: socket.socket, secret: RunSecret, timeout_s: float) -> Session:
    """Do the server's part; raises as :func:`open_session`."""
    limited, server = _Deadline(connection, timeout_s), _Server(secret)
    limited.write(server.answer(limited.read(_HELLO_BYTES)))
    claim = limited.read(_claim_length(limited.read(_LENGTH.size)))
    session = server.accept(claim, limited.read(PROOF_BYTES))
    limited.write(_OK)
    connection.settimeout(None)
    return session


# ----------------------------------------------------------------------------------------- asyncio


async def accept_session_async(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: RunSecret, timeout_s: float
) -> Session:
    """Do the server's part on an asyncio stream; raises as :func:`open_session`."""

    async def accept() -> Session:
        server = _Server(secret)
        try:
            writer.write(server.answer(await reader.readexactly(_HELLO_BYTES)))
            claim = await reader.readexactly(_claim_length(await reader.readexactly(_LENGTH.size)))
            session = server.accept(claim, await reader.readexactly(PROOF_BYTES))
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError(_CLOSED) from error
        writer.write(_OK)
        await writer.drain()
        return session

    return await asyncio.wait_for(accept(), timeout_s)
