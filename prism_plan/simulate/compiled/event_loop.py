"""The compiled event loop: arithmetic on the arrays of `engine_state`, no randomness, no objects.

It does what :mod:`prism_plan.simulate.reference_engine` does, in the same order, so that both give
the same events and the same numbers to the last bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from prism_plan.jit import kernel
from prism_plan.simulate.compiled.engine_state import (
    FINISHED,
    FREE_MESSAGES,
    LATEST_ARRIVAL,
    LOG_LINES,
    NEW_STEPS,
    OPEN_STEPS,
    PROCESSED,
    EngineState,
    ScenarioArrays,
    TransferArrays,
)
from prism_plan.simulate.compiled.heap import KIND_SHIFT, push_event, remove_first_event
from prism_plan.simulate.compiled.migration_kernels import add_replica, complete_step, start_steps
from prism_plan.simulate.compiled.offload_kernels import compute_with_offload
from prism_plan.simulate.compiled.transfer_kernels import release_ports, start_or_enqueue
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
)
from prism_plan.simulate.network import BYTES_PER_CALL
from prism_plan.simulate.routing_policies import choose_holders

#: Why :func:`run_events` returned.
NO_EVENT_LEFT, LIMIT_REACHED, HEAP_FULL, MESSAGES_FULL, LOG_FULL, LAST_REPLICA_DROPPED = range(6)
#: What an event causes next for its request.
NOTHING, COMPLETE_PART, ENTER_LAYER, ADMIT = range(4)


@kernel
def run_events(  # pragma: no cover - compiled
    scenario: ScenarioArrays, state: EngineState, links: TransferArrays, until_s: float,
    max_events: int,
) -> int:  # fmt: skip
    """Start the steps of a new migration, then process events; return why it ended.

    Events up to ``until_s`` are processed, at most ``max_events``.

    An event may cause a chain of actions for its request: a part of a layer is complete, the
    request enters the next layer, another request is admitted. This is one long function because
    split into helpers it ran 1.9 times slower, with helpers that are called and with inlined ones.
    """
    # local names: looked up in the tuples inside the loop, arrays cost three times as much
    experts, token_bytes = scenario.num_experts, scenario.token_bytes
    route, offload = scenario.route, scenario.offload
    overhead_s = scenario.call_overhead_s
    servers, layers = scenario.execution.shape
    top_k = scenario.experts.shape[2]
    rows_of, home_of = scenario.experts, scenario.home
    kind_of, size_of = scenario.gpu_kind, scenario.size_class
    dense_s, expert_s, gpu_start = scenario.dense_s, scenario.expert_s, scenario.gpu_start
    counter, heap = state.counter, state.heap
    heap_s, heap_key, heap_event = heap.time_s, heap.key, heap.event
    heap_counts, priority = heap.counts, heap.priority
    gpu_free_s, gpu_busy_s, served = state.gpu_free_s, state.gpu_busy_s, state.served
    first_gpu, holders, num_replicas = state.first_gpu, state.holders, state.num_replicas
    token_count, expert_order = state.token_count, state.expert_order
    distinct_experts, tokens_to = state.distinct_experts, state.tokens_to
    tokens_sent, missing_experts = state.tokens_sent, state.missing_experts
    link_rank, held_mask = scenario.link_rank, state.held_mask
    candidate_servers, cover_table = state.candidate_servers, state.cover_table
    recent_calls, message_work_s = state.recent_calls, state.message_work_s
    logging = len(state.log_s) > 0
    processed = 0
    if counter[NEW_STEPS] > 0:
        num_ready = counter[NEW_STEPS]
        counter[NEW_STEPS] = 0
        if not start_steps(scenario, state, num_ready):
            return LAST_REPLICA_DROPPED
    while heap_counts[0] > 0:
        now = heap_s[0]
        if now > until_s:
            break
        if processed >= max_events:
            return LIMIT_REACHED
        if len(heap_s) - heap_counts[0] < servers + 8 + counter[OPEN_STEPS]:
            return HEAP_FULL
        if counter[FREE_MESSAGES] < servers + 1:
            return MESSAGES_FULL
        if logging and counter[LOG_LINES] == len(state.log_s):
            return LOG_FULL
        kind = heap_event[0] >> KIND_SHIFT
        subject = heap_event[0] & 0xFFFFFFFF
        remove_first_event(heap_s, heap_key, heap_event, heap_counts)
        state.clock_s[0] = now
        processed += 1
        counter[PROCESSED] += 1
        if logging:
            line = counter[LOG_LINES]
            counter[LOG_LINES] += 1
            state.log_s[line] = now
            fields = state.log_event[line]
            fields[0] = kind
            if kind == ARRIVAL:
                home = home_of[subject]
                fields[1], fields[2], fields[3], fields[4] = subject, -1, home, home
            elif kind == LOADED:
                g = state.step_gpu[subject]
                fields[1], fields[2], fields[3], fields[4] = -1, -1, scenario.server_of_gpu[g], g
            elif kind in (DENSE, LOCAL):
                fields[1], fields[2] = subject, state.layer[subject]
                fields[3], fields[4] = state.location[subject], state.location[subject]
            else:
                fields[1], fields[2] = state.message_request[subject], state.message_layer[subject]
                fields[3], fields[4] = state.message_from[subject], state.message_to[subject]
        action = NOTHING
        r = np.int64(subject)

        if kind == DENSE:
            # -------------------------------------------------------------- route the step's tokens
            at = state.location[r]
            home = home_of[r]
            layer = state.layer[r]
            first = layer * experts
            row = state.token_row[r]
            tokens = state.step_tokens[r]
            remote = 0
            for token in range(row, row + tokens):
                missing: Any = np.int64(0)
                for k in range(top_k):
                    e = np.uint64(rows_of[token, layer, k])
                    recent_calls[home, layer, e] += 1
                    if offload or first_gpu[at, np.uint64(first) + e] >= 0:
                        if token_count[at, e] == 0:
                            expert_order[at, distinct_experts[at]] = e
                            distinct_experts[at] += 1
                        token_count[at, e] += 1
                    else:
                        missing_experts[0, missing] = first + np.int64(e)
                        missing += 1
                if missing == 0:
                    continue
                remote += missing
                choose_holders(
                    route, r, missing_experts, missing, holders, num_replicas, tokens_sent[at],
                    link_rank[at], held_mask, candidate_servers, cover_table,
                )  # fmt: skip
                num_servers = 0
                for k in range(missing):
                    m = missing_experts[1, k]
                    e = missing_experts[0, k] - first
                    if token_count[m, e] == 0:
                        expert_order[m, distinct_experts[m]] = e
                        distinct_experts[m] += 1
                    token_count[m, e] += 1
                    seen = False
                    for before in range(k):
                        if missing_experts[1, before] == m:
                            seen = True
                    if not seen:
                        num_servers += 1
                        tokens_to[m] += 1
                        tokens_sent[at, m] += 1
                state.waiting[home] += 1
                state.destinations[home] += num_servers
            state.calls[home] += tokens * top_k
            state.remote_calls[home] += remote
            state.steps[home] += tokens
            state.remote_experts[r] = remote
            parts = 0
            if distinct_experts[at] > 0:
                parts = 1
                if offload:
                    end_s = compute_with_offload(scenario, state, at, layer)
                else:
                    end_s = 0.0
                    # the entry of an unused message serves as working memory
                    work = message_work_s[state.free_messages[counter[FREE_MESSAGES] - 1]]
                    for i in range(distinct_experts[at]):
                        e = expert_order[at, i]
                        g = first_gpu[at, first + e]
                        local_gpu = g - gpu_start[at]
                        if work[local_gpu] < 0:
                            work[local_gpu] = 0.0
                        work[local_gpu] += expert_s[kind_of[g], size_of[layer], token_count[at, e]]
                        served[g] += token_count[at, e]
                    for g in range(gpu_start[at], gpu_start[at + 1]):
                        work_s = work[g - gpu_start[at]]
                        if work_s >= 0:
                            gpu_free_s[g] = max(now, gpu_free_s[g]) + work_s
                            gpu_busy_s[g] += work_s
                            end_s = max(end_s, gpu_free_s[g])
                            work[g - gpu_start[at]] = -1.0
                push_event(end_s, LOCAL, r, heap_s, heap_key, heap_event, heap_counts, priority)
                for i in range(distinct_experts[at]):
                    token_count[at, expert_order[at, i]] = 0
                distinct_experts[at] = 0
            if remote > 0:
                for m in range(servers):
                    if tokens_to[m] == 0:
                        continue
                    parts += 1
                    counter[FREE_MESSAGES] -= 1
                    message = state.free_messages[counter[FREE_MESSAGES]]
                    work = message_work_s[message]
                    named = 0
                    for i in range(distinct_experts[m]):
                        e = expert_order[m, i]
                        g = first_gpu[m, first + e]
                        remote_gpu = g - gpu_start[m]
                        if work[remote_gpu] < 0:
                            work[remote_gpu] = 0.0
                        work[remote_gpu] += expert_s[kind_of[g], size_of[layer], token_count[m, e]]
                        served[g] += token_count[m, e]
                        named += token_count[m, e]
                        token_count[m, e] = 0
                    distinct_experts[m] = 0
                    states = tokens_to[m] * token_bytes
                    tokens_to[m] = 0
                    state.message_request[message] = r
                    state.message_layer[message] = layer
                    state.message_from[message] = at
                    state.message_to[message] = m
                    state.message_bytes[message] = states + BYTES_PER_CALL * named
                    state.reply_bytes[message] = states
                    state.message_hop[message] = False
                    state.message_returning[message] = False
                    state.messages[at, m] += 1
                    push_event(
                        now + overhead_s, SEND, message,
                        heap_s, heap_key, heap_event, heap_counts, priority,
                    )  # fmt: skip
            state.pending_parts[r] = parts

        elif kind == LOCAL:
            action = COMPLETE_PART

        elif kind == SEND:
            start_or_enqueue(links, r, state.message_from[r], state.message_to[r])

        elif kind == FREED:
            if state.message_returning[r]:
                release_ports(links, r, state.message_to[r], state.message_from[r])
            else:
                release_ports(links, r, state.message_from[r], state.message_to[r])

        elif kind == ARRIVED:
            m = state.message_to[r]
            if state.message_hop[r]:
                state.free_messages[counter[FREE_MESSAGES]] = r
                counter[FREE_MESSAGES] += 1
                r = np.int64(state.message_request[r])
                state.location[r] = m
                action = ENTER_LAYER
            else:
                end_s = 0.0
                work = message_work_s[r]
                for g in range(gpu_start[m], gpu_start[m + 1]):
                    work_s = work[g - gpu_start[m]]
                    if work_s >= 0:
                        gpu_free_s[g] = max(now, gpu_free_s[g]) + work_s
                        gpu_busy_s[g] += work_s
                        end_s = max(end_s, gpu_free_s[g])
                        work[g - gpu_start[m]] = -1.0
                push_event(end_s, COMPUTED, r, heap_s, heap_key, heap_event, heap_counts, priority)

        elif kind == COMPUTED:
            state.message_returning[r] = True
            start_or_enqueue(links, r, state.message_to[r], state.message_from[r])

        elif kind == RETURNED:
            state.free_messages[counter[FREE_MESSAGES]] = r
            counter[FREE_MESSAGES] += 1
            r = np.int64(state.message_request[r])
            action = COMPLETE_PART

        elif kind == ARRIVAL:
            counter[LATEST_ARRIVAL] += 1
            following = counter[LATEST_ARRIVAL]
            if following < len(home_of):
                push_event(
                    scenario.arrival_s[following], ARRIVAL, following,
                    heap_s, heap_key, heap_event, heap_counts, priority,
                )  # fmt: skip
            home = home_of[r]
            state.present_s[home] += state.num_present[home] * (now - state.present_since_s[home])
            state.present_since_s[home] = now
            state.num_present[home] += 1
            if state.num_active[home] < scenario.concurrency[home]:
                action = ADMIT
            elif state.queue_head[home] < 0:
                state.queue_head[home] = r
                state.queue_tail[home] = r
            else:
                state.next_queued[state.queue_tail[home]] = r
                state.queue_tail[home] = r

        else:  # LOADED
            g = state.step_gpu[subject]
            add_replica(
                g, state.step_pair[subject], state.gpu_holds, first_gpu, holders, num_replicas,
                scenario.server_of_gpu[g],
            )  # fmt: skip
            if not start_steps(scenario, state, complete_step(state, subject, 0)):
                return LAST_REPLICA_DROPPED

        # ------------------------------------------------ the actions that the event causes
        while action != NOTHING:
            if action == COMPLETE_PART:
                state.pending_parts[r] -= 1
                action = NOTHING
                if state.pending_parts[r] == 0:
                    if state.decoding[r]:
                        state.layer_steps[state.remote_experts[r]] += 1
                        state.layer_s[state.remote_experts[r]] += now - state.layer_start_s[r]
                    state.layer[r] += 1
                    state.layer_start_s[r] = now
                    action = ENTER_LAYER
            elif action == ADMIT:
                home = home_of[r]
                prompt = scenario.prompt[r]
                prefill = scenario.prefill_tokens[prompt]
                state.num_active[home] += 1
                state.start_s[r] = now
                state.location[r] = home
                state.token_row[r] = scenario.first_row[prompt]
                state.step_tokens[r] = prefill if prefill > 0 else 1
                state.steps_left[r] = scenario.decode_tokens[prompt] + (1 if prefill > 0 else 0)
                state.decoding[r] = prefill == 0
                state.layer[r] = 0
                state.layer_start_s[r] = now
                action = ENTER_LAYER
            else:
                action = NOTHING
                home = home_of[r]
                at = state.location[r]
                step_done = state.layer[r] == layers
                target = home if step_done else scenario.execution[home, state.layer[r]]
                if at != target:
                    counter[FREE_MESSAGES] -= 1
                    message = state.free_messages[counter[FREE_MESSAGES]]
                    state.message_request[message] = r
                    state.message_layer[message] = state.layer[r]
                    state.message_from[message] = at
                    state.message_to[message] = target
                    state.message_bytes[message] = state.step_tokens[r] * token_bytes
                    state.message_hop[message] = True
                    state.message_returning[message] = False
                    push_event(
                        now + overhead_s, SEND, message,
                        heap_s, heap_key, heap_event, heap_counts, priority,
                    )  # fmt: skip
                elif not step_done:
                    g = scenario.dense_gpu[at]
                    work_s = dense_s[kind_of[g], state.step_tokens[r]]
                    gpu_free_s[g] = max(now, gpu_free_s[g]) + work_s
                    gpu_busy_s[g] += work_s
                    push_event(
                        gpu_free_s[g], DENSE, r, heap_s, heap_key, heap_event, heap_counts, priority
                    )
                else:
                    if np.isnan(state.first_token_s[r]):
                        state.first_token_s[r] = now
                    state.steps_left[r] -= 1
                    if state.steps_left[r] > 0:
                        state.token_row[r] += state.step_tokens[r]
                        state.step_tokens[r] = 1
                        state.decoding[r] = True
                        state.layer[r] = 0
                        state.layer_start_s[r] = now
                        action = ENTER_LAYER
                    else:
                        state.done_s[r] = now
                        counter[FINISHED] += 1
                        passed_s = now - state.present_since_s[home]
                        state.present_s[home] += state.num_present[home] * passed_s
                        state.present_since_s[home] = now
                        state.num_present[home] -= 1
                        state.num_active[home] -= 1
                        if state.queue_head[home] >= 0:
                            r = np.int64(state.queue_head[home])
                            state.queue_head[home] = state.next_queued[r]
                            action = ADMIT
    return NO_EVENT_LEFT
