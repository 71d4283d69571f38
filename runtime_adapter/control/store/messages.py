"""Requests to the store and its answers: bytes of a frame, bounds, and errors that travel.

A frame holds a *head*, which is a JSON object, and a *body* of bytes, which is empty but for values
under keys: the length of the head as u32 (big-endian), the head, the body. A request's head has
its ``id``, its ``method`` and the fields of that; an answer's the same ``id``, the ``epoch`` of the
store, ``has_run``, and a ``result``, or an ``error`` with its ``code`` and ``kind``.
"""

from __future__ import annotations

import json
import struct
from typing import Any

from prism_plan.errors import InputError, LimitReached, PrismError
from runtime_adapter.control.json_values import parse_value
from runtime_adapter.transport.rendezvous import NameTaken, RuntimeFailure

MIB = 1 << 20
#: Bytes of a frame; values under keys that are longer are sent in parts.
MAX_FRAME_BYTES = 16 * MIB
MAX_PART_BYTES = 8 * MIB
#: Bytes of a head. Its values take up to a hundred times their text in memory while it is handled,
#: so their number is bounded as well: a server joins with two for each expert that it holds.
MAX_HEAD_BYTES = 8 * MIB
MAX_HEAD_VALUES = 1_000_000
#: Seconds for which a request may wait for a new entry.
MAX_WAIT_S = 10.0
#: Characters of a key, a name, a token.
MAX_KEY = 200
_LENGTH = struct.Struct(">I")


class StoreUnavailable(RuntimeFailure):
    """The store does not answer."""


class StoreRestartedError(RuntimeFailure):
    """The request belongs to an epoch of the store that is over: the store was restarted."""


class NoRun(RuntimeFailure):
    """No run was started in this epoch of the store."""


#: Errors that a client raises as the store did; all others are RuntimeFailure there.
_ERRORS: dict[str, type[PrismError]] = {
    "input": InputError, "full": LimitReached, "restarted": StoreRestartedError, "no_run": NoRun,
    "taken": NameTaken,
}  # fmt: skip


def pack(head: dict[str, Any], body: bytes = b"") -> bytes:
    """The bytes of a request or an answer.

    Raises
    ------
    LimitReached
        They are more than a frame may have.
    """
    text = json.dumps(head, separators=(",", ":")).encode()
    if len(text) > MAX_HEAD_BYTES or len(text) + len(body) + _LENGTH.size > MAX_FRAME_BYTES:
        raise LimitReached(
            f"a message of {len(text) + len(body):,} bytes between a process of the run and its "
            f"store; at most {MAX_HEAD_BYTES:,} bytes are sent"
        )
    return _LENGTH.pack(len(text)) + text + body


def unpack(frame: bytes, source: str) -> tuple[dict[str, Any], bytes]:
    """Head and body of a frame.

    Raises
    ------
    InputError
        It is neither a request nor an answer.
    """
    if len(frame) < _LENGTH.size:
        raise InputError(f"{len(frame)} bytes", source=source, expected="a head")
    (length,) = _LENGTH.unpack_from(frame)
    if length > min(len(frame) - _LENGTH.size, MAX_HEAD_BYTES):
        raise InputError(f"a head of {length:,} bytes", source=source)
    text = frame[_LENGTH.size : _LENGTH.size + length]
    if sum(map(text.count, b",:[{")) > MAX_HEAD_VALUES:
        raise InputError("too many values", source=source, expected=f"at most {MAX_HEAD_VALUES:,}")
    head = parse_value(text, source)
    if not isinstance(head, dict):
        raise InputError(f"{head!r:.60}", source=source, expected="an object")
    return head, frame[_LENGTH.size + length :]


def error_fields(error: PrismError) -> dict[str, Any]:
    """What an answer says of an error."""
    kinds = (kind for kind, known in _ERRORS.items() if type(error) is known)
    kind = next(kinds, "input" if isinstance(error, InputError) else "failure")
    return {"error": error.message, "code": error.exit_code, "kind": kind}


def raise_error(answer: dict[str, Any]) -> None:
    """Raise the error of an answer, if it has one."""
    if "error" in answer:
        raise _ERRORS.get(str(answer.get("kind")), RuntimeFailure)(str(answer["error"]))


# ------------------------------------------------------------------------ fields of requests


def count_in(fields: dict[str, Any], name: str, below: int) -> int:
    """A whole number from 0 to below a bound; raises InputError otherwise, as all of these do."""
    value = fields.get(name)
    if type(value) is not int or not 0 <= value < below:
        raise InputError(
            f"{value!r:.60}", place=name, expected=f"a whole number from 0 to below {below:,}"
        )
    return value


def seconds_in(fields: dict[str, Any], name: str, maximum: float) -> float:
    """A number of seconds from 0 to a maximum."""
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= maximum:
        raise InputError(f"{value!r:.60}", place=name, expected=f"from 0 to {maximum:g} seconds")
    return float(value)


def text_in(fields: dict[str, Any], name: str, max_length: int, *, empty: bool = False) -> str:
    """A text of at most ``max_length`` characters."""
    value = fields.get(name)
    if type(value) is not str or len(value) > max_length or not (value or empty):
        raise InputError(
            f"{value!r:.60}", place=name, expected=f"a text of up to {max_length:,} characters"
        )
    return value


def list_in(fields: dict[str, Any], name: str, max_length: int) -> list[Any]:
    """A list of at most ``max_length`` values."""
    value = fields.get(name)
    if type(value) is not list or len(value) > max_length:
        raise InputError(f"{value!r:.60}", place=name, expected=f"a list of up to {max_length:,}")
    return value
