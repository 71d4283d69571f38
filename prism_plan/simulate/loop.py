"""The compiled event loop. Plain arithmetic on the arrays of `tables`; no randomness, no objects.

It does what :mod:`prism_plan.simulate.reference` does, in the same order, so that both give the
same events and the same numbers to the last bit. What an event sets off for its request is a chain
of actions: part done → go on → admit the next.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from prism_plan.jit import jit
from prism_plan.simulate.events import (
    ARRIVAL,
    ARRIVED,
    COMPUTED,
    DENSE,
    FREED,
    LOADED,
    LOCAL,
    RETURNED,
    SEND,
)  # fmt: skip
from prism_plan.simulate.network import BYTES_PER_CALL
from prism_plan.simulate.tables import (
    ERROR,
    FINISHED,
    FREE,
    HEAP,
    LOADED_BYTES,
    LOADS,
    LOGGED,
    OPEN_STEPS,
    PUSHED,
    QUEUED,
    SEEN,
    TAKEN,
    Fixed,
    Links,
    State,
)  # fmt: skip

Array = Any

#: What :func:`run` says at its end.
ALL, MOST, HEAP_FULL, MESSAGES_FULL, LOG_FULL, UNCOVERED = 0, 1, 2, 3, 4, 5

NOTHING, PART_DONE, GO_ON, ADMIT = 0, 1, 2, 3
COVER, NEAREST = 0, 1

_NUMBER_BITS = 56
_KIND_SHIFT = 32


@jit
def push(  # pragma: no cover - compiled
    heap_s: Array, heap_key: Array, heap_what: Array, number: Array, time_s: float, rank: int,
    kind: int, subject: Any,
) -> None:  # fmt: skip
    """Add an event to the heap."""
    key = (np.int64(rank) << _NUMBER_BITS) | number[PUSHED]
    what = (np.int64(kind) << _KIND_SHIFT) | np.int64(subject)
    number[PUSHED] += 1
    i = number[HEAP]
    number[HEAP] += 1
    while i > 0:
        above = (i - 1) >> 2
        if heap_s[above] < time_s or (heap_s[above] == time_s and heap_key[above] < key):
            break
        heap_s[i] = heap_s[above]
        heap_key[i] = heap_key[above]
        heap_what[i] = heap_what[above]
        i = above
    heap_s[i] = time_s
    heap_key[i] = key
    heap_what[i] = what


@jit
def drop_first(  # pragma: no cover - compiled
    heap_s: Array, heap_key: Array, heap_what: Array, number: Array
) -> None:
    """Take the first event out of the heap (of four children a node)."""
    number[HEAP] -= 1
    size = number[HEAP]
    if size == 0:
        return
    time_s = heap_s[size]
    key = heap_key[size]
    what = heap_what[size]
    i = 0
    while True:
        first = 4 * i + 1
        if first >= size:
            break
        least = first
        last = min(first + 4, size)
        for child in range(first + 1, last):
            if heap_s[child] < heap_s[least] or (
                heap_s[child] == heap_s[least] and heap_key[child] < heap_key[least]
            ):
                least = child
        if time_s < heap_s[least] or (time_s == heap_s[least] and key < heap_key[least]):
            break
        heap_s[i] = heap_s[least]
        heap_key[i] = heap_key[least]
        heap_what[i] = heap_what[least]
        i = least
    heap_s[i] = time_s
    heap_key[i] = key
    heap_what[i] = what


@jit
def mix(request: Any, pair: Any) -> Any:  # pragma: no cover - compiled
    """See :func:`prism_plan.simulate.routes.mix`."""
    x = np.uint64(request) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(pair) + np.uint64(1)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@jit
def cover(  # pragma: no cover - compiled
    few: Array, missing: int, holder: Array, copies: Array, sent: Array, mask: Array,
    goals: Array, best: Array,
) -> None:  # fmt: skip
    """Servers ``few[1, :missing]`` for the pairs ``few[0, :missing]``, as `routes.cover` does.

    Of servers that hold the same of the missing experts only the best counts. The least cost of
    covering each subset of the experts follows from smaller subsets: some server must hold its
    first expert. Cost: servers, then tokens sent, in one number.
    """
    if missing == 1:
        pair = few[0, 0]
        chosen = holder[pair, 0]
        for i in range(1, copies[pair]):
            if sent[holder[pair, i]] < sent[chosen]:
                chosen = holder[pair, i]
        few[1, 0] = chosen
        return
    candidates = 0
    for k in range(missing):
        pair = few[0, k]
        for i in range(copies[pair]):
            m = holder[pair, i]
            if mask[m] == 0:
                goals[candidates] = m
                candidates += 1
            mask[m] |= 1 << k
    full = (1 << missing) - 1
    server, cost, kinds = best[0], best[1], best[2]
    for u in range(full + 1):
        server[u] = -1
    number = 0
    for i in range(candidates):
        m = goals[i]
        own = mask[m]
        mask[m] = 0
        known = server[own]
        if known < 0:
            kinds[number] = own
            number += 1
        if known < 0 or sent[m] < sent[known] or (sent[m] == sent[known] and m < known):
            server[own] = m
    cost[0] = 0
    one = np.int64(1) << 48
    for u in range(1, full + 1):
        low = u & -u
        least = np.int64(1) << 62
        for i in range(number):
            own = kinds[i]
            if own & low:
                total = one + sent[server[own]] + cost[u & ~own]
                if total < least:
                    least = total
        cost[u] = least
    u = full
    while u:
        low = u & -u
        chosen = -1
        taken = 0
        for i in range(number):
            own = kinds[i]
            on_best = own & low and one + sent[server[own]] + cost[u & ~own] == cost[u]
            if on_best and (chosen < 0 or server[own] < chosen):
                chosen = server[own]
                taken = own
        for k in range(missing):
            if u & taken & (1 << k):
                few[1, k] = chosen
        u &= ~taken


@jit
def held(t: Links, a: int, b: int, payload: Any) -> Any:  # pragma: no cover - compiled
    """How long a transfer that begins now holds the uplink of a and the downlink of b."""
    now = t.now[0]
    burst = t.scalars[1]
    per_byte = t.seconds_per_byte[a, b]
    if burst == 0:
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
def begin_transfer(t: Links, message: Any, a: Any, b: Any) -> None:  # pragma: no cover - compiled
    """Hold the uplink of a and the downlink of b, both free, from now on."""
    returning = t.m_returning[message]
    payload = t.m_back[message] if returning else t.m_out[message]
    t.port_busy[0, a] = True
    t.port_busy[1, b] = True
    held_s = held(t, a, b, payload)
    t.up_busy_s[a] += held_s
    t.down_busy_s[b] += held_s
    t.bytes_out[a] += payload
    t.bytes_in[b] += payload
    end_s = t.now[0] + held_s
    kind = RETURNED if returning else ARRIVED
    push(t.heap_s, t.heap_key, t.heap_what, t.number, end_s, t.rank[FREED], FREED, message)
    push(t.heap_s, t.heap_key, t.heap_what, t.number, end_s + t.half_rtt_s[a, b], t.rank[kind],
         kind, message)  # fmt: skip


@jit
def ask(t: Links, message: Any, a: Any, b: Any) -> None:  # pragma: no cover - compiled
    """Begin a transfer, or wait behind all that wait for the uplink of a and the downlink of b."""
    if not t.port_busy[0, a] and not t.port_busy[1, b]:
        begin_transfer(t, message, a, b)
        return
    t.m_ready[message] = t.number[QUEUED]
    t.number[QUEUED] += 1
    for port in range(2):
        n = a if port == 0 else b
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
    for port in range(2):
        n = a if port == 0 else b
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
def free_ports(t: Links, a: Any, b: Any) -> None:  # pragma: no cover - compiled
    """The uplink of a and the downlink of b are free: begin what waits for them, first come first.

    The queues of the two ports are gone through together, in the order in which messages were
    ready, until both ports are taken again.
    """
    t.port_busy[0, a] = False
    t.port_busy[1, b] = False
    up = t.port_first[0, a]
    down = t.port_first[1, b]
    while (up >= 0 and not t.port_busy[0, a]) or (down >= 0 and not t.port_busy[1, b]):
        if t.port_busy[0, a]:
            up = -1
        if t.port_busy[1, b]:
            down = -1
        up_first = down < 0 or (up >= 0 and t.m_ready[up] <= t.m_ready[down])
        message = up if up_first else down
        if message == up:
            up = t.m_next[up, 0]
        if message == down:
            down = t.m_next[down, 1]
        returning = t.m_returning[message]
        tail = t.m_to[message] if returning else t.m_at[message]
        head = t.m_at[message] if returning else t.m_to[message]
        if not t.port_busy[0, tail] and not t.port_busy[1, head]:
            stop_waiting(t, message, tail, head)
            begin_transfer(t, message, tail, head)


@jit
def hold(  # pragma: no cover - compiled
    g: int, pair: int, held: Array, gpu_of: Array, holder: Array, copies: Array, gpu_start: Array,
    n: int,
) -> None:  # fmt: skip
    """GPU g of server n has a pair from now on."""
    held[g, pair] = True
    if gpu_of[n, pair] < 0:
        i = copies[pair]
        while i > 0 and holder[pair, i - 1] > n:
            holder[pair, i] = holder[pair, i - 1]
            i -= 1
        holder[pair, i] = n
        copies[pair] += 1
        gpu_of[n, pair] = g
    elif g < gpu_of[n, pair]:
        gpu_of[n, pair] = g


@jit
def let_go(  # pragma: no cover - compiled
    g: int, pair: int, held: Array, gpu_of: Array, holder: Array, copies: Array, gpu_start: Array,
    n: int,
) -> None:  # fmt: skip
    """GPU g of server n has a pair no longer."""
    if not held[g, pair]:
        return
    held[g, pair] = False
    gpu_of[n, pair] = -1
    for other in range(gpu_start[n], gpu_start[n + 1]):
        if held[other, pair]:
            gpu_of[n, pair] = other
            return
    i = 0
    while holder[pair, i] != n:
        i += 1
    copies[pair] -= 1
    while i < copies[pair]:
        holder[pair, i] = holder[pair, i + 1]
        i += 1


@jit
def begin_steps(f: Fixed, s: State, waiting: int) -> bool:  # pragma: no cover - compiled
    """Begin the ``waiting`` steps in ``step_queue`` and what follows; False: a pair was lost."""
    experts = f.sizes[0]
    now = s.now[0]
    i = 0
    while i < waiting:
        index = s.step_queue[i]
        i += 1
        g = s.step_gpu[index]
        pair = s.step_pair[index]
        if s.step_load[index]:
            load_s = f.load_s[g, pair // experts]
            begin_s = max(now, s.load_free[g])
            if f.blocks[g]:
                begin_s = max(begin_s, s.gpu_free[g])
                s.gpu_free[g] = begin_s + load_s
                s.gpu_busy_s[g] += load_s
            s.load_free[g] = begin_s + load_s
            s.number[LOADS] += 1
            s.number[LOADED_BYTES] += f.expert_bytes[pair // experts]
            push(s.heap_s, s.heap_key, s.heap_what, s.number, begin_s + load_s, f.rank[LOADED],
                 LOADED, index)  # fmt: skip
            continue
        let_go(g, pair, s.held, s.gpu_of, s.holder, s.copies, f.gpu_start, f.server[g])
        if s.copies[pair] == 0:
            s.number[ERROR] = index
            return False
        waiting = step_over(s, index, waiting)
    return True


@jit
def step_over(s: State, index: int, waiting: int) -> int:  # pragma: no cover - compiled
    """Queue the steps that lacked only this one behind the ``waiting``; returns their number."""
    s.number[OPEN_STEPS] -= 1
    if s.number[OPEN_STEPS] == 0:
        s.now[1] = s.now[0]
    for i in range(s.step_start[index], s.step_start[index + 1]):
        other = s.step_next[i]
        s.step_lacking[other] -= 1
        if s.step_lacking[other] == 0:
            s.step_queue[waiting] = other
            waiting += 1
    return waiting


@jit
def offloaded(  # pragma: no cover - compiled
    f: Fixed, s: State, at: int, layer: int
) -> float:
    """Compute resident experts, then load and compute the others; see the reference engine."""
    now = s.now[0]
    first = layer * f.sizes[0]
    end_s = 0.0
    for missing in range(2):
        for i in range(s.touched[at]):
            e = s.order[at, i]
            tokens = s.count[at, e]
            if tokens == 0:  # it was resident, and is done
                continue
            slot = s.slot_of[at, first + e]
            if missing == 0:
                if slot < 0:
                    continue
                s.count[at, e] = 0
                g = s.slot_gpu[slot]
                work_s = f.expert_s[f.kind[g], f.size[layer], tokens]
                done_s = max(now, s.gpu_free[g]) + work_s
            else:
                slot = np.int32(s.slot_first[at])
                for other in range(s.slot_first[at] + 1, s.slot_first[at + 1]):
                    if s.slot_end[other] < s.slot_end[slot]:
                        slot = np.int32(other)
                g = s.slot_gpu[slot]
                load_s = f.load_s[g, layer]
                begin_s = max(now, s.load_free[g], s.slot_end[slot])
                if f.blocks[g]:
                    begin_s = max(begin_s, s.gpu_free[g])
                    s.gpu_free[g] = begin_s + load_s
                    s.gpu_busy_s[g] += load_s
                loaded_s = begin_s + load_s
                s.load_free[g] = loaded_s
                work_s = f.expert_s[f.kind[g], f.size[layer], tokens]
                done_s = max(loaded_s, s.gpu_free[g]) + work_s
                if s.slot_pair[slot] >= 0:
                    s.slot_of[at, s.slot_pair[slot]] = -1
                s.slot_pair[slot] = first + e
                s.slot_of[at, first + e] = slot
                s.number[LOADS] += 1
                s.number[LOADED_BYTES] += f.expert_bytes[layer]
            s.gpu_free[g] = done_s
            s.gpu_busy_s[g] += work_s
            s.served[g] += tokens
            s.slot_end[slot] = done_s
            end_s = max(end_s, done_s)
    return end_s


@jit
def run(
    f: Fixed, s: State, t: Links, until_s: float, most: int
) -> int:  # pragma: no cover - compiled
    """Take the events up to ``until_s``, at most ``most``; returns why it ended."""
    # by local names: looked up in the tuple inside the loop, arrays cost three times as much
    experts, token_bytes, route, offload = f.sizes[0], f.sizes[1], f.sizes[2], f.sizes[3] == 1
    overhead_s = f.scalars[0]
    servers, layers = f.execution.shape
    top_k = f.experts.shape[2]
    rows_of, home_of, rank = f.experts, f.home, f.rank
    kind_of, size_of, dense_s, expert_s = f.kind, f.size, f.dense_s, f.expert_s
    gpu_start = f.gpu_start
    number, heap_s, heap_key, heap_what = s.number, s.heap_s, s.heap_key, s.heap_what
    gpu_free, gpu_busy_s, served = s.gpu_free, s.gpu_busy_s, s.served
    gpu_of, holder, copies, sent = s.gpu_of, s.holder, s.copies, s.sent
    count, order, touched, tokens_to = s.count, s.order, s.touched, s.tokens_to
    goals, few, called = s.goals, s.few, s.called
    m_work = s.m_work
    logging = len(s.log_s) > 0
    taken = 0
    while number[HEAP] > 0:
        now = heap_s[0]
        if now > until_s:
            break
        if taken >= most:
            return MOST
        if len(heap_s) - number[HEAP] < servers + 8 + number[OPEN_STEPS]:
            return HEAP_FULL
        if number[FREE] < servers + 1:
            return MESSAGES_FULL
        if logging and number[LOGGED] == len(s.log_s):
            return LOG_FULL
        kind = heap_what[0] >> _KIND_SHIFT
        subject = heap_what[0] & 0xFFFFFFFF
        drop_first(heap_s, heap_key, heap_what, number)
        s.now[0] = now
        taken += 1
        number[TAKEN] += 1
        if logging:
            line = number[LOGGED]
            number[LOGGED] += 1
            s.log_s[line] = now
            what = s.log_what[line]
            what[0] = kind
            if kind == ARRIVAL:
                what[1], what[2], what[3], what[4] = subject, -1, home_of[subject], home_of[subject]
            elif kind == LOADED:
                g = s.step_gpu[subject]
                what[1], what[2], what[3], what[4] = -1, -1, f.server[g], g
            elif kind in (DENSE, LOCAL):
                what[1], what[2] = subject, s.layer[subject]
                what[3], what[4] = s.at[subject], s.at[subject]
            else:
                what[1], what[2] = s.m_request[subject], s.m_layer[subject]
                what[3], what[4] = s.m_at[subject], s.m_to[subject]
        action = NOTHING
        r = np.int64(subject)

        if kind == DENSE:
            # -------------------------------------------------------------- route the step's tokens
            at = s.at[r]
            home = home_of[r]
            layer = s.layer[r]
            first = layer * experts
            row = s.row[r]
            tokens = s.tokens[r]
            remote = 0
            for token in range(row, row + tokens):
                missing = 0
                for k in range(top_k):
                    e = np.int64(rows_of[token, layer, k])
                    called[home, layer, e] += 1
                    if offload or gpu_of[at, first + e] >= 0:
                        if count[at, e] == 0:
                            order[at, touched[at]] = e
                            touched[at] += 1
                        count[at, e] += 1
                    else:
                        few[0, missing] = first + e
                        missing += 1
                if missing == 0:
                    continue
                remote += missing
                if route == COVER:
                    cover(few, missing, holder, copies, sent[at], s.mask, goals, s.best)
                elif route == NEAREST:
                    for k in range(missing):
                        pair = few[0, k]
                        chosen = holder[pair, 0]
                        for i in range(1, copies[pair]):
                            if f.link_rank[at, holder[pair, i]] < f.link_rank[at, chosen]:
                                chosen = holder[pair, i]
                        few[1, k] = chosen
                else:
                    for k in range(missing):
                        pair = few[0, k]
                        which = mix(r, pair) % np.uint64(copies[pair])
                        few[1, k] = holder[pair, np.int64(which)]
                different = 0
                for k in range(missing):
                    m = few[1, k]
                    e = few[0, k] - first
                    if count[m, e] == 0:
                        order[m, touched[m]] = e
                        touched[m] += 1
                    count[m, e] += 1
                    again = False
                    for before in range(k):
                        if few[1, before] == m:
                            again = True
                    if not again:
                        different += 1
                        tokens_to[m] += 1
                        sent[at, m] += 1
                s.waiting[home] += 1
                s.destinations[home] += different
            s.calls[home] += tokens * top_k
            s.remote_calls[home] += remote
            s.steps[home] += tokens
            s.remote[r] = remote
            parts = 0
            if touched[at] > 0:
                parts = 1
                if offload:
                    end_s = offloaded(f, s, at, layer)
                else:
                    end_s = 0.0
                    work = m_work[s.m_free[number[FREE] - 1]]  # an unused message's, as scratch
                    for i in range(touched[at]):
                        e = order[at, i]
                        g = gpu_of[at, first + e]
                        local_gpu = g - gpu_start[at]
                        if work[local_gpu] < 0:
                            work[local_gpu] = 0.0
                        work[local_gpu] += expert_s[kind_of[g], size_of[layer], count[at, e]]
                        served[g] += count[at, e]
                    for g in range(gpu_start[at], gpu_start[at + 1]):
                        work_s = work[g - gpu_start[at]]
                        if work_s >= 0:
                            gpu_free[g] = max(now, gpu_free[g]) + work_s
                            gpu_busy_s[g] += work_s
                            end_s = max(end_s, gpu_free[g])
                            work[g - gpu_start[at]] = -1.0
                push(heap_s, heap_key, heap_what, number, end_s, rank[LOCAL], LOCAL, r)
                for i in range(touched[at]):
                    count[at, order[at, i]] = 0
                touched[at] = 0
            if remote > 0:
                for m in range(servers):
                    if tokens_to[m] == 0:
                        continue
                    parts += 1
                    number[FREE] -= 1
                    message = s.m_free[number[FREE]]
                    work = m_work[message]
                    named = 0
                    for i in range(touched[m]):
                        e = order[m, i]
                        g = gpu_of[m, first + e]
                        remote_gpu = g - gpu_start[m]
                        if work[remote_gpu] < 0:
                            work[remote_gpu] = 0.0
                        work[remote_gpu] += expert_s[kind_of[g], size_of[layer], count[m, e]]
                        served[g] += count[m, e]
                        named += count[m, e]
                        count[m, e] = 0
                    touched[m] = 0
                    states = tokens_to[m] * token_bytes
                    tokens_to[m] = 0
                    s.m_request[message] = r
                    s.m_layer[message] = layer
                    s.m_at[message] = at
                    s.m_to[message] = m
                    s.m_out[message] = states + BYTES_PER_CALL * named
                    s.m_back[message] = states
                    s.m_hop[message] = False
                    s.m_returning[message] = False
                    s.messages[at, m] += 1
                    push(heap_s, heap_key, heap_what, number, now + overhead_s, rank[SEND], SEND,
                         message)  # fmt: skip
            s.parts[r] = parts

        elif kind == LOCAL:
            action = PART_DONE

        elif kind == SEND:
            ask(t, r, s.m_at[r], s.m_to[r])

        elif kind == FREED:
            if s.m_returning[r]:
                free_ports(t, s.m_to[r], s.m_at[r])
            else:
                free_ports(t, s.m_at[r], s.m_to[r])

        elif kind == ARRIVED:
            m = s.m_to[r]
            if s.m_hop[r]:
                s.m_free[number[FREE]] = r
                number[FREE] += 1
                r = np.int64(s.m_request[r])
                s.at[r] = m
                action = GO_ON
            else:
                end_s = 0.0
                work = m_work[r]
                for g in range(gpu_start[m], gpu_start[m + 1]):
                    work_s = work[g - gpu_start[m]]
                    if work_s >= 0:
                        gpu_free[g] = max(now, gpu_free[g]) + work_s
                        gpu_busy_s[g] += work_s
                        end_s = max(end_s, gpu_free[g])
                        work[g - gpu_start[m]] = -1.0
                push(heap_s, heap_key, heap_what, number, end_s, rank[COMPUTED], COMPUTED, r)

        elif kind == COMPUTED:
            s.m_returning[r] = True
            ask(t, r, s.m_to[r], s.m_at[r])

        elif kind == RETURNED:
            s.m_free[number[FREE]] = r
            number[FREE] += 1
            r = np.int64(s.m_request[r])
            action = PART_DONE

        elif kind == ARRIVAL:
            number[SEEN] += 1
            if number[SEEN] < len(home_of):
                push(heap_s, heap_key, heap_what, number, f.arrival_s[number[SEEN]],
                     rank[ARRIVAL], ARRIVAL, number[SEEN])  # fmt: skip
            home = home_of[r]
            s.present_s[home] += s.present[home] * (now - s.present_since[home])
            s.present_since[home] = now
            s.present[home] += 1
            if s.active[home] < f.concurrency[home]:
                action = ADMIT
            elif s.head[home] < 0:
                s.head[home] = r
                s.tail[home] = r
            else:
                s.next_waiting[s.tail[home]] = r
                s.tail[home] = r

        else:  # LOADED
            g = s.step_gpu[subject]
            hold(g, s.step_pair[subject], s.held, gpu_of, holder, copies, gpu_start, f.server[g])
            if not begin_steps(f, s, step_over(s, subject, 0)):
                return UNCOVERED

        # ------------------------------------------------------ what follows for the request
        while action != NOTHING:
            if action == PART_DONE:
                s.parts[r] -= 1
                action = NOTHING
                if s.parts[r] == 0:
                    if s.decoding[r]:
                        s.layer_steps[s.remote[r]] += 1
                        s.layer_s[s.remote[r]] += now - s.began_s[r]
                    s.layer[r] += 1
                    s.began_s[r] = now
                    action = GO_ON
            elif action == ADMIT:
                home = home_of[r]
                prompt = f.prompt[r]
                prefill = f.prefill[prompt]
                s.active[home] += 1
                s.start_s[r] = now
                s.at[r] = home
                s.row[r] = f.first_row[prompt]
                s.tokens[r] = prefill if prefill > 0 else 1
                s.left[r] = f.decode[prompt] + (1 if prefill > 0 else 0)
                s.decoding[r] = prefill == 0
                s.layer[r] = 0
                s.began_s[r] = now
                action = GO_ON
            else:
                action = NOTHING
                home = home_of[r]
                at = s.at[r]
                over = s.layer[r] == layers
                target = home if over else f.execution[home, s.layer[r]]
                if at != target:
                    number[FREE] -= 1
                    message = s.m_free[number[FREE]]
                    s.m_request[message] = r
                    s.m_layer[message] = s.layer[r]
                    s.m_at[message] = at
                    s.m_to[message] = target
                    s.m_out[message] = s.tokens[r] * token_bytes
                    s.m_hop[message] = True
                    s.m_returning[message] = False
                    push(heap_s, heap_key, heap_what, number, now + overhead_s, rank[SEND], SEND,
                         message)  # fmt: skip
                elif not over:
                    g = f.dense_gpu[at]
                    work_s = dense_s[kind_of[g], s.tokens[r]]
                    gpu_free[g] = max(now, gpu_free[g]) + work_s
                    gpu_busy_s[g] += work_s
                    push(heap_s, heap_key, heap_what, number, gpu_free[g], rank[DENSE], DENSE, r)
                else:
                    if np.isnan(s.first_token_s[r]):
                        s.first_token_s[r] = now
                    s.left[r] -= 1
                    if s.left[r] > 0:
                        s.row[r] += s.tokens[r]
                        s.tokens[r] = 1
                        s.decoding[r] = True
                        s.layer[r] = 0
                        s.began_s[r] = now
                        action = GO_ON
                    else:
                        s.done_s[r] = now
                        number[FINISHED] += 1
                        s.present_s[home] += s.present[home] * (now - s.present_since[home])
                        s.present_since[home] = now
                        s.present[home] -= 1
                        s.active[home] -= 1
                        if s.head[home] >= 0:
                            r = np.int64(s.head[home])
                            s.head[home] = s.next_waiting[r]
                            action = ADMIT
    return ALL
