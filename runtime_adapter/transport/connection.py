"""The driver's side of a connection: one call at a time to another server's worker.

Over TCP alone (:class:`Connection`), or with the states on a data channel of their own
(:class:`NcclConnection`). Calls are pure functions, so a call whose connection breaks is sent again
over a new one, and it may be computed twice.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from runtime_adapter.transport import wire_format as wire
from runtime_adapter.transport.c10d_store import PairStore, RemoteKeys
from runtime_adapter.transport.handshake import HandshakeFailed
from runtime_adapter.transport.nccl_channel import (
    ChannelConfig,
    DataChannel,
    DataChannelBroken,
    open_channel,
)
from runtime_adapter.transport.peer import ConnectionLost, Peer
from runtime_adapter.transport.rendezvous import RequestTimeout
from runtime_adapter.transport.send_queue import LONG_BYTES, Sending, SendQueue
from runtime_adapter.transport.signed_frames import FrameError
from runtime_adapter.transport.socket_io import (
    SLICE_S,
    keep_alive,
    receive_some,
    send_some,
    wait_in_slices,
)

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint32]

#: How long :meth:`Connection.send` may dial, for it keeps a step's other calls waiting.
FIRST_DIAL_S = 0.5
#: Between two attempts of one call; grows up to the second value.
RETRY_S, MAX_RETRY_S = 0.05, 1.0
MIN_PAUSE_S = 0.02
#: A connection breaks that acknowledges nothing for so long: of a peer that answers pings.
LOST_S = 60.0
#: What ends a connection, but not the call.
_BROKEN = (OSError, HandshakeFailed, FrameError, DataChannelBroken)


class _ReusedMemory:
    """Memory for a message, kept for the next one: fresh pages cost more than the message."""

    def __init__(self) -> None:
        self._all = torch.empty(0, dtype=torch.uint8)
        self._size = -1

    def resize(self, size: int) -> None:
        """Make ``tensor``, ``array`` and ``view``, all the same memory, of so many bytes."""
        if size == self._size:
            return
        self._size = size
        if size > len(self._all):
            self._all = torch.empty(size, dtype=torch.uint8)
        self.tensor = self._all[:size]
        self.array: Any = self.tensor.numpy()
        self.view = memoryview(self.array)
        self._states: torch.Tensor | None = None

    def states(self, dtype: torch.dtype, width: int) -> torch.Tensor:
        """What follows the header, [T, width]; dtype and width never change."""
        if self._states is None:
            self._states = self.tensor[wire.HEADER_BYTES :].view(dtype).view(-1, width)
        return self._states


class Connection:
    """A lane's connection to one worker: a call is one message and its answer another.

    For each call :meth:`words`, :meth:`send`, :meth:`answer` and then, if the answer has states,
    :meth:`sums`; after a failure :meth:`reset`. ``send_queue`` is shared by all lanes of the
    driver; ``buffer`` is what the worker is asked to have memory for. It is dialled with the first
    call. A call waits as long as the ``peer`` answers pings, but no longer than ``time_limit_s``.
    """

    def __init__(
        self,
        peer: Peer,
        lane: int,
        send_queue: SendQueue,
        buffer: wire.MessageBuffer,
        time_limit_s: float = 600.0,
    ) -> None:
        self.peer = peer
        self.buffer = buffer
        self._lane = lane
        self._send_queue = send_queue
        self._time_limit_s = time_limit_s
        self._message, self._answer = _ReusedMemory(), _ReusedMemory()
        self._socket: socket.socket | None = None
        self._generation = -1
        self._tokens = 0
        self._answered = True
        self._attempts = 0
        self._sent, self._received = 0, 0  # bytes of the call and of its answer
        self._queued: Sending | None = None
        self._waits_since_s: float | None = None

    @staticmethod
    def wire_view(hidden: torch.Tensor) -> Any:
        """A step's hidden states in the form in which this kind of connection sends them."""
        states = hidden.cpu() if hidden.is_cuda else hidden
        return states.contiguous().view(torch.uint8).numpy()

    # --------------------------------------------------------------------------------------- a call

    def words(self, tokens: int, calls: int, token_bytes: int) -> Words:
        """Prepare a call of so many tokens; returns where to write its words, uint32 [calls].

        Raises
        ------
        WireError
            The worker's buffer is too small for such a call.
        """
        self.buffer.require(tokens, calls)
        if not self._answered:
            self.reset()
        self._states_begin = wire.HEADER_BYTES + 4 * calls
        self._message.resize(self._states_begin + tokens * token_bytes)
        self._answer.resize(wire.HEADER_BYTES + tokens * token_bytes)
        words: Words = self._message.array[wire.HEADER_BYTES : self._states_begin].view(np.uint32)
        return words

    def send(self, header: wire.Header, states: Any, rows: Ints | None) -> None:
        """Begin a call with some rows of a :meth:`wire_view`, or with all (None).

        Raises
        ------
        ConnectionLost
            The peer is suspect or down; nothing has been sent.
        """
        raw = self._message.array
        wire.put_header(raw, header)
        self.put_states(raw[self._states_begin :].reshape(header.tokens, -1), states, rows)
        self._tokens = header.tokens
        self._attempts = 0
        self._waits_since_s = None
        if not self.peer.usable:
            self._lose()
        self._answered = False
        try:
            if self._generation != self.peer.generation or self._socket is None:
                self._connect(FIRST_DIAL_S)
            self._begin()
        except _BROKEN:
            self._disconnect()  # answer() tries again, for other calls of the step go first

    def answer(self) -> wire.Header:
        """Wait for the answer of the call.

        Raises
        ------
        ConnectionLost
            The peer is suspect or down.
        RequestTimeout
            It answers pings, but not this call within the time limit.
        WireError
            No server of this version sends what has come.
        """
        while True:
            try:
                header = self._advance()
            except _BROKEN:
                self._disconnect()
                header = None
            except wire.WireError:
                self.reset()
                raise
            if header is not None:
                self._answered = True
                return header
            self._look()

    def sums(self, dtype: torch.dtype, width: int) -> torch.Tensor:
        """The partial sums of an answer, [T, width]; the next answer overwrites this memory."""
        return self._answer.states(dtype, width)

    def reset(self) -> None:
        """Give up the call and close the connection, on which its answer may still come."""
        self._disconnect()
        self._answered = True

    def close(self) -> None:
        """End the connection; the next call makes another one."""
        self.reset()

    # ------------------------------------------------------------ states that go another way

    def put_states(self, target: Any, states: Any, rows: Ints | None) -> None:
        """Write rows of a wire view into a message, [T, bytes of a token]."""
        if rows is None:
            target[:] = states
        else:
            np.take(states, rows, axis=0, out=target, mode="clip")

    def announce_channel(self, timeout_s: float) -> None:
        """Called before the peer is dialled."""

    def open_channel(self) -> None:
        """Called when it has answered."""

    def send_states(self) -> None:
        """Called before the message is sent."""

    def receive_sums(self) -> None:
        """Called when an answer with states has come."""

    def close_channel(self) -> None:
        """Called when the connection ends."""

    # ---------------------------------------------------------------------------------------- parts

    def _connect(self, timeout_s: float) -> None:
        """Dial the peer anew."""
        self._disconnect()
        generation = self.peer.generation
        self.announce_channel(timeout_s)
        connection, _ = self.peer.dial(
            "calls", self._lane, max_tokens=self.buffer.tokens, timeout_s=timeout_s
        )
        keep_alive(connection, LOST_S)
        wait_in_slices(connection)
        self._socket, self._generation = connection, generation
        self.open_channel()

    def _begin(self) -> None:
        """Send the call, or what of it leaves without waiting for long."""
        assert self._socket is not None
        self._sent, self._received = 0, 0
        self.send_states()
        message = self._message.view
        if len(message) - wire.HEADER_BYTES < LONG_BYTES:
            self._sent = send_some(self._socket, message)
        else:
            self._queued = self._send_queue.put(self._socket, message)

    def _advance(self) -> wire.Header | None:
        """Go on with the call for a slice of time; returns the answer's header when it is here."""
        if self._socket is None:
            self._retry()
        assert self._socket is not None
        if self._queued is not None:
            if not self._queued.ended.wait(SLICE_S):
                return None
            if self._queued.error is not None:
                raise self._queued.error
            self._sent, self._queued = self._queued.sent, None
        elif self._sent < len(self._message.view):
            self._sent += send_some(self._socket, self._message.view[self._sent :])
            return None
        view = self._answer.view
        self._received += receive_some(
            self._socket, view[self._received :] if self._received else view
        )
        return self._received_header()

    def _received_header(self) -> wire.Header | None:
        """The header of the answer if all of it is here.

        Raises
        ------
        WireError
            It is no answer to this call.
        """
        if self._received < wire.HEADER_BYTES:
            return None
        header = wire.get_header(self._answer.array)
        size = len(self._answer.view) if header.kind == wire.ANSWER else wire.HEADER_BYTES
        if self._received > size or (header.kind == wire.ANSWER and header.tokens != self._tokens):
            raise wire.WireError(
                f"server {self.peer.name!r}: an answer of another size than the call's"
            )
        if self._received < size:
            return None
        if header.kind == wire.ANSWER:
            self.receive_sums()
        return header

    def _retry(self) -> None:
        """Send the call again, over a new connection."""
        if self._attempts:
            self._pause(min(RETRY_S * 2 ** min(self._attempts - 1, 10), MAX_RETRY_S))
            if not self.peer.usable:
                self._lose()
        timeout_s = min(2.0**self._attempts, max(2.0, self.peer.timeout_s))
        self._attempts += 1
        self._connect(timeout_s)
        self._begin()

    def _pause(self, seconds: float) -> None:
        """Wait, but no longer than until the peer is back after an outage, or suspect."""
        generation, deadline = self.peer.generation, time.monotonic() + seconds
        while (
            self.peer.usable
            and self.peer.generation == generation
            and (left_s := deadline - time.monotonic()) > 0
        ):
            time.sleep(min(left_s, MIN_PAUSE_S))

    def _look(self) -> None:
        """Decide whether a call that has no answer yet is waited for."""
        if not self.peer.usable:
            self._lose()
        if self._socket is not None and self._generation != self.peer.generation:
            self._disconnect()
        now = time.monotonic()
        if self._waits_since_s is None:
            self._waits_since_s = now
        elif now - self._waits_since_s > self._time_limit_s:
            self.reset()
            raise RequestTimeout(
                self._time_limit_s, f"server {self.peer.name!r} answers pings but not a call"
            )

    def _lose(self) -> NoReturn:
        self.reset()
        raise ConnectionLost(f"server {self.peer.name!r} does not answer")

    def _disconnect(self) -> None:
        self.close_channel()
        if self._socket is None:
            return
        connection, self._socket = self._socket, None
        if self._queued is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            self._send_queue.cancel(self._queued)
            self._queued = None
        connection.close()


