"""The worker's side of a call: unpacks it, computes it and writes the answer."""

from __future__ import annotations

import numpy as np
import torch

from runtime_adapter.moe.compute import Batch
from runtime_adapter.server_config import ServerConfig
from runtime_adapter.transport import wire_format as wire
from runtime_adapter.transport.nccl_channel import DataChannel
from runtime_adapter.transport.wire_kernels import unpack_calls
from runtime_adapter.weights.expert_map import ExpertMap

#: Unpacked, a call has an expert, a token and a weight.
_BYTES_OF_CALL = 8 + 8 + 4
#: Views of calls of up to so many tokens are kept.
MAX_KEPT_TOKENS = 4


def require_memory(size: int) -> None:
    """Refuse buffers that this machine has no memory for.

    Raises
    ------
    WireError
        It has not so much.
    """
    import psutil

    free = psutil.virtual_memory().available
    if size > free // 2:
        raise wire.WireError(
            f"a driver's steps need buffers of {size:,} bytes; {free:,} bytes are free"
        )


class CallHandler:
    """Handles the calls of one connection, in memory that is used for each again.

    ``max_tokens`` is the longest step of the driver that calls.

    Raises
    ------
    WireError
        There is no memory for such steps.
    """

    def __init__(self, config: ServerConfig, max_tokens: int, expert_map: ExpertMap) -> None:
        model = config.model
        self._model = model
        self._compute = config.compute
        self._dtype = config.dtype
        self._width = config.width
        self._limits = wire.MessageBuffer(max_tokens, model.top_k)
        token_bytes = self._token_bytes()
        calls = max_tokens * model.top_k
        buffers = self._limits.call_bytes(token_bytes) + self._limits.answer_bytes(token_bytes)
        require_memory(buffers + calls * _BYTES_OF_CALL)
        #: Calls are received here.
        self.buffer = torch.empty(self._limits.call_bytes(token_bytes), dtype=torch.uint8)
        self._raw = self.buffer.numpy()
        self._reply = torch.empty(self._limits.answer_bytes(token_bytes), dtype=torch.uint8)
        self._reply_raw = self._reply.numpy()
        self._words = self._raw[wire.HEADER_BYTES : wire.HEADER_BYTES + 4 * calls].view(np.uint32)
        self._gpu_of = expert_map.gpu_of[config.rendezvous.rank]
        self._bits = wire.id_bits(model.num_experts)
        # filled by unpack_calls; a batch is their beginning
        self._experts, self._token = np.empty(calls, np.int64), np.empty(calls, np.int64)
        self._weights = np.empty(calls, np.float32)
        self._weight_bits = self._weights.view(np.uint32)
        self._views: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def _token_bytes(self) -> int:
        """Bytes of a token's states in a message."""
        return int(self._width * self._dtype.itemsize)

    def header(self) -> wire.Header:
        """Read the header of the message in the buffer; raises wire.WireError where it has none."""
        return wire.get_header(self._raw)

    def answer(self, header: wire.Header) -> torch.Tensor:
        """Compute the call in the buffer; returns its answer, which the next one overwrites.

        Raises
        ------
        wire.WireError
            The call does not fit the model.
        """
        model = self._model
        tokens, calls, layer = header.tokens, header.calls, header.detail
        fits = self._limits.fits(tokens, calls)
        if header.kind != wire.CALL or layer >= model.num_layers or not fits:
            raise wire.WireError(f"a call that does not fit {model.name}: {header}")
        hidden, reply, sums = self._receive_states(tokens, calls)
        first = layer * model.num_experts
        experts, token, weights = self._experts[:calls], self._token[:calls], self._weights[:calls]
        num_tokens, missing = unpack_calls(
            self._words[:calls], self._bits, first, self._gpu_of, experts,
            self._weight_bits[:calls], token,
        )  # fmt: skip
        if num_tokens != tokens or token[-1] != tokens - 1 or missing >= model.num_experts:
            raise wire.WireError(f"a call that does not fit {model.name}: {header}")
        if missing >= 0:
            return self.header_only(wire.Header(wire.MISSING, detail=first + int(missing)))
        sums.copy_(self._compute.partial_sums(Batch(layer, hidden, token, experts, weights)))
        self._send_states(sums)
        wire.put_header(self._reply_raw, wire.Header(wire.ANSWER, tokens, calls, layer))
        return reply

    def header_only(self, header: wire.Header) -> torch.Tensor:
        """An answer without states."""
        wire.put_header(self._reply_raw, header)
        return self._reply[: wire.HEADER_BYTES]

    def _receive_states(
        self, tokens: int, calls: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A call's states, its answer, and the sums in the answer; views of few tokens are kept."""
        views = self._views.get((tokens, calls))
        if views is None:
            begin, size = wire.HEADER_BYTES + 4 * calls, tokens * self._token_bytes()
            shape = (tokens, self._width)
            hidden = self.buffer[begin : begin + size].view(self._dtype).view(shape)
            reply = self._reply[: wire.HEADER_BYTES + size]
            views = hidden, reply, reply[wire.HEADER_BYTES :].view(self._dtype).view(shape)
            if tokens <= MAX_KEPT_TOKENS:
                self._views[tokens, calls] = views
        return views

    def _send_states(self, sums: torch.Tensor) -> None:
        """They are in the answer."""

    def message_bytes(self, received: int) -> int:
        """Size of the message whose first bytes are in the buffer; 0 if they do not tell it.

        Raises
        ------
        WireError
            No server of this version sends it, or it does not fit the buffer.
        """
        if received < wire.HEADER_BYTES:
            return 0
        header = self.header()
        if header.kind != wire.CALL or not self._limits.fits(header.tokens, header.calls):
            raise wire.WireError(f"a call that does not fit {self._model.name}: {header}")
        return wire.HEADER_BYTES + wire.call_bytes(header.tokens, header.calls, self._token_bytes())

    def close(self) -> None:
        """The driver is gone, or makes no more calls."""


class NcclCallHandler(CallHandler):
    """Handles calls whose states arrive, and whose sums leave, over a data channel.

    See :mod:`runtime_adapter.transport.nccl_channel`. Raises DataChannelBroken where the driver is
    gone or does not answer.
    """

    def __init__(
        self, config: ServerConfig, max_tokens: int, expert_map: ExpertMap, channel: DataChannel
    ) -> None:
        super().__init__(config, max_tokens, expert_map)
        assert config.channels is not None
        shape, device = (max_tokens, config.width), config.channels.device
        self._channel = channel
        self._hidden = torch.empty(shape, dtype=config.dtype, device=device)
        self._sums = torch.empty_like(self._hidden)

    def _token_bytes(self) -> int:
        return 0

    def answer(self, header: wire.Header) -> torch.Tensor:
        """Compute the call; its states are taken from the channel in any case."""
        try:
            return super().answer(header)
        except wire.WireError:
            self._channel.close()  # states of an unknown size are on their way
            raise

    def _receive_states(
        self, tokens: int, calls: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden = self._hidden[:tokens]
        self._channel.receive(hidden)
        return hidden, self._reply[: wire.HEADER_BYTES], self._sums[:tokens]

    def close(self) -> None:
        self._channel.close()

    def _send_states(self, sums: torch.Tensor) -> None:
        self._sending = self._channel.send(sums)
