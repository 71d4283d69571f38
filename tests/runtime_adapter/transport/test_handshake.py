"""Nothing is believed of a connection whose other side has not proved that it knows the secret."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import hashlib
import hmac
import json
import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_adapter.transport import handshake
from runtime_adapter.transport.handshake import (
    MAGIC,
    Claim,
    HandshakeFailed,
    Session,
    accept_session,
    accept_session_async,
    open_session,
)
from runtime_adapter.transport.secrets import NO_SECRET, RunSecret
from tests.limits import HANG_S
from tests.runtime_adapter.transport.sessions import CLAIM, OTHER, SECRET, shake

#: A server's first message: magic, random bytes, proof.
ANSWER_BYTES = len(MAGIC) + 64


@contextlib.contextmanager
def accepting(
    secret: RunSecret = SECRET, *, in_loop: bool = False
) -> Iterator[tuple[socket.socket, concurrent.futures.Future[Session]]]:
    """A socket whose other side is accepted by a thread, and what that comes to."""
    near, far = socket.socketpair()
    near.settimeout(HANG_S)

    async def accept_async() -> Session:
        reader, writer = await asyncio.open_connection(sock=far)
        try:
            return await accept_session_async(reader, writer, secret, HANG_S)
        finally:
            writer.close()

    def accept() -> Session:
        if in_loop:
            return asyncio.run(accept_async())
        with far:
            return accept_session(far, secret, HANG_S)

    with concurrent.futures.ThreadPoolExecutor(1) as pool, near:
        yield near, pool.submit(accept)


def read(connection: socket.socket, size: int) -> bytes:
    """So many bytes, or all until the other side closes."""
    found = b""
    while len(found) < size and (part := connection.recv(size - len(found))):
        found += part
    return found


def proof(secret: RunSecret, *parts: bytes) -> bytes:
    """A proof as the protocol's text describes it, made without the code under test."""
    text = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return hmac.new(secret.key, text, hashlib.sha256).digest()


def last_message(secret: RunSecret, nonce: bytes, answer: bytes, claim: bytes) -> bytes:
    """A client's claim and proof after the ``answer`` of a server."""
    other = answer[len(MAGIC) :][:32]
    code = proof(secret, b"client", nonce, other, claim)
    return len(claim).to_bytes(2, "big") + claim + code


def claim_text(**changes: object) -> bytes:
    values: dict[str, object] = {
        "purpose": "calls", "server": "s1", "incarnation": 0, "lane": 0, "max_tokens": 0,
    }  # fmt: skip
    return json.dumps(values | changes).encode()


def present(claim: bytes, secret: RunSecret = SECRET, *, in_loop: bool = False) -> Session:
    """What a server makes of a claim; raises as the server does."""
    with accepting(in_loop=in_loop) as (connection, accepted):
        nonce = os.urandom(32)
        connection.sendall(MAGIC + nonce)
        answer = read(connection, ANSWER_BYTES)
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(last_message(secret, nonce, answer, claim))
        read(connection, 1)
        return accepted.result(HANG_S)


@pytest.mark.parametrize("secret", [SECRET, NO_SECRET])
def test_both_sides_get_the_claim_and_one_key(secret: RunSecret) -> None:
    """The key is known to the two alone: it differs from that of any other connection."""
    outcomes = [shake(secret, secret) for _ in range(2)]
    for outcome in outcomes:
        client, server = outcome.sessions
        assert (client.claim, server.claim) == (CLAIM, CLAIM)
        assert client.key == server.key
        assert (client.is_client, server.is_client) == (True, False)
        outcome.close()
    assert outcomes[0].sessions[0].key != outcomes[1].sessions[0].key
    assert len(outcomes[0].sessions[0].key) == 32


@pytest.mark.parametrize("in_loop", [False, True])
def test_the_bytes_are_as_described(in_loop: bool) -> None:
    """A client written from the module's text is accepted by threads and by event loops."""
    assert present(claim_text(), in_loop=in_loop).claim == Claim("calls", "s1")


def test_the_server_proves_itself_first() -> None:
    """Its proof is of both random values, and of no use as a client's."""
    with accepting() as (connection, accepted):
        nonce = os.urandom(32)
        connection.sendall(MAGIC + nonce)
        answer = read(connection, ANSWER_BYTES)
        assert answer[:8] == MAGIC
        assert answer[40:] == proof(SECRET, b"server", nonce, answer[8:40])
        claim = claim_text()
        connection.sendall(len(claim).to_bytes(2, "big") + claim + answer[40:])
        assert read(connection, 1) == b""
        with pytest.raises(HandshakeFailed, match="secret"):
            accepted.result(HANG_S)