class NcclConnection(Connection):
    """Messages carry all but the states, which go over a data channel.

    A call's states are always sent, an answer's only if it has any; see
    :mod:`runtime_adapter.transport.nccl_channel`. The channel is made with the connection, on the
    named ``interface``.
    """

    def __init__(
        self, peer: Peer, lane: int, send_queue: SendQueue, buffer: wire.MessageBuffer,
        time_limit_s: float, channels: ChannelConfig, interface: str,
    ) -> None:  # fmt: skip
        super().__init__(peer, lane, send_queue, buffer, time_limit_s)
        self._channels = channels
        self._interface = interface
        self._channel: DataChannel | None = None
        self._keys: RemoteKeys | None = None

    @staticmethod
    def wire_view(hidden: torch.Tensor) -> Any:
        """The states themselves: they leave from the device where they are."""
        return hidden

    def words(self, tokens: int, calls: int, token_bytes: int) -> Words:
        """As of a call without states."""
        return super().words(tokens, calls, 0)

    def put_states(self, target: Any, states: Any, rows: Ints | None) -> None:
        """Keep them; the message has none."""
        if rows is not None:
            states = states[torch.from_numpy(rows).to(states.device)]
        self._states = states

    def announce_channel(self, timeout_s: float) -> None:
        """Give the worker's side the keys by which the two sides find each other."""
        connection, session = self.peer.dial("channel", self._lane, timeout_s=timeout_s)
        self._keys = RemoteKeys(connection, session, self.peer.timeout_s)
        self._keys.put("driver", b"")  # on return the worker has noted that there is a channel

    def open_channel(self) -> None:
        """Make the channel, while the worker makes its side."""
        assert self._keys is not None
        timeout_s = self.peer.timeout_s
        store = PairStore(self._keys, timeout_s)
        self._channel = open_channel(self._channels, store, 0, self._interface, timeout_s)

    def send_states(self) -> None:
        """Queue the states before they are announced by the message."""
        assert self._channel is not None
        self._queued_states = self._channel.send(self._states)

    def receive_sums(self) -> None:
        """Take the answer's states from the channel."""
        assert self._channel is not None
        self._sums = torch.empty_like(self._states)
        self._channel.receive(self._sums)

    def close_channel(self) -> None:
        """Close it: states of a failed call may still be queued on it."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._keys is not None:
            self._keys.close()
            self._keys = None

    def sums(self, dtype: torch.dtype, width: int) -> torch.Tensor:
        """The partial sums of an answer, [T, width], on the states' device."""
        return self._sums
