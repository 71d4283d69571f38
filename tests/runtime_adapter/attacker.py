"""What a stranger without the secret can do to the ports of a run; needs the standard library only.

::

    python tests/runtime_adapter/attacker.py HOST:PORT ... --seconds 60 --seed 1 [--sink]

It prints what it did as JSON. With ``--sink`` the same traffic goes to a listener of its own that
discards it, for runs in pairs: the difference is what the run's own processes spend on strangers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import hmac
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

Address = tuple[str, int]

#: As in runtime_adapter/transport/handshake.py, which tests compare.
MAGIC = b"PRISMRT\x02"
HELLO_BYTES, ANSWER_BYTES = len(MAGIC) + 32, len(MAGIC) + 64
#: Connections a second to all ports together.
RATE = 50.0
#: Connections that are open at a time; and how long those are kept that say nothing, seconds.
MAX_OPEN, KEEP_S = 300, (0.5, 8.0)
#: Connections of one group that are opened together and kept.
GROUP = 25
#: How long an answer is waited for.
ANSWER_S = 1.0

#: What is counted of all attacks together.
TOTALS = ("connections", "refused", "reset", "accepted")

PURPOSES = ("control", "calls", "ping", "weights", "channel", "spans")
NAMES = ("worker 0", "worker 1", "driver 0", "scheduler", "move 1", "status", "s0", "s1", "front")
HTTP = b"GET /status HTTP/1.1\r\nHost: localhost\r\nUser-Agent: curl/8.5.0\r\nAccept: */*\r\n\r\n"


def _digest(key: bytes, *parts: bytes) -> bytes:
    text = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return hmac.new(key, text, hashlib.sha256).digest()


def claim_and_proof(
    key: bytes, nonce: bytes, answer: bytes, **changes: object
) -> tuple[bytes, bytes]:
    """A client's second message for a guess of the secret, and the session key that follows."""
    values: dict[str, object] = {
        "purpose": "control", "server": "worker 0", "incarnation": 1, "lane": 0, "max_tokens": 512,
    }  # fmt: skip
    claim = json.dumps(values | changes).encode()
    other = answer[len(MAGIC) : HELLO_BYTES]
    code = _digest(key, b"client", nonce, other, claim)
    session = _digest(key, b"session", nonce, other, claim)
    return struct.pack("!H", len(claim)) + claim + code, session


def signed(key: bytes, number: int, payload: bytes) -> bytes:
    """A frame under a guess of the session's key."""
    code = hmac.new(key, struct.pack("!BQ", 1, number) + payload, hashlib.sha256).digest()
    return struct.pack("!I", len(payload)) + payload + code[:16]


def record(address: Address, key: bytes, purpose: str = "ping", timeout_s: float = 60.0) -> bytes:
    """What a client with the secret sends in a handshake, to be replayed: of a tap on the wire."""
    with socket.create_connection(address, timeout_s) as connection:
        nonce = random.SystemRandom().randbytes(32)
        connection.sendall(MAGIC + nonce)
        answer = b""
        while len(answer) < ANSWER_BYTES:
            part = connection.recv(ANSWER_BYTES - len(answer))
            if not part:
                raise ConnectionResetError("no answer to record")
            answer += part
        message, _ = claim_and_proof(key, nonce, answer, purpose=purpose)
        connection.sendall(message)
        if connection.recv(1) != b"\x01":
            raise ValueError("the handshake to record was refused")
    return MAGIC + nonce + message


class _Connection:
    """A connection of the attacker, how much the other side has said, and what to draw from."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seed: int
    ) -> None:
        self._reader, self._writer = reader, writer
        self.random = random.Random(seed)
        self.received = 0

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_S):
                await self._writer.drain()

    async def receive(self, size: int) -> bytes:
        """So many bytes, or what came until the other side closed or fell silent."""
        found = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_S):
                while len(found) < size and (part := await self._reader.read(size - len(found))):
                    found += part
        self.received += len(found)
        return found

    async def listen(self, seconds: float) -> None:
        """Read until the other side closes, or for so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while part := await self._reader.read(65_536):
                    self.received += len(part)

    def abort(self) -> None:
        self._writer.transport.abort()


Attack = Callable[["Attacker", _Connection], Coroutine[Any, Any, None]]


