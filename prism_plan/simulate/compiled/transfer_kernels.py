"""Messages on the links of the compiled engine: they wait for two ports, hold and release them."""

from __future__ import annotations

from typing import Any

import numpy as np

from prism_plan.jit import inline_kernel
from prism_plan.kernel_types import int64
from prism_plan.simulate.compiled.engine_state import EngineState, TransferArrays
from prism_plan.simulate.compiled.heap import push_event
from prism_plan.simulate.events import ARRIVED, FREED, RETURNED, SEND

Array = Any


@inline_kernel
def payload_bytes(links: TransferArrays, message: Any) -> Any:  # pragma: no cover - compiled
    """Bytes of the transfer that is next or under way: of the message or of its reply."""
    of = links.messages[message]
    return of.reply_bytes if of.returning else of.payload_bytes


@inline_kernel
def port_offset(links: TransferArrays, payload: Any) -> Any:  # pragma: no cover - compiled
    """Index of the first port for a payload: short messages have ports of their own."""
    return len(links.lines) if payload < links.short_bytes else 0


@inline_kernel
def hold_time_s(  # pragma: no cover - compiled
    links: TransferArrays, a: Any, b: Any, first: int, payload: Any
) -> Any:
    """Seconds for which a transfer that starts now holds the uplink of a and the downlink of b.

    ``first`` is that of :func:`port_offset`. Only a transfer that has both lines to itself may use
    what is in the token buckets; the others go at the rate of the link.
    """
    burst = links.burst_bytes
    per_byte = links.links[a, b].seconds_per_byte
    other = len(links.lines) - first
    if burst == 0 or links.ports[0, other + a].busy or links.ports[1, other + b].busy:
        return payload * per_byte
    now = links.run[0].now_s
    sender, receiver = links.servers[a], links.servers[b]
    up_rate, down_rate = links.lines[a].up_bytes_per_s, links.lines[b].down_bytes_per_s
    up = min(burst, sender.up_bucket_bytes + (now - sender.up_bucket_s) * up_rate)
    down = min(burst, receiver.down_bucket_bytes + (now - receiver.down_bucket_s) * down_rate)
    unshaped = min(up, down, float(payload))
    held_s = (payload - unshaped) * per_byte
    sender.up_bucket_bytes = min(burst, max(0.0, up + held_s * up_rate - payload))
    sender.up_bucket_s = now + held_s
    receiver.down_bucket_bytes = min(burst, max(0.0, down + held_s * down_rate - payload))
    receiver.down_bucket_s = now + held_s
    return held_s


@inline_kernel
def start_transfer(  # pragma: no cover - compiled
    links: TransferArrays, message: Any, a: Any, b: Any
) -> None:
    """Acquire the uplink of a and the downlink of b, both free, and schedule their release."""
    payload = payload_bytes(links, message)
    first = port_offset(links, payload)
    now = links.run[0].now_s
    uplink, downlink = links.ports[0, first + a], links.ports[1, first + b]
    uplink.busy = True
    downlink.busy = True
    held_s = hold_time_s(links, a, b, first, payload)
    sender, receiver = links.servers[a], links.servers[b]
    sender.up_busy_s += held_s
    receiver.down_busy_s += held_s
    sender.bytes_out += payload
    receiver.bytes_in += payload
    end_s = now + held_s
    uplink.free_s = end_s
    downlink.free_s = end_s
    link = links.links[a, b]
    arrival_s = end_s + link.half_rtt_s
    if first:
        # the long messages under way on the same lines delay a short one
        left_s = 0.0
        if links.ports[0, a].busy:
            left_s = links.ports[0, a].free_s - now
        if links.ports[1, b].busy:
            left_s = max(left_s, links.ports[1, b].free_s - now)
        arrival_s += min(left_s, links.short_bytes * link.seconds_per_byte)
    push_event(end_s, int64(FREED), message, links.heap)
    kind = int64(RETURNED) if links.messages[message].returning else int64(ARRIVED)
    push_event(arrival_s, kind, message, links.heap)


@inline_kernel
def start_or_enqueue(  # pragma: no cover - compiled
    links: TransferArrays, message: Any, a: Any, b: Any
) -> None:
    """Start a transfer, or enqueue it at the uplink of a and the downlink of b."""
    first = port_offset(links, payload_bytes(links, message))
    if not links.ports[0, first + a].busy and not links.ports[1, first + b].busy:
        start_transfer(links, message, a, b)
        return
    run = links.run[0]
    links.messages[message].ready = run.enqueued
    run.enqueued += 1
    for way in range(2):
        port = links.ports[way, first + (a if way == 0 else b)]
        own = links.queue_links[message, way]
        last = port.queue_tail
        own.next = -1
        own.previous = last
        if last < 0:
            port.queue_head = message
        else:
            links.queue_links[last, way].next = message
        port.queue_tail = message


@inline_kernel
def dequeue(  # pragma: no cover - compiled
    links: TransferArrays, message: Any, a: Any, b: Any
) -> None:
    """Remove a message from the queues of its two ports."""
    first = port_offset(links, payload_bytes(links, message))
    for way in range(2):
        port = links.ports[way, first + (a if way == 0 else b)]
        following = links.queue_links[message, way].next
        previous = links.queue_links[message, way].previous
        if previous < 0:
            port.queue_head = following
        else:
            links.queue_links[previous, way].next = following
        if following < 0:
            port.queue_tail = previous
        else:
            links.queue_links[following, way].previous = previous


@inline_kernel
def release_ports(  # pragma: no cover - compiled
    links: TransferArrays, released: Any, a: Any, b: Any
) -> None:
    """Release the uplink of a and the downlink of b, and start the waiting messages that now can.

    The queues of the two ports are walked together, in the order in which messages were ready,
    until both ports are busy again.
    """
    first = port_offset(links, payload_bytes(links, released))
    uplink, downlink = links.ports[0, first + a], links.ports[1, first + b]
    uplink.busy = False
    downlink.busy = False
    up = uplink.queue_head
    down = downlink.queue_head
    while True:
        if uplink.busy:
            up = np.int32(-1)
        if downlink.busy:
            down = np.int32(-1)
        if up < 0 and down < 0:
            return
        up_first = down < 0 or (up >= 0 and links.messages[up].ready <= links.messages[down].ready)
        message = int64(up if up_first else down)
        if message == up:
            up = links.queue_links[message, 0].next
        if message == down:
            down = links.queue_links[message, 1].next
        of = links.messages[message]
        sender = of.receiver if of.returning else of.sender
        receiver = of.sender if of.returning else of.receiver
        if not links.ports[0, first + sender].busy and not links.ports[1, first + receiver].busy:
            dequeue(links, message, sender, receiver)
            start_transfer(links, message, sender, receiver)


@inline_kernel
def send_hop(  # pragma: no cover - compiled
    state: EngineState, request: Any, layer: Any, a: Any, b: Any, payload: Any, kind: Any,
    begins_pass: bool, ready_s: float,
) -> None:  # fmt: skip
    """Send hidden states or token ids of a request, ready for the link at ``ready_s``."""
    run = state.run[0]
    run.free_messages -= 1
    message = int64(state.free_messages[run.free_messages])
    of = state.messages[message]
    of.request = request
    of.layer = layer
    of.sender = a
    of.receiver = b
    of.payload_bytes = payload
    of.kind = kind
    of.begins_pass = begins_pass
    of.returning = False
    state.hops_sent[a, b] += 1
    push_event(ready_s, int64(SEND), message, state.heap)
