"""What a call looks like on the wire: whole numbers and raw bytes, nothing is unpickled.

A call::

    header int32 [8] | words uint32 [calls] | hidden states [tokens, hidden_size]

and its answer::

    header int32 [8] | partial sums [tokens, hidden_size]

A word names one (token, expert) pair in four bytes, as DESIGN section 4 counts them: the gate
weight as a float32 whose sign bit says that this is the token's last call, and whose lowest bits
are the expert's id. A weight so keeps 23 bits of mantissa less those of an id (17 bits of 64
experts). The payload of a message is all but its header.
"""

from __future__ import annotations

import struct
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

#: What a header says: a call, its answer, an expert is not here (any more), the server failed, a
#: front has no more calls, a worker asks for an expert's weights (see peers.py).
CALL, ANSWER, MISSING, FAILED, OVER, WEIGHTS = 1, 2, 3, 4, 5, 6


class WireError(PrismError):
    """A message that is none of ours, or does not fit the model."""


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
    """Payload of a call (DESIGN section 4, rule 3)."""
    return tokens * token_bytes + BYTES_PER_CALL * calls


def most_bytes(tokens: int, top_k: int, token_bytes: int) -> int:
    """The largest message of steps of up to ``tokens`` tokens."""
    return HEADER_BYTES + call_bytes(tokens, tokens * top_k, token_bytes)


def put_header(message: Bytes, header: Header) -> None:
    """Write a header to the beginning of a message."""
    _HEADER.pack_into(message.data, 0, MAGIC, *header, 0, 0)


def get_header(message: Bytes) -> Header:
    """Read and check a header.

    Raises
    ------
    WireError
        It is none of ours.
    """
    magic, *fields = _HEADER.unpack_from(message.data)[:6]
    if magic != MAGIC or not CALL <= fields[0] <= WEIGHTS:
        raise WireError("a message that is no call and no answer; is every server of one version?")
    if min(fields) < 0:
        raise WireError("a header with a negative count")
    return Header(*fields)