class Attacker:
    """Attacks addresses until told to stop; ``counts`` says what it has done so far.

    ``connections`` were made, ``refused`` not; ``accepted`` are those to which the other side
    said more than it may say to a stranger: none, where a run has a secret.
    """

    def __init__(
        self, addresses: Sequence[Address], seed: int, rate: float, recordings: Sequence[bytes]
    ) -> None:
        self._addresses = list(addresses)
        self._seed = seed
        self._rate = rate
        self._recordings = list(recordings)
        self._tasks: set[asyncio.Task[None]] = set()
        self.counts: Counter[str] = Counter()

    def plan(self) -> Iterator[tuple[str, Address, int]]:
        """Kinds of attacks, their targets and seeds, which depend on the seed alone."""
        drawn = random.Random(self._seed)
        while True:
            # half-open ones come in groups: each kind has about as many connections
            name = drawn.choices(list(ATTACKS), _WEIGHTS)[0]
            yield name, drawn.choice(self._addresses), drawn.getrandbits(32)

    async def run(self, is_over: Callable[[], bool]) -> None:
        """Begin attacks at the rate; all connections are closed on return."""
        due_s = time.monotonic()
        try:
            for name, address, seed in self.plan():
                size = GROUP if name == "half-open" else 1
                for _ in range(size):
                    if len(self._tasks) < MAX_OPEN:
                        task = asyncio.create_task(self._attack(name, address, seed))
                        self._tasks.add(task)
                        task.add_done_callback(self._tasks.discard)
                # one that is late is not caught up with: the rate is a bound
                due_s = max(due_s + size / self._rate, time.monotonic())
                while (left_s := due_s - time.monotonic()) > 0 and not is_over():
                    await asyncio.sleep(min(left_s, 0.1))
                if is_over():
                    return
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _attack(self, name: str, address: Address, seed: int) -> None:
        self.counts[name] += 1
        try:
            async with asyncio.timeout(ANSWER_S):
                reader, writer = await asyncio.open_connection(*address)
        except (OSError, TimeoutError):
            self.counts["refused"] += 1
            return
        self.counts["connections"] += 1
        connection = _Connection(reader, writer, seed)
        try:
            await ATTACKS[name](self, connection)
        except OSError:  # the other side has closed, as it should
            self.counts["reset"] += 1
        finally:
            connection.abort()
            if connection.received > ANSWER_BYTES:
                self.counts["accepted"] += 1

    # ------------------------------------------------------------------------------- each attack

    async def keep(self, connection: _Connection) -> None:
        """Say nothing more."""
        await connection.listen(connection.random.uniform(*KEEP_S))

    async def hello(self, connection: _Connection) -> tuple[bytes, bytes]:
        """Begin a handshake; returns the own random bytes and the other side's answer."""
        nonce = connection.random.randbytes(32)
        await connection.send(MAGIC + nonce)
        return nonce, await connection.receive(ANSWER_BYTES)

    async def guess(self, connection: _Connection) -> bytes:
        """A whole handshake with a guess of the secret; returns the session key."""
        nonce, answer = await self.hello(connection)
        secret = connection.random.choice(
            [b"", b"password12345678", connection.random.randbytes(32)]
        )
        purpose, name = connection.random.choice(PURPOSES), connection.random.choice(NAMES)
        if len(answer) < ANSWER_BYTES:
            answer = bytes(ANSWER_BYTES)
        message, session = claim_and_proof(secret, nonce, answer, purpose=purpose, server=name)
        await connection.send(message)
        return session

    def recording(self, connection: _Connection) -> bytes:
        """A handshake that another client has done once, or one of its form."""
        if self._recordings:
            return connection.random.choice(self._recordings)
        nonce, key = connection.random.randbytes(32), connection.random.randbytes(32)
        return MAGIC + nonce + claim_and_proof(key, nonce, bytes(ANSWER_BYTES))[0]


async def _say_nothing(attacker: Attacker, connection: _Connection) -> None:
    await attacker.keep(connection)


async def _random_bytes(attacker: Attacker, connection: _Connection) -> None:
    await connection.send(connection.random.randbytes(connection.random.randint(1, 65_536)))
    await connection.listen(ANSWER_S)


async def _http(attacker: Attacker, connection: _Connection) -> None:
    await connection.send(HTTP)
    await connection.listen(ANSWER_S)


async def _huge_lengths(attacker: Attacker, connection: _Connection) -> None:
    if connection.random.randint(0, 1):
        await attacker.hello(connection)
    await connection.send(
        b"\xff" * connection.random.randint(2, 8) + connection.random.randbytes(32_768)
    )
    await attacker.keep(connection)


async def _truncated(attacker: Attacker, connection: _Connection) -> None:
    whole = attacker.recording(connection)
    await connection.send(whole[: connection.random.randint(1, len(whole) - 1)])
    if connection.random.randint(0, 1):
        await attacker.keep(connection)


async def _replayed(attacker: Attacker, connection: _Connection) -> None:
    whole = attacker.recording(connection)
    await connection.send(whole[:HELLO_BYTES])
    await connection.receive(ANSWER_BYTES)
    await connection.send(whole[HELLO_BYTES:])
    await connection.listen(ANSWER_S)


async def _wrong_secret(attacker: Attacker, connection: _Connection) -> None:
    await attacker.guess(connection)
    await connection.listen(ANSWER_S)


async def _forged_entries(attacker: Attacker, connection: _Connection) -> None:
    """Requests to a store as if the handshake had succeeded."""
    session = await attacker.guess(connection)
    for number, (method, fields) in enumerate(_FORGED):
        head = json.dumps({"id": number, "method": method, **fields}).encode()
        payload = struct.pack("!I", len(head)) + head
        await connection.send(signed(session, number, payload))
    await connection.listen(ANSWER_S)


