"""The bytes of every message on the wire: whole numbers and raw bytes, nothing is unpickled.

A call::

    header int32 [8] | words uint32 [calls] | hidden states [tokens, hidden_size]

and its answer::

    header int32 [8] | partial sums [tokens, hidden_size]

A word names one (token, expert) pair in four bytes (docs/design.md, section 4): the gate weight as
a float32 whose sign bit marks the token's last call, and whose lowest bits are the expert's id. A
weight thus keeps 23 bits of mantissa less those of an id (17 bits with 64 experts). The payload of
a message is all but its header. :mod:`~runtime_adapter.transport.wire_kernels` packs and unpacks
the words; requests for weights are described in :mod:`runtime_adapter.weights.peer_loader`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from prism_plan.errors import PrismError
from prism_plan.simulate.network import BYTES_PER_CALL

Bytes = npt.NDArray[np.uint8]

HEADER_BYTES = 32
_HEADER = struct.Struct("=8i")
#: Begins every header: a stray or foreign message is not taken for a call.
MAGIC = 0x5052_4D31

#: Kinds of message: a call and its answer; an expert that is not (or no longer) here; the worker
#: failed; a worker asks for an expert's weights.
CALL, ANSWER, MISSING, FAILED, WEIGHTS = 1, 2, 3, 4, 5


class WireError(PrismError):
    """A message that no server of this version sends, or that does not fit the model."""


class StepTooLong(PrismError):
    """A step has more tokens than the servers of a run have agreed on."""


class Header(NamedTuple):
    """First 32 bytes of a message; ``detail`` is the layer of a call, the missing expert's pair."""

    kind: int
    tokens: int = 0
    calls: int = 0
    detail: int = 0
    number: int = 0


def id_bits(num_experts: int) -> int:
    """Bits of an expert's id.

    Raises
    ------
    WireError
        So many experts would leave less than 8 bits of the weight's mantissa.
    """
    bits = max((num_experts - 1).bit_length(), 1)
    if bits > 15:
        raise WireError(f"{num_experts} experts a layer: more than a call can name")
    return bits


def refuse_weights() -> NoReturn:
    """A weight cannot be sent: its sign has another meaning here."""
    raise WireError("a gate weight is negative or not a number; such gates are not supported")


def call_bytes(tokens: int, calls: int, token_bytes: int) -> int:
    """Payload of a call (docs/design.md, section 4, rule 3)."""
    return tokens * token_bytes + BYTES_PER_CALL * calls


@dataclass(frozen=True)
class MessageBuffer:
    """The receive buffer of a worker: calls of up to ``tokens`` tokens, ``top_k`` experts each.

    A driver asks for it when it connects. Senders check it first; receivers check as well, for the
    sender may be of another version.
    """

    tokens: int
    top_k: int

    def fits(self, tokens: int, calls: int) -> bool:
        """Whether ``tokens`` tokens with ``calls`` (token, expert) pairs are possible and fit.

        Possible: at least one token, at least as many pairs as tokens, and at most ``top_k`` times
        as many.
        """
        return 0 < tokens <= min(calls, self.tokens) and calls <= tokens * self.top_k

    def require(self, tokens: int, calls: int) -> None:
        """Refuse a call that does not fit, before any of it is sent.

        Raises
        ------
        WireError
            It does not fit.
        """
        if not self.fits(tokens, calls):
            raise WireError(
                f"a call of {tokens:,} tokens and {calls:,} experts; the server that it is for has "
                f"memory for {self.tokens:,} tokens with up to {self.top_k} experts each"
            )

    def call_bytes(self, token_bytes: int) -> int:
        """Size of the largest call, header included."""
        return HEADER_BYTES + call_bytes(self.tokens, self.tokens * self.top_k, token_bytes)

    def answer_bytes(self, token_bytes: int) -> int:
        """Size of the largest answer, header included."""
        return HEADER_BYTES + self.tokens * token_bytes


def require_tokens(request: object, tokens: int, max_tokens: int) -> None:
    """Refuse a step that exceeds the servers' buffers, before any of it is sent.

    Raises
    ------
    StepTooLong
        Names the request, its tokens and the bound.
    """
    if tokens > max_tokens:
        raise StepTooLong(
            f"request {request}: a step of {tokens:,} tokens; expected at most {max_tokens:,}, for "
            "which the servers of this run have memory: the longest prompt that was announced at "
            "the start"
        )


def put_header(message: Bytes, header: Header) -> None:
    """Write a header to the beginning of a message."""
    _HEADER.pack_into(message.data, 0, MAGIC, *header, 0, 0)


def get_header(message: Bytes) -> Header:
    """Read and check a header.

    Raises
    ------
    WireError
        No server of this version writes such a header.
    """
    magic, *fields = _HEADER.unpack_from(message.data)[:6]
    if magic != MAGIC or not CALL <= fields[0] <= WEIGHTS:
        raise WireError("a message that is no call and no answer; is every server of one version?")
    if min(fields) < 0:
        raise WireError("a header with a negative count")
    return Header(*fields)
