"""Messages on the links of the compiled engine: they wait for two ports, hold and release them."""

from __future__ import annotations

from typing import Any

from prism_plan.jit import inline_kernel
from prism_plan.simulate.compiled.engine_state import ENQUEUED, TransferArrays
from prism_plan.simulate.compiled.heap import push_event
from prism_plan.simulate.events import ARRIVED, FREED, RETURNED

Array = Any


@inline_kernel
def payload_bytes(links: TransferArrays, message: Any) -> Any:  # pragma: no cover - compiled
    """Bytes of the transfer that is next or under way: of the message or of its reply."""
    returning = links.message_returning[message]
    return links.reply_bytes[message] if returning else links.message_bytes[message]


@inline_kernel
def port_offset(links: TransferArrays, message: Any) -> Any:  # pragma: no cover - compiled
    """Index of the first port of the message's class: short messages have ports of their own."""
    return len(links.up_bytes_per_s) if payload_bytes(links, message) < links.short_bytes else 0


@inline_kernel
def hold_time_s(  # pragma: no cover - compiled
    links: TransferArrays, a: int, b: int, first: int, payload: Any
) -> Any:
    """Seconds for which a transfer that starts now holds the uplink of a and the downlink of b.

    ``first`` is that of :func:`port_offset`. Only a transfer that has both lines to itself may use
    what is in the token buckets; the others go at the rate of the link.
    """
    now = links.clock_s[0]
    burst = links.burst_bytes
    per_byte = links.seconds_per_byte[a, b]
    other = len(links.up_bytes_per_s) - first
    if burst == 0 or links.port_busy[0, other + a] or links.port_busy[1, other + b]:
        return payload * per_byte
    bucket = links.bucket
    up = min(burst, bucket[0, a] + (now - bucket[1, a]) * links.up_bytes_per_s[a])
    down = min(burst, bucket[2, b] + (now - bucket[3, b]) * links.down_bytes_per_s[b])
    unshaped = min(up, down, float(payload))
    held_s = (payload - unshaped) * per_byte
    bucket[0, a] = min(burst, max(0.0, up + held_s * links.up_bytes_per_s[a] - payload))
    bucket[1, a] = now + held_s
    bucket[2, b] = min(burst, max(0.0, down + held_s * links.down_bytes_per_s[b] - payload))
    bucket[3, b] = now + held_s
    return held_s


@inline_kernel
def long_message_delay_s(  # pragma: no cover - compiled
    links: TransferArrays, a: int, b: int
) -> Any:
    """Seconds by which the long messages under way on the same lines delay a short one."""
    left_s = 0.0
    if links.port_busy[0, a]:
        left_s = links.port_free_s[0, a] - links.clock_s[0]
    if links.port_busy[1, b]:
        left_s = max(left_s, links.port_free_s[1, b] - links.clock_s[0])
    return min(left_s, links.short_bytes * links.seconds_per_byte[a, b])


@inline_kernel
def start_transfer(  # pragma: no cover - compiled
    links: TransferArrays, message: Any, a: Any, b: Any
) -> None:
    """Acquire the uplink of a and the downlink of b, both free, and schedule their release."""
    returning = links.message_returning[message]
    payload = payload_bytes(links, message)
    first = port_offset(links, message)
    links.port_busy[0, first + a] = True
    links.port_busy[1, first + b] = True
    held_s = hold_time_s(links, a, b, first, payload)
    links.up_busy_s[a] += held_s
    links.down_busy_s[b] += held_s
    links.bytes_out[a] += payload
    links.bytes_in[b] += payload
    end_s = links.clock_s[0] + held_s
    links.port_free_s[0, first + a] = end_s
    links.port_free_s[1, first + b] = end_s
    arrival_s = end_s + links.half_rtt_s[a, b]
    if first:
        arrival_s += long_message_delay_s(links, a, b)
    kind = RETURNED if returning else ARRIVED
    heap = links.heap
    push_event(end_s, FREED, message, heap.time_s, heap.key, heap.event, heap.counts, heap.priority)
    push_event(
        arrival_s, kind, message, heap.time_s, heap.key, heap.event, heap.counts, heap.priority
    )


@inline_kernel
def start_or_enqueue(  # pragma: no cover - compiled
    links: TransferArrays, message: Any, a: Any, b: Any
) -> None:
    """Start a transfer, or enqueue it at the uplink of a and the downlink of b."""
    first = port_offset(links, message)
    if not links.port_busy[0, first + a] and not links.port_busy[1, first + b]:
        start_transfer(links, message, a, b)
        return
    links.message_ready[message] = links.counter[ENQUEUED]
    links.counter[ENQUEUED] += 1
    for port in range(2):
        n = first + (a if port == 0 else b)
        last = links.port_queue_tail[port, n]
        links.message_next[message, port] = -1
        links.message_previous[message, port] = last
        if last < 0:
            links.port_queue_head[port, n] = message
        else:
            links.message_next[last, port] = message
        links.port_queue_tail[port, n] = message


@inline_kernel
def dequeue(  # pragma: no cover - compiled
    links: TransferArrays, message: Any, a: Any, b: Any
) -> None:
    """Remove a message from the queues of its two ports."""
    first = port_offset(links, message)
    for port in range(2):
        n = first + (a if port == 0 else b)
        following = links.message_next[message, port]
        previous = links.message_previous[message, port]
        if previous < 0:
            links.port_queue_head[port, n] = following
        else:
            links.message_next[previous, port] = following
        if following < 0:
            links.port_queue_tail[port, n] = previous
        else:
            links.message_previous[following, port] = previous


@inline_kernel
def release_ports(  # pragma: no cover - compiled
    links: TransferArrays, released: Any, a: Any, b: Any
) -> None:
    """Release the uplink of a and the downlink of b, and start the waiting messages that now can.

    The queues of the two ports are walked together, in the order in which messages were ready,
    until both ports are busy again.
    """
    first = port_offset(links, released)
    links.port_busy[0, first + a] = False
    links.port_busy[1, first + b] = False
    up = links.port_queue_head[0, first + a]
    down = links.port_queue_head[1, first + b]
    while True:
        if links.port_busy[0, first + a]:
            up = -1
        if links.port_busy[1, first + b]:
            down = -1
        if up < 0 and down < 0:
            return
        up_first = down < 0 or (up >= 0 and links.message_ready[up] <= links.message_ready[down])
        message = up if up_first else down
        if message == up:
            up = links.message_next[up, 0]
        if message == down:
            down = links.message_next[down, 1]
        returning = links.message_returning[message]
        sender = links.message_to[message] if returning else links.message_from[message]
        receiver = links.message_from[message] if returning else links.message_to[message]
        if not links.port_busy[0, first + sender] and not links.port_busy[1, first + receiver]:
            dequeue(links, message, sender, receiver)
            start_transfer(links, message, sender, receiver)
