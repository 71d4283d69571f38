"""One lane of a driver to one other server's worker: a call, and its answer.

By gloo alone (:class:`Connection`), or with the states on a channel of their own
(:class:`NcclConnection`).

A line raises RuntimeError, as torch.distributed does, where the other side is gone or silent.
"""

from __future__ import annotations

import datetime
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from runtime_adapter.transport.messages import (
    ANSWER,
    HEADER_BYTES,
    Header,
    MessageBuffer,
    get_header,
    put_header,
)
from runtime_adapter.transport.nccl_channel import DataChannel
from runtime_adapter.transport.rendezvous import receive, send
from runtime_adapter.transport.send_queue import LONG_BYTES, SendQueue

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint32]


class Buffer:
    """Memory for a message, kept for the next one: fresh pages cost more than the message."""

    def __init__(self) -> None:
        self._all = torch.empty(0, dtype=torch.uint8)
        self._size = -1

    def resize(self, size: int) -> None:
        """Make ``tensor`` and ``array``, which are the same memory, of so many bytes."""
        if size == self._size:
            return
        self._size = size
        if size > len(self._all):
            self._all = torch.empty(size, dtype=torch.uint8)
        self.tensor = self._all[:size]
        self.array: Any = self.tensor.numpy()
        self._states: torch.Tensor | None = None

    def states(self, dtype: torch.dtype, width: int) -> torch.Tensor:
        """What follows the header, [T, width]; of one dtype and width throughout."""
        if self._states is None:
            self._states = self.tensor[HEADER_BYTES:].view(dtype).view(-1, width)
        return self._states


class Connection:
    """A call is one message and its answer another; see :mod:`runtime_adapter.transport.messages`.

    For each call :meth:`words`, :meth:`send`, :meth:`answer` and then, if it is an answer indeed,
    :meth:`sums`; after a failure :meth:`forget`. ``send_queue`` is that of all lanes of the driver,
    ``room`` what the other side has memory for.
    """

    def __init__(
        self,
        group: Any,
        lane: int,
        timeout: datetime.timedelta,
        send_queue: SendQueue,
        room: MessageBuffer,
    ) -> None:
        self._group = group
        self.room = room
        self._lane = lane
        self._timeout = timeout
        self._send_queue = send_queue
        self._message, self._answer = Buffer(), Buffer()
        self._left: threading.Event | None = None

    @staticmethod
    def carried(hidden: torch.Tensor) -> Any:
        """A step's hidden states as all lines of its kind :meth:`send` them."""
        states = hidden.cpu() if hidden.is_cuda else hidden
        return states.contiguous().view(torch.uint8).numpy()

    def words(self, tokens: int, calls: int, token_bytes: int) -> Words:
        """Where to write the words of a call of so many tokens, uint32 [calls].

        Raises
        ------
        WireError
            The other side has no room for such a call.
        """
        self.room.require(tokens, calls)
        self._upto = HEADER_BYTES + 4 * calls
        self._message.resize(self._upto + tokens * token_bytes)
        self._answer.resize(HEADER_BYTES + tokens * token_bytes)
        words: Words = self._message.array[HEADER_BYTES : self._upto].view(np.uint32)
        return words

    def send(self, header: Header, states: Any, rows: Ints | None) -> None:
        """Begin a call with some rows of what is ``carried``, or with all (None)."""
        raw, message, answer = self._message.array, self._message.tensor, self._answer.tensor
        put_header(raw, header)
        into = raw[self._upto :].reshape(header.tokens, -1)
        if rows is None:
            into[:] = states
        else:
            np.take(states, rows, axis=0, out=into, mode="clip")
        self._left = None
        if len(raw) - HEADER_BYTES < LONG_BYTES:
            # first, since to be ready to receive is log to the other side as well
            self._sending = send(self._group, message, 1, self._lane)
            self._receiving = receive(self._group, answer, 1, self._lane)
        else:
            self._receiving = receive(self._group, answer, 1, self._lane)
            self._left = self._send_queue.put(self._group, message, 1, self._lane)

    def answer(self) -> Header:
        """Wait for the answer of the call.

        Raises
        ------
        RuntimeError
            It does not come.
        WireError
            What comes is none of ours.
        """
        if self._left is not None:  # within the timeout of each that goes before
            self._left.wait()
        self._receiving.wait(self._timeout)  # and so the call was sent
        return get_header(self._answer.array)

    def sums(self, dtype: torch.dtype, width: int) -> torch.Tensor:
        """The partial sums of an answer, [T, width]; memory that the next answer is written to."""
        return self._answer.states(dtype, width)

    def forget(self) -> None:
        """The call has failed: what was lent to it may still be written to."""
        self._message, self._answer = Buffer(), Buffer()


class NcclConnection(Connection):
    """Messages carry all but the states, which go over a channel.

    See :mod:`runtime_adapter.transport.nccl_channel`.

    A call's states always go, and an answer's where it has any.
    """

    def __init__(
        self, group: Any, lane: int, timeout: datetime.timedelta, send_queue: SendQueue,
        room: MessageBuffer, channel: DataChannel,
    ) -> None:  # fmt: skip
        super().__init__(group, lane, timeout, send_queue, room)
        self.channel = channel

    @staticmethod
    def carried(hidden: torch.Tensor) -> Any:
        """They stay where they are."""
        return hidden

    def words(self, tokens: int, calls: int, token_bytes: int) -> Words:
        """As of a call without states."""
        return super().words(tokens, calls, 0)

    def send(self, header: Header, states: Any, rows: Ints | None) -> None:
        """Queue the states, and then tell of them."""
        if rows is not None:
            states = states[torch.from_numpy(rows).to(states.device)]
        self._states = states
        self._queued = self.channel.send(states)
        put_header(self._message.array, header)
        self._sending = send(self._group, self._message.tensor, 1, self._lane)
        self._receiving = receive(self._group, self._answer.tensor, 1, self._lane)

    def answer(self) -> Header:
        """Wait for the answer's header, and for its states where it has any."""
        header = super().answer()
        if header.kind == ANSWER and header.tokens == len(self._states):
            self._sums = torch.empty_like(self._states)
            self.channel.receive(self._sums)
        return header

    def sums(self, dtype: torch.dtype, width: int) -> torch.Tensor:
        """The partial sums of an answer, [T, width], on the states' device."""
        return self._sums

    def forget(self) -> None:
        """The call has failed, and its states may still be queued."""
        super().forget()
        self.channel.close()
