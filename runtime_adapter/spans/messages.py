"""The messages between servers that execute a request's layers: numbers and raw bytes.

A message::

    header | counts int64 [COUNTED] | setup (JSON, may be empty) | payload

START (home to the server of the first span): ids of the prompt and tokens so far, int32 [T].
STATES (one span to the next): hidden states [T, bytes of a token].
TOKEN (driver to the first span's server and to home): one id, int32 [1].
FREE (home to all servers of the path): the request has ended; no payload.
FAILED (any server of the path to home): a step cannot be done; the setup says why.

The first message of an attempt that a server gets brings the setup of the request: its path and
settings. ``counts`` are those of the pass so far, which its last message takes home. Neither these
nor the header count as payload (docs/design.md, section 10).
"""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from prism_plan.execution_table import Span
from prism_plan.simulate.network import BYTES_PER_TOKEN_ID
from runtime_adapter.moe.counters import Counters
from runtime_adapter.transport.buffered_reader import BufferedReader
from runtime_adapter.transport.wire_format import WireError

START, STATES, TOKEN, FREE, FAILED = 1, 2, 3, 4, 5
_HEADER = struct.Struct("=4i2q5iq")
#: Begins every header: a stray or foreign message is not taken for one.
MAGIC = 0x5052_5331
#: The step's tokens are the last ones of their pass, which makes a token. The request has ended
#: with this token. The receiver begins the next pass with it.
LAST, ENDED, BEGINS = 1, 2, 4
COUNTED = len(Counters.NAMES)
#: Of every message, before setup and payload.
HEADER_BYTES = _HEADER.size + 8 * COUNTED
MAX_SETUP_BYTES = 1 << 16

Counts = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


class Attempt(NamedTuple):
    """An attempt to run a request: home, lane of it, and a number that ascends in each lane."""

    home: int
    lane: int
    number: int


@dataclass(frozen=True)
class RequestSetup:
    """What a server needs to know of a request; agreed on by nobody else.

    ``request`` is the request's number over all servers, by which routing breaks ties; ``path`` its
    spans, of which the last one's server is the driver; ``new_tokens`` are made at most;
    ``kv_tokens`` is how long its caches may become.
    """

    request: int
    path: tuple[Span, ...]
    new_tokens: int
    kv_tokens: int

    def to_json(self) -> dict[str, Any]:
        """Values of the JSON in a message."""
        path = [list(span) for span in self.path]
        return {"request": self.request, "path": path, "new": self.new_tokens, "kv": self.kv_tokens}

    @staticmethod
    def from_json(values: Any, num_servers: int, num_layers: int) -> RequestSetup:
        """Read and check the values; raises WireError where they do not fit the run."""
        try:
            path = tuple(Span(*map(int, span)) for span in values["path"])
            setup = RequestSetup(
                int(values["request"]), path, int(values["new"]), int(values["kv"])
            )
        except (KeyError, TypeError, ValueError) as error:
            raise WireError("a request whose setup cannot be read") from error
        starts = [span.first for span in path]
        ends = [span.last + 1 for span in path]
        if (
            not path
            or starts != [0, *ends[:-1]]
            or ends[-1] != num_layers
            or any(span.first > span.last for span in path)
            or not all(0 <= span.server < num_servers for span in path)
            or min(setup.new_tokens, setup.kv_tokens) < 1
        ):
            raise WireError("a request whose path does not cover the layers in order")
        return setup


@dataclass(eq=False, slots=True)
class SpanMessage:
    """A message, with ``payload`` uint8 [bytes]; ``span`` is the receiver's place in the path.

    ``past`` tokens are cached before the step's ``tokens``. ``turn`` counts the attempt's passes
    from 0: of a TOKEN, the pass that has made it.
    """

    kind: int
    attempt: Attempt
    span: int = 0
    past: int = 0
    tokens: int = 0
    flags: int = 0
    turn: int = 0
    payload: Bytes = field(default_factory=lambda: np.empty(0, np.uint8))
    setup: Any = None
    counts: Counts = field(default_factory=lambda: np.zeros(COUNTED, np.int64))

    @property
    def ends(self) -> bool:
        """Whether the request has ended with this token."""
        return bool(self.flags & ENDED)

    def pack(self) -> list[Any]:
        """The message's bytes, as buffers to send one after the other."""
        setup = b"" if self.setup is None else json.dumps(self.setup).encode()
        header = _HEADER.pack(
            MAGIC, self.kind, *self.attempt[:2], self.attempt.number, len(self.payload), self.span,
            self.past, self.tokens, self.flags, len(setup), self.turn,
        )  # fmt: skip
        return [header + self.counts.tobytes() + setup, self.payload.data]

    def ids(self) -> list[int]:
        """The payload as token ids."""
        found: list[int] = self.payload.view(np.int32).tolist()
        return found


def ids_payload(ids: list[int]) -> Bytes:
    """Token ids as a payload."""
    return np.array(ids, np.int32).view(np.uint8)


class MessageReader:
    """Reads messages from one connection, and checks that they fit the run.

    ``token_bytes`` are those of a token's hidden states.
    """

    def __init__(
        self, connection: socket.socket, num_lanes: list[int], num_layers: int, token_bytes: int
    ) -> None:
        self._reader = BufferedReader(connection)
        self._num_lanes = num_lanes
        self._num_layers = num_layers
        self._token_bytes = token_bytes
        self._fixed = memoryview(bytearray(HEADER_BYTES))

    def read(self) -> SpanMessage:
        """The next message.

        Raises
        ------
        OSError
            The other side is gone.
        WireError
            No server of this version sends it.
        """
        self._reader.read_into(self._fixed)
        (
            magic, kind, home, lane, number, size, span, past, tokens, flags, setup_bytes, turn,
        ) = _HEADER.unpack_from(self._fixed)  # fmt: skip
        if magic != MAGIC or not START <= kind <= FAILED:
            raise WireError("a message that no server of this version sends")
        expected = {START: BYTES_PER_TOKEN_ID * tokens, STATES: self._token_bytes * tokens}
        if (
            not 0 <= home < len(self._num_lanes)
            or not 0 <= lane < self._num_lanes[home]
            or min(number, span, past, tokens, flags, turn) < 0
            or span >= self._num_layers
            or size != expected.get(kind, BYTES_PER_TOKEN_ID if kind == TOKEN else 0)
            or not 0 <= setup_bytes <= MAX_SETUP_BYTES
        ):
            raise WireError("a message between spans that does not fit this run")
        _require_memory(size)
        setup = None
        if setup_bytes:
            raw = bytearray(setup_bytes)
            self._reader.read_into(memoryview(raw))
            try:
                setup = json.loads(raw)
            except ValueError as error:
                raise WireError("a message whose setup is no JSON") from error
        payload = np.empty(size, np.uint8)
        if size:
            self._reader.read_into(payload.data)
        counts = np.frombuffer(self._fixed, np.int64, COUNTED, _HEADER.size).copy()
        attempt = Attempt(home, lane, number)
        return SpanMessage(kind, attempt, span, past, tokens, flags, turn, payload, setup, counts)


def _require_memory(size: int) -> None:
    if size < 1 << 26:
        return
    import psutil

    free = psutil.virtual_memory().available
    if size > free // 2:
        raise WireError(f"a message of {size:,} bytes; {free:,} bytes of memory are free")
