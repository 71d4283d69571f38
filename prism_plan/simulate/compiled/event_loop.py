"""The compiled event loop. Plain arithmetic on the arrays of `tables`; no randomness, no objects.

It does what :mod:`prism_plan.simulate.reference_engine` does, in the same order, so that both give
the same events and the same numbers to the last bit. What an event sets off for its request is a
chain of actions: part done → go on → admit the next.
"""

from __future__ import annotations

import numpy as np

from prism_plan.jit import jit
from prism_plan.simulate.compiled.engine_state import (
    FINISHED,
    FREE,
    HEAP,
    LOGGED,
    OPEN_STEPS,
    SEEN,
    TAKEN,
    Fixed,
    Links,
    State,
)  # fmt: skip
from prism_plan.simulate.compiled.heap import KIND_SHIFT, drop_first, push
from prism_plan.simulate.compiled.migration_kernels import begin_steps, hold, step_over
from prism_plan.simulate.compiled.offload_kernels import offloaded
from prism_plan.simulate.compiled.routing_kernels import COVER, NEAREST, cover, mix
from prism_plan.simulate.compiled.transfer_kernels import ask, free_ports
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

#: What :func:`run` says at its end.
ALL, MOST, HEAP_FULL, MESSAGES_FULL, LOG_FULL, UNCOVERED = 0, 1, 2, 3, 4, 5

NOTHING, PART_DONE, GO_ON, ADMIT = 0, 1, 2, 3


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
        kind = heap_what[0] >> KIND_SHIFT
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
                free_ports(t, r, s.m_to[r], s.m_at[r])
            else:
                free_ports(t, r, s.m_at[r], s.m_to[r])

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
