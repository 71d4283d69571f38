"""The driver's side of a connection: one call at a time to another server's worker.

By gloo alone (:class:`Connection`), or with the states on a data channel of their own
(:class:`NcclConnection`). A connection raises RuntimeError, as torch.distributed does, where the
other side is gone or does not answer.
"""

from __future__ import annotations

import datetime
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from runtime_adapter.transport import wire_format as wire
from runtime_adapter.transport.nccl_channel import DataChannel
from runtime_adapter.transport.pair_groups import receive, send
from runtime_adapter.transport.send_queue import LONG_BYTES, SendQueue

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint32]


class _ReusedMemory:
    """Memory for a message, kept for the next one: fresh pages cost more than the message."""

    def __init__(self) -> None:
        self._all = torch.empty(0, dtype=torch.uint8)
        self._size = -1

    def resize(self, size: int) -> None:
        """Make ``tensor`` and ``array``, two views of the same memory, of so many bytes."""
        if size == self._size:
            return
        self._size = size
        if size > len(self._all):
            self._all = torch.empty(size, dtype=torch.uint8)
        self.tensor = self._all[:size]
        self.array: Any = self.tensor.numpy()
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
    driver, ``buffer`` describes the worker's receive buffer.
    """

    def __init__(
        self,
        group: Any,
        lane: int,
        timeout: datetime.timedelta,
        send_queue: SendQueue,
        buffer: wire.MessageBuffer,
    ) -> None:
        self._group = group
        self.buffer = buffer
        self._lane = lane
        self._timeout = timeout
        self._send_queue = send_queue
        self._message, self._answer = _ReusedMemory(), _ReusedMemory()
        self._sent: threading.Event | None = None

    @staticmethod
    def wire_view(hidden: torch.Tensor) -> Any:
        """A step's hidden states in the form in which this kind of connection sends them."""
        states = hidden.cpu() if hidden.is_cuda else hidden
        return states.contiguous().view(torch.uint8).numpy()

    def words(self, tokens: int, calls: int, token_bytes: int) -> Words:
        """Prepare a call of so many tokens; returns where to write its words, uint32 [calls].

        Raises
        ------
        WireError
            The worker's buffer is too small for such a call.
        """
        self.buffer.require(tokens, calls)
        self._states_begin = wire.HEADER_BYTES + 4 * calls
        self._message.resize(self._states_begin + tokens * token_bytes)
        self._answer.resize(wire.HEADER_BYTES + tokens * token_bytes)
        words: Words = self._message.array[wire.HEADER_BYTES : self._states_begin].view(np.uint32)
        return words

    def send(self, header: wire.Header, states: Any, rows: Ints | None) -> None:
        """Begin a call with some rows of a :meth:`wire_view`, or with all (None)."""
        raw, message, answer = self._message.array, self._message.tensor, self._answer.tensor
        wire.put_header(raw, header)
        target = raw[self._states_begin :].reshape(header.tokens, -1)
        if rows is None:
            target[:] = states
        else:
            np.take(states, rows, axis=0, out=target, mode="clip")
        self._sent = None
        if len(raw) - wire.HEADER_BYTES < LONG_BYTES:
            # before the receive is posted, for gloo announces that to the other side as well
            self._sending = send(self._group, message, 1, self._lane)
            self._receiving = receive(self._group, answer, 1, self._lane)
        else:
            self._receiving = receive(self._group, answer, 1, self._lane)
            self._sent = self._send_queue.put(self._group, message, 1, self._lane)

    def answer(self) -> wire.Header:
        """Wait for the answer of the call.

        Raises
        ------
        RuntimeError
            It does not come.
        WireError
            No server of this version sends what has come.
        """
        if self._sent is not None:  # each queued message before this one has a timeout of its own
            self._sent.wait()
        self._receiving.wait(self._timeout)  # an answer implies that the call has been sent
        return wire.get_header(self._answer.array)

    def sums(self, dtype: torch.dtype, width: int) -> torch.Tensor:
        """The partial sums of an answer, [T, width]; the next answer overwrites this memory."""
        return self._answer.states(dtype, width)

    def reset(self) -> None:
        """Take fresh memory after a failed call, which may still be writing to the old one."""
        self._message, self._answer = _ReusedMemory(), _ReusedMemory()


class NcclConnection(Connection):
    """Messages carry all but the states, which go over a data channel.

    A call's states are always sent, an answer's only if it has any; see
    :mod:`runtime_adapter.transport.nccl_channel`.
    """

    def __init__(
        self, group: Any, lane: int, timeout: datetime.timedelta, send_queue: SendQueue,
        buffer: wire.MessageBuffer, channel: DataChannel,
    ) -> None:  # fmt: skip
        super().__init__(group, lane, timeout, send_queue, buffer)
        self.channel = channel

    @staticmethod
    def wire_view(hidden: torch.Tensor) -> Any:
        """The states themselves: they leave from the device where they are."""
        return hidden

    def words(self, tokens: int, calls: int, token_bytes: int) -> Words:
        """As of a call without states."""
        return super().words(tokens, calls, 0)

    def send(self, header: wire.Header, states: Any, rows: Ints | None) -> None:
        """Queue the states, and then announce them by the message."""
        if rows is not None:
            states = states[torch.from_numpy(rows).to(states.device)]
        self._states = states
        self._queued = self.channel.send(states)
        wire.put_header(self._message.array, header)
        self._sending = send(self._group, self._message.tensor, 1, self._lane)
        self._receiving = receive(self._group, self._answer.tensor, 1, self._lane)

    def answer(self) -> wire.Header:
        """Wait for the answer's header, and for its states where it has any."""
        header = super().answer()
        if header.kind == wire.ANSWER and header.tokens == len(self._states):
            self._sums = torch.empty_like(self._states)
            self.channel.receive(self._sums)
        return header

    def sums(self, dtype: torch.dtype, width: int) -> torch.Tensor:
        """The partial sums of an answer, [T, width], on the states' device."""
        return self._sums

    def reset(self) -> None:
        """Close the channel as well: states of the failed call may still be queued on it."""
        super().reset()
        self.channel.close()
