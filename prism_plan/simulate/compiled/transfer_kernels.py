"""Messages on the links of the compiled engine: they wait, hold two ports, and free them."""

from __future__ import annotations

from typing import Any

from prism_plan.jit import jit
from prism_plan.simulate.compiled.engine_state import QUEUED, Links
from prism_plan.simulate.compiled.heap import push
from prism_plan.simulate.events import ARRIVED, FREED, RETURNED

Array = Any


@jit
def payload_of(t: Links, message: Any) -> Any:  # pragma: no cover - compiled
    """Bytes of a message on the way that it goes now."""
    return t.m_back[message] if t.m_returning[message] else t.m_out[message]


@jit
def first_port(t: Links, message: Any) -> Any:  # pragma: no cover - compiled
    """Where the ports begin that a message waits for: short ones have some of their own."""
    return len(t.up_rate) if payload_of(t, message) < t.scalars[2] else 0


@jit
def held(t: Links, a: int, b: int, first: int, payload: Any) -> Any:  # pragma: no cover - compiled
    """How long a transfer that begins now holds the uplink of a and the downlink of b.

    ``first`` is that of :func:`first_port`. What is left in the buckets is for whoever is alone.
    """
    now = t.now[0]
    burst = t.scalars[1]
    per_byte = t.seconds_per_byte[a, b]
    other = len(t.up_rate) - first
    if burst == 0 or t.port_busy[0, other + a] or t.port_busy[1, other + b]:
        return payload * per_byte
    bucket = t.bucket
    up = min(burst, bucket[0, a] + (now - bucket[1, a]) * t.up_rate[a])
    down = min(burst, bucket[2, b] + (now - bucket[3, b]) * t.down_rate[b])
    unshaped = min(up, down, float(payload))
    held_s = (payload - unshaped) * per_byte
    bucket[0, a] = min(burst, max(0.0, up + held_s * t.up_rate[a] - payload))
    bucket[1, a] = now + held_s
    bucket[2, b] = min(burst, max(0.0, down + held_s * t.down_rate[b] - payload))
    bucket[3, b] = now + held_s
    return held_s


@jit
def passing(t: Links, a: int, b: int) -> Any:  # pragma: no cover - compiled
    """How long a short message is delayed by the long ones that are under way beside it."""
    left_s = 0.0
    if t.port_busy[0, a]:
        left_s = t.port_until[0, a] - t.now[0]
    if t.port_busy[1, b]:
        left_s = max(left_s, t.port_until[1, b] - t.now[0])
    return min(left_s, t.scalars[2] * t.seconds_per_byte[a, b])


@jit
def begin_transfer(t: Links, message: Any, a: Any, b: Any) -> None:  # pragma: no cover - compiled
    """Hold the uplink of a and the downlink of b, both free, from now on."""
    returning = t.m_returning[message]
    payload = payload_of(t, message)
    first = first_port(t, message)
    t.port_busy[0, first + a] = True
    t.port_busy[1, first + b] = True
    held_s = held(t, a, b, first, payload)
    t.up_busy_s[a] += held_s
    t.down_busy_s[b] += held_s
    t.bytes_out[a] += payload
    t.bytes_in[b] += payload
    end_s = t.now[0] + held_s
    t.port_until[0, first + a] = end_s
    t.port_until[1, first + b] = end_s
    there_s = end_s + t.half_rtt_s[a, b]
    if first:
        there_s += passing(t, a, b)
    kind = RETURNED if returning else ARRIVED
    push(t.heap_s, t.heap_key, t.heap_what, t.number, end_s, t.rank[FREED], FREED, message)
    push(t.heap_s, t.heap_key, t.heap_what, t.number, there_s, t.rank[kind], kind, message)


@jit
def ask(t: Links, message: Any, a: Any, b: Any) -> None:  # pragma: no cover - compiled
    """Begin a transfer, or wait behind all that wait for the uplink of a and the downlink of b."""
    first = first_port(t, message)
    if not t.port_busy[0, first + a] and not t.port_busy[1, first + b]:
        begin_transfer(t, message, a, b)
        return
    t.m_ready[message] = t.number[QUEUED]
    t.number[QUEUED] += 1
    for port in range(2):
        n = first + (a if port == 0 else b)
        last = t.port_last[port, n]
        t.m_next[message, port] = -1
        t.m_before[message, port] = last
        if last < 0:
            t.port_first[port, n] = message
        else:
            t.m_next[last, port] = message
        t.port_last[port, n] = message


@jit
def stop_waiting(t: Links, message: Any, a: Any, b: Any) -> None:  # pragma: no cover - compiled
    """Take a message out of the two queues that it waits in."""
    first = first_port(t, message)
    for port in range(2):
        n = first + (a if port == 0 else b)
        after = t.m_next[message, port]
        before = t.m_before[message, port]
        if before < 0:
            t.port_first[port, n] = after
        else:
            t.m_next[before, port] = after
        if after < 0:
            t.port_last[port, n] = before
        else:
            t.m_before[after, port] = before


@jit
def free_ports(t: Links, freed: Any, a: Any, b: Any) -> None:  # pragma: no cover - compiled
    """A message leaves the uplink of a and the downlink of b: begin what waits, first come first.

    The queues of the two ports are gone through together, in the order in which messages were
    ready, until both ports are taken again.
    """
    first = first_port(t, freed)
    t.port_busy[0, first + a] = False
    t.port_busy[1, first + b] = False
    up = t.port_first[0, first + a]
    down = t.port_first[1, first + b]
    while True:
        if t.port_busy[0, first + a]:
            up = -1
        if t.port_busy[1, first + b]:
            down = -1
        if up < 0 and down < 0:
            return
        up_first = down < 0 or (up >= 0 and t.m_ready[up] <= t.m_ready[down])
        message = up if up_first else down
        if message == up:
            up = t.m_next[up, 0]
        if message == down:
            down = t.m_next[down, 1]
        returning = t.m_returning[message]
        tail = t.m_to[message] if returning else t.m_at[message]
        head = t.m_at[message] if returning else t.m_to[message]
        if not t.port_busy[0, first + tail] and not t.port_busy[1, first + head]:
            stop_waiting(t, message, tail, head)
            begin_transfer(t, message, tail, head)