@pytest.mark.parametrize(
    ("client", "server"), [(OTHER, SECRET), (NO_SECRET, SECRET), (SECRET, NO_SECRET)]
)
def test_another_secret_is_told_to_the_client(client: RunSecret, server: RunSecret) -> None:
    """It learns so before it has sent its claim; the server sees a connection that ends."""
    outcome = shake(client, server)
    assert isinstance(outcome.client, HandshakeFailed)
    assert "secret" in str(outcome.client)
    assert "secret_file" in str(outcome.client)
    assert outcome.client.exit_code == 5
    assert isinstance(outcome.server, ConnectionResetError)


@pytest.mark.parametrize("in_loop", [False, True])
@pytest.mark.parametrize("secret", [OTHER, NO_SECRET])
def test_a_claim_under_a_servers_name_needs_the_secret(secret: RunSecret, in_loop: bool) -> None:
    """Whatever name is claimed: a proof with another secret ends the connection."""
    with pytest.raises(HandshakeFailed, match="does not know this run's secret"):
        present(claim_text(server="s0"), secret, in_loop=in_loop)


@pytest.mark.parametrize("in_loop", [False, True])
def test_a_recorded_handshake_is_of_no_use(in_loop: bool) -> None:
    """All that a client has once sent fails on the next connection."""
    with accepting(in_loop=in_loop) as (connection, accepted):
        nonce = os.urandom(32)
        recorded = [MAGIC + nonce]
        connection.sendall(recorded[0])
        answer = read(connection, ANSWER_BYTES)
        recorded.append(last_message(SECRET, nonce, answer, claim_text()))
        connection.sendall(recorded[1])
        assert read(connection, 1) == b"\x01"
        accepted.result(HANG_S)
    with accepting(in_loop=in_loop) as (connection, accepted):
        connection.sendall(b"".join(recorded))
        assert read(connection, ANSWER_BYTES + 1)[ANSWER_BYTES:] == b""
        with pytest.raises(HandshakeFailed, match="does not know this run's secret"):
            accepted.result(HANG_S)


def test_a_recorded_server_is_of_no_use() -> None:
    """A client does not believe the answer that an earlier connection got."""
    near, far = socket.socketpair()
    with near, far, concurrent.futures.ThreadPoolExecutor(1) as pool:
        opened = pool.submit(open_session, near, CLAIM, SECRET, HANG_S)
        nonce, other = read(far, 40)[8:], os.urandom(32)
        stale = bytes(byte ^ 1 for byte in nonce)
        far.sendall(MAGIC + other + proof(SECRET, b"server", stale, other))
        with pytest.raises(HandshakeFailed, match="secret"):
            opened.result(HANG_S)


def test_a_message_sent_back_is_no_answer() -> None:
    """A port that returns what it gets does not pass for a server."""
    near, far = socket.socketpair()
    with near, far, concurrent.futures.ThreadPoolExecutor(1) as pool:
        opened = pool.submit(open_session, near, CLAIM, NO_SECRET, HANG_S)
        hello = read(far, 40)
        far.sendall(hello + hello[8:])
        with pytest.raises(HandshakeFailed):
            opened.result(HANG_S)


@settings(max_examples=60)
@given(st.integers(0, 8 * (40 + 2 + len(claim_text()) + 32) - 1), st.booleans())
def test_one_flipped_bit_ends_it(bit: int, in_loop: bool) -> None:
    """No bit of what a client sends can be changed on its way."""
    with accepting(in_loop=in_loop) as (connection, accepted):
        nonce = os.urandom(32)

        def flipped(message: bytes, offset: int) -> bytes:
            place = bit - 8 * offset
            if not 0 <= place < 8 * len(message):
                return message
            changed = bytearray(message)
            changed[place // 8] ^= 1 << place % 8
            return bytes(changed)

        with contextlib.suppress(OSError):
            connection.sendall(flipped(MAGIC + nonce, 0))
            answer = read(connection, ANSWER_BYTES)
            if len(answer) == ANSWER_BYTES:
                message = last_message(SECRET, nonce, answer, claim_text())
                connection.sendall(flipped(message, 40))
            connection.shutdown(socket.SHUT_WR)
            assert read(connection, 1) == b""
        with pytest.raises((HandshakeFailed, ConnectionResetError)):
            accepted.result(HANG_S)


@settings(max_examples=40)
@given(st.integers(0, 40 + 2 + len(claim_text()) + 31), st.booleans())
def test_a_handshake_that_is_cut_off(size: int, in_loop: bool) -> None:
    """A client that ends in the middle is a lost connection, which may be made anew."""
    with accepting(in_loop=in_loop) as (connection, accepted):
        nonce = os.urandom(32)
        connection.sendall((MAGIC + nonce)[:size])
        if size > 40:
            answer = read(connection, ANSWER_BYTES)
            message = last_message(SECRET, nonce, answer, claim_text())
            connection.sendall(message[: size - 40])
        connection.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionResetError, match="closed the connection"):
            accepted.result(HANG_S)