async def _junk_after_handshake(attacker: Attacker, connection: _Connection) -> None:
    await attacker.guess(connection)
    await connection.send(connection.random.randbytes(131_072))
    await connection.listen(ANSWER_S)


async def _drip(attacker: Attacker, connection: _Connection) -> None:
    """A handshake that never ends, a byte at a time."""
    for byte in attacker.recording(connection):
        await connection.send(bytes([byte]))
        await connection.listen(0.5)


async def _scan(attacker: Attacker, connection: _Connection) -> None:
    """Connect and go."""


#: What would change a run if it were believed.
_FORGED: tuple[tuple[str, dict[str, object]], ...] = (
    ("append", {"entry": '{"kind": "server_down", "server": 0, "incarnation": 1, "reason": "x"}'}),
    ("append", {"entry": '{"kind": "stop_requested", "migration": 0}'}),
    ("append", {"entry": '{"kind": "drops_announced", "server": 0, "step": 0, "drops": [[0, 0]]}'}),
    ("join", {"server": 0, "host": "127.0.0.1", "port": 9, "held": [], "after": 1000}),
    ("leave", {"server": 0, "incarnation": 1}),
    ("delete", {"prefix": "plan/"}),
    ("start_run", {"run": {"servers": ["x"], "facts": {}, "timeout_s": 1.0}}),
)

ATTACKS: dict[str, Attack] = {
    "silent": _say_nothing,
    "half-open": _say_nothing,
    "random bytes": _random_bytes,
    "http": _http,
    "huge lengths": _huge_lengths,
    "truncated": _truncated,
    "replayed": _replayed,
    "wrong secret": _wrong_secret,
    "forged entries": _forged_entries,
    "junk after handshake": _junk_after_handshake,
    "drip": _drip,
    "scan": _scan,
}
_WEIGHTS = [1 / GROUP if name == "half-open" else 1.0 for name in ATTACKS]


def attack(
    addresses: Sequence[Address],
    until: float | threading.Event,
    seed: int,
    *,
    rate: float = RATE,
    recordings: Sequence[bytes] = (),
) -> dict[str, int]:
    """Attack ports for so many seconds, or until an event is set, and say what was done.

    Parameters
    ----------
    rate
        Connections a second, to all ports together.
    recordings
        What other clients have sent in their handshakes (:func:`record`), to be replayed.

    Returns
    -------
    dict
        Connections by kind of attack, and as :class:`Attacker` says.
    """
    if isinstance(until, threading.Event):
        is_over = until.is_set
    else:
        end_s = time.monotonic() + until

        def is_over() -> bool:
            return time.monotonic() >= end_s

    attacker = Attacker(addresses, seed, rate, recordings)
    asyncio.run(attacker.run(is_over))
    return {name: attacker.counts[name] for name in (*TOTALS, *ATTACKS)}


@contextlib.contextmanager
def sink(number: int = 1) -> Iterator[list[Address]]:
    """Ports of a listener that answers a handshake's beginning and discards all else."""
    writers: set[asyncio.StreamWriter] = set()
    tasks: set[asyncio.Task[None]] = set()

    async def discard(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            first = await reader.read(HELLO_BYTES)
            if first.startswith(MAGIC):
                writer.write(MAGIC + bytes(ANSWER_BYTES - len(MAGIC)))
            while await reader.read(65_536):
                pass
        writer.transport.abort()
        writers.discard(writer)

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # noted before a task of it runs: one that is cancelled before that closes nothing
        writers.add(writer)
        task = asyncio.create_task(discard(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    found: list[Address] = []
    started = threading.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> list[asyncio.Server]:
        servers = [await asyncio.start_server(accept, "127.0.0.1", 0) for _ in range(number)]
        found.extend(server.sockets[0].getsockname()[:2] for server in servers)
        return servers

    async def close(servers: list[asyncio.Server]) -> None:
        for server in servers:
            server.close()
        others = [one for one in asyncio.all_tasks() if one is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(0)  # sockets of aborted connections are closed in the next turn

    def run() -> None:
        asyncio.set_event_loop(loop)
        servers = loop.run_until_complete(serve())
        started.set()
        loop.run_forever()
        loop.run_until_complete(close(servers))
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    started.wait()
    try:
        yield found
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        thread.join()


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    return host, int(port)


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description="Attack the ports of a run without its secret.")
    parser.add_argument("addresses", nargs="+", type=_address, metavar="HOST:PORT")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=RATE, help="connections a second in all")
    parser.add_argument("--sink", action="store_true", help="attack a listener of its own instead")
    parser.add_argument("--recording", action="append", default=[], help="file to replay")
    options = parser.parse_args()
    recordings = []
    for path in options.recording:
        with open(path, "rb") as file:
            recordings.append(file.read())
    with contextlib.ExitStack() as stack:
        addresses = options.addresses
        if options.sink:
            addresses = stack.enter_context(sink(len(addresses)))
        counts = attack(
            addresses, options.seconds, options.seed, rate=options.rate, recordings=recordings
        )
    print(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main()