@pytest.mark.parametrize("in_loop", [False, True])
@pytest.mark.parametrize(
    "foreign",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\nUser-Agent: curl/8\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(60),
        b"SSH-2.0-OpenSSH_9.6\r\n" + bytes(60),
        MAGIC[:-1] + bytes([MAGIC[-1] + 1]) + bytes(60),
        b"\xff" * 100_000,
    ],
    ids=["http", "tls", "ssh", "another version", "ones"],
)
def test_foreign_protocols_get_no_answer(foreign: bytes, in_loop: bool) -> None:
    """They are not told what listens there."""
    with accepting(in_loop=in_loop) as (connection, accepted):
        with contextlib.suppress(OSError):
            connection.sendall(foreign)
        with pytest.raises(HandshakeFailed, match="no part of this run"):
            accepted.result(HANG_S)
        with contextlib.suppress(ConnectionResetError):
            assert read(connection, 1) == b""


def test_a_client_recognises_foreign_servers() -> None:
    """A user who gives the address of a web server is told so."""
    near, far = socket.socketpair()
    with near, far:
        far.sendall(b"HTTP/1.1 400 Bad Request\r\n" + b"x" * ANSWER_BYTES)
        with pytest.raises(HandshakeFailed, match="no part of a run"):
            open_session(near, CLAIM, SECRET, HANG_S)


@pytest.mark.parametrize("in_loop", [False, True])
def test_a_claim_longer_than_a_kilobyte_is_not_read(in_loop: bool) -> None:
    """Its length is refused, before any byte of it has been waited for."""
    with accepting(in_loop=in_loop) as (connection, accepted):
        connection.sendall(MAGIC + os.urandom(32))
        read(connection, ANSWER_BYTES)
        connection.sendall(b"\xff\xff")
        with pytest.raises(HandshakeFailed, match="a claim of 65,535 bytes"):
            accepted.result(HANG_S)


BAD_CLAIMS: list[dict[str, object]] = [
    {"purpose": "all"}, {"purpose": ""}, {"purpose": ["calls"]}, {"purpose": None},
    {"server": 1}, {"server": None}, {"server": "x" * 201},
    {"incarnation": -1}, {"incarnation": 1 << 64}, {"incarnation": 1.0}, {"incarnation": True},
    {"lane": -1}, {"lane": 1 << 20}, {"lane": "0"},
    {"max_tokens": -1}, {"max_tokens": (1 << 24) + 1}, {"max_tokens": None},
    {"more": 0},
]  # fmt: skip


@pytest.mark.parametrize("changes", BAD_CLAIMS, ids=str)
def test_claims_out_of_range_are_refused(changes: dict[str, object]) -> None:
    """Also of clients that know the secret, which may be of another version."""
    with pytest.raises(HandshakeFailed, match="a claim out of range"):
        present(claim_text(**changes))


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"3", b"null", b"{", b"[" * 1000, b"\xff\xfe", b'{"purpose": "calls"}']
)
def test_claims_that_are_none(text: bytes) -> None:
    """Any bytes with a valid proof end the connection and nothing else."""
    with pytest.raises(HandshakeFailed, match="claim"):
        present(text)


def test_any_name_of_a_server_fits() -> None:
    """The beginning of a long one is sent, in any script."""
    for letter in "a", "\N{LATIN SMALL LETTER E WITH ACUTE}", "\N{SMILING FACE WITH SUNGLASSES}":
        outcome = shake(claim=Claim("ping", letter * 1000, handshake.MAX_INCARNATION))
        assert outcome.sessions[1].claim.server == letter * 200
        assert outcome.sessions[0].key == outcome.sessions[1].key
        outcome.close()


def test_slow_bytes_do_not_prolong_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit is one of the whole handshake: each byte takes a second of this clock."""
    seconds = iter(range(1000))
    monkeypatch.setattr(handshake.time, "monotonic", lambda: float(next(seconds)))
    near, far = socket.socketpair()
    with near, far:
        limits: list[float] = []
        sent = iter(MAGIC + os.urandom(32))

        class Slow:
            """A socket whose other side sends a byte a second."""

            def settimeout(self, limit_s: float) -> None:
                limits.append(limit_s)

            def recv(self, size: int) -> bytes:
                return bytes([next(sent)])

        with pytest.raises(TimeoutError):
            accept_session(Slow(), SECRET, 5.0)  # type: ignore[arg-type]
        assert limits == [4.0, 3.0, 2.0, 1.0]


@pytest.mark.parametrize("in_loop", [False, True])
def test_one_who_says_nothing_is_waited_for_no_longer_than_the_limit(in_loop: bool) -> None:
    """The error is a time-out, which is no wrong secret."""
    near, far = socket.socketpair()

    async def accept_async() -> None:
        reader, writer = await asyncio.open_connection(sock=far)
        try:
            await accept_session_async(reader, writer, SECRET, 0.05)
        finally:
            writer.close()

    with near, far, pytest.raises(TimeoutError):
        if in_loop:
            asyncio.run(accept_async())
        else:
            accept_session(far, SECRET, 0.05)
