"""The compiled event loop: arithmetic on the arrays of `engine_state`, no randomness, no objects.

It does what :mod:`prism_plan.simulate.reference_engine` does, in the same order, so that both give
the same events and the same numbers to the last bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from prism_plan.jit import kernel
from prism_plan.kernel_types import int64
from prism_plan.simulate.compiled.engine_state import (
    EngineState,
    ScenarioArrays,
    TransferArrays,
)
from prism_plan.simulate.compiled.heap import KIND_SHIFT, push_event, remove_first_event
from prism_plan.simulate.compiled.migration_kernels import (
    add_replica,
    complete_step,
    start_steps,
    update_tables,
)
from prism_plan.simulate.compiled.offload_kernels import compute_with_offload
from prism_plan.simulate.compiled.records import CALL, IDS, STATES
from prism_plan.simulate.compiled.transfer_kernels import release_ports, send_hop, start_or_enqueue
from prism_plan.simulate.events import (
    ARRIVAL,
    ARRIVED,
    COMPUTED,
    DENSE,
    FREED,
    GIVEN_UP,
    LOADED,
    LOCAL,
    RETURNED,
    SEND,
)
from prism_plan.simulate.network import BYTES_PER_CALL, BYTES_PER_TOKEN_ID
from prism_plan.simulate.routing_policies import choose_holders

#: Why :func:`run_events` returned.
NO_EVENT_LEFT, LIMIT_REACHED, HEAP_FULL, MESSAGES_FULL, LOG_FULL, LAST_REPLICA_DROPPED = range(6)
#: Also: the next call may have to begin an execution table or to start steps that waited.
TABLES_CHANGED = 6
#: With losses, for Python to go on with: a step needs an expert that nobody holds; an expert was
#: loaded while calls wait for one; a wait is given up.
EXPERT_MISSING, EXPERT_LOADED, WAIT_GIVEN_UP = range(7, 10)
#: What an event causes next for its request.
NOTHING, COMPLETE_PART, BEGIN_PASS, ENTER_LAYER, END_PASS, DELIVER_ID, ADMIT = range(7)


@kernel
def run_events(  # pragma: no cover - compiled
    scenario: ScenarioArrays, state: EngineState, links: TransferArrays, until_s: float,
    max_events: int, losses: Any,
) -> int:  # fmt: skip
    """Start the steps of a migration that can, then process events; return why it ended.

    Events up to ``until_s`` are processed, at most ``max_events``. ``losses`` is None, or the
    :class:`~prism_plan.simulate.compiled.engine_state.LossArrays` of a run whose servers may be
    lost: numba compiles each by itself, and what is for losses is not in the code without them.

    An event may cause a chain of actions for its request: a part of a layer is complete, the
    request enters the next layer or ends its pass, a token is at home, another request is admitted.
    This is one long function because split into helpers it ran 1.9 times slower, with helpers that
    are called and with inlined ones.
    """
    # local names: looked up in the tuples inside the loop, arrays cost three times as much
    experts, token_bytes = scenario.num_experts, scenario.token_bytes
    route, offload = scenario.route, scenario.offload
    overhead_s, hop_overhead_s = scenario.call_overhead_s, scenario.hop_overhead_s
    servers, layers = len(scenario.servers), len(scenario.layers)
    top_k = scenario.experts.shape[2]
    rows_of, prompts = scenario.experts, scenario.prompts
    expert_s = scenario.expert_s
    run, heap = state.run[0], state.heap
    first_gpu, holders, num_replicas = state.first_gpu, state.holders, state.num_replicas
    token_count, expert_order = state.token_count, state.expert_order
    distinct_experts, tokens_to = state.distinct_experts, state.tokens_to
    tokens_sent, missing_experts = state.tokens_sent, state.missing_experts
    link_rank, held_mask = scenario.link_rank, state.held_mask
    candidate_servers, cover_table = state.candidate_servers, state.cover_table
    recent_calls, message_work_s = state.recent_calls, state.message_work_s
    messages, free_messages = state.messages, state.free_messages
    logging = len(state.log) > 0
    processed = 0
    tables_changed = False
    num_ready = int64(run.new_steps)
    run.new_steps = 0
    while True:
        if num_ready > 0 and not start_steps(scenario, state, num_ready):
            return LAST_REPLICA_DROPPED
        num_ready = update_tables(state)
        if num_ready == 0:
            break
    while heap.counts[0] > 0:
        now = heap.entries[0].time_s
        if now > until_s:
            break
        if processed >= max_events:
            return LIMIT_REACHED
        if len(heap.entries) - heap.counts[0] < servers + 8 + run.open_steps:
            return HEAP_FULL
        if run.free_messages < servers + 1:
            return MESSAGES_FULL
        if logging and run.log_lines == len(state.log):
            return LOG_FULL
        event = heap.entries[0].event
        kind = event >> KIND_SHIFT
        subject = event & 0xFFFFFFFF
        remove_first_event(heap)
        run.now_s = now
        processed += 1
        run.processed += 1
        waited = False
        if losses is not None:
            waited = kind == GIVEN_UP
        if logging:
            line = state.log[run.log_lines]
            run.log_lines += 1
            line.time_s = now
            line.kind = kind
            if kind == ARRIVAL:
                home = scenario.requests[subject].home
                line.request, line.layer, line.at, line.to = subject, -1, home, home
            elif kind == LOADED:
                g = state.steps[subject].gpu
                line.request, line.layer, line.at, line.to = -1, -1, scenario.gpus[g].server, g
            elif kind in (DENSE, LOCAL) or waited:
                at = state.requests[subject].location
                line.request, line.layer = subject, state.requests[subject].layer
                line.at, line.to = at, at
            else:
                of = messages[subject]
                line.request, line.layer = of.request, of.layer
                line.at, line.to = of.sender, of.receiver
        action = NOTHING
        goes_on = False
        r = int64(subject)

        if kind == DENSE:
            # -------------------------------------------------------------- route the step's tokens
            request = state.requests[r]
            home = scenario.requests[r].home
            at = request.location
            layer = request.layer
            first = layer * experts
            size_class = scenario.layers[layer].size_class
            row = request.token_row
            tokens = request.step_tokens
            if losses is not None and losses.flags[0].held_nowhere > 0:
                for token in range(row, row + tokens):
                    for k in range(top_k):
                        if num_replicas[first + int64(rows_of[token, layer, k])] == 0:
                            losses.flags[0].request = r
                            return EXPERT_MISSING
            remote = 0
            for token in range(row, row + tokens):
                missing: Any = int64(0)
                for k in range(top_k):
                    e = np.uint64(rows_of[token, layer, k])
                    recent_calls[home, layer, e] += 1
                    if offload or first_gpu[at, np.uint64(first) + e] >= 0:
                        if token_count[at, e] == 0:
                            expert_order[at, distinct_experts[at]] = e
                            distinct_experts[at] += 1
                        token_count[at, e] += 1
                    else:
                        missing_experts[0, missing] = first + int64(e)
                        missing += 1
                if missing == 0:
                    continue
                remote += missing
                choose_holders(
                    route, r, missing_experts, missing, holders, num_replicas, tokens_sent[at],
                    link_rank[at], held_mask, candidate_servers, cover_table,
                )  # fmt: skip
                if losses is not None:
                    called: Any = int64(0)
                    for k in range(top_k):
                        e = np.uint64(rows_of[token, layer, k])
                        if first_gpu[at, np.uint64(first) + e] < 0:
                            m = missing_experts[1, called]
                            losses.step_calls[m, token - row] |= int64(1) << k
                            called += 1
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
                state.servers[home].waiting += 1
                state.servers[home].destinations += num_servers
            state.servers[home].calls += tokens * top_k
            state.servers[home].remote_calls += remote
            state.servers[home].steps += tokens
            request.remote_experts = remote
            parts = 0
            if distinct_experts[at] > 0:
                parts = 1
                if offload:
                    end_s = compute_with_offload(scenario, state, at, layer)
                else:
                    end_s = 0.0
                    # the entry of an unused message serves as working memory
                    work = message_work_s[free_messages[run.free_messages - 1]]
                    start = scenario.servers[at].first_gpu
                    for i in range(distinct_experts[at]):
                        e = expert_order[at, i]
                        g = first_gpu[at, first + e]
                        local_gpu = g - start
                        if work[local_gpu] < 0:
                            work[local_gpu] = 0.0
                        table_row = scenario.gpus[g].kind
                        work[local_gpu] += expert_s[table_row, size_class, token_count[at, e]]
                        state.gpus[g].served += token_count[at, e]
                    for g in range(start, scenario.servers[at].end_gpu):
                        work_s = work[g - start]
                        if work_s >= 0:
                            gpu = state.gpus[g]
                            gpu.free_s = max(now, gpu.free_s) + work_s
                            gpu.gpu_busy_s += work_s
                            end_s = max(end_s, gpu.free_s)
                            work[g - start] = -1.0
                push_event(end_s, int64(LOCAL), r, heap)
                for i in range(distinct_experts[at]):
                    token_count[at, expert_order[at, i]] = 0
                distinct_experts[at] = 0
            if remote > 0:
                for m in range(servers):
                    if tokens_to[m] == 0:
                        continue
                    parts += 1
                    run.free_messages -= 1
                    message = int64(free_messages[run.free_messages])
                    work = message_work_s[message]
                    start = scenario.servers[m].first_gpu
                    named = 0
                    for i in range(distinct_experts[m]):
                        e = expert_order[m, i]
                        g = first_gpu[m, first + e]
                        remote_gpu = g - start
                        if work[remote_gpu] < 0:
                            work[remote_gpu] = 0.0
                        table_row = scenario.gpus[g].kind
                        work[remote_gpu] += expert_s[table_row, size_class, token_count[m, e]]
                        state.gpus[g].served += token_count[m, e]
                        named += token_count[m, e]
                        token_count[m, e] = 0
                    distinct_experts[m] = 0
                    states = tokens_to[m] * token_bytes
                    tokens_to[m] = 0
                    of = messages[message]
                    of.request = r
                    of.layer = layer
                    of.sender = at
                    of.receiver = m
                    of.payload_bytes = states + BYTES_PER_CALL * named
                    of.reply_bytes = states
                    of.kind = CALL
                    of.returning = False
                    state.messages_sent[at, m] += 1
                    if losses is not None:
                        for token in range(tokens):
                            losses.calls[message, token] = losses.step_calls[m, token]
                            losses.step_calls[m, token] = 0
                    push_event(now + overhead_s, int64(SEND), message, heap)
            request.pending_parts = parts

        elif kind == LOCAL:
            action = COMPLETE_PART

        elif kind == SEND:
            start_or_enqueue(links, r, messages[r].sender, messages[r].receiver)

        elif kind == FREED:
            of = messages[r]
            if of.returning:
                release_ports(links, r, of.receiver, of.sender)
            else:
                release_ports(links, r, of.sender, of.receiver)

        elif kind == ARRIVED:
            of = messages[r]
            m = of.receiver
            if of.kind != CALL:
                free_messages[run.free_messages] = r
                run.free_messages += 1
                goes_on = of.begins_pass
                r = int64(of.request)
                if of.kind == IDS and of.layer >= 0 and m == scenario.requests[r].home:
                    action = DELIVER_ID
                elif goes_on:
                    action = BEGIN_PASS
                elif of.kind == STATES:
                    action = ENTER_LAYER
                if goes_on or of.kind == STATES:
                    state.requests[r].location = m
            else:
                end_s = 0.0
                work = message_work_s[r]
                start = scenario.servers[m].first_gpu
                for g in range(start, scenario.servers[m].end_gpu):
                    work_s = work[g - start]
                    if work_s >= 0:
                        gpu = state.gpus[g]
                        gpu.free_s = max(now, gpu.free_s) + work_s
                        gpu.gpu_busy_s += work_s
                        end_s = max(end_s, gpu.free_s)
                        work[g - start] = -1.0
                push_event(end_s, int64(COMPUTED), r, heap)

        elif kind == COMPUTED:
            of = messages[r]
            of.returning = True
            start_or_enqueue(links, r, of.receiver, of.sender)

        elif kind == RETURNED:
            free_messages[run.free_messages] = r
            run.free_messages += 1
            r = int64(messages[r].request)
            action = COMPLETE_PART

        elif kind == ARRIVAL:
            run.latest_arrival += 1
            following = run.latest_arrival
            if following < len(scenario.requests):
                arrival_s = scenario.requests[following].arrival_s
                push_event(arrival_s, int64(ARRIVAL), following, heap)
            home = scenario.requests[r].home
            server = state.servers[home]
            server.present_s += server.num_present * (now - server.present_since_s)
            server.present_since_s = now
            server.num_present += 1
            if server.num_active < scenario.servers[home].concurrency:
                action = ADMIT
            elif server.queue_head < 0:
                server.queue_head = r
                server.queue_tail = r
            else:
                state.requests[server.queue_tail].next_queued = r
                server.queue_tail = r

        else:  # LOADED
            if losses is not None and waited:
                losses.flags[0].request = r
                return WAIT_GIVEN_UP
            step = state.steps[subject]
            add_replica(
                step.gpu, step.pair, state.gpu_holds, first_gpu, holders, num_replicas,
                scenario.gpus[step.gpu].server,
            )  # fmt: skip
            if not start_steps(scenario, state, complete_step(state, subject, int64(0))):
                return LAST_REPLICA_DROPPED
            tables_changed = run.begins_after >= 0
            if losses is not None and losses.flags[0].waiting > 0:
                return EXPERT_LOADED

        # ------------------------------------------------ the actions that the event causes
        while action != NOTHING:
            request = state.requests[r]
            if action == COMPLETE_PART:
                request.pending_parts -= 1
                action = NOTHING
                if request.pending_parts == 0:
                    if request.decoding:
                        state.layer_steps[request.remote_experts] += 1
                        state.layer_s[request.remote_experts] += now - request.layer_start_s
                    request.layer += 1
                    request.layer_start_s = now
                    action = ENTER_LAYER if request.layer < layers else END_PASS
            elif action == BEGIN_PASS:
                request.layer_start_s = now
                action = ENTER_LAYER
            elif action == ADMIT:
                home = scenario.requests[r].home
                prompt = prompts[scenario.requests[r].prompt]
                prefill = prompt.prefill_tokens
                state.servers[home].num_active += 1
                request.start_s = now
                request.location = home
                request.table_row = run.table_row + home
                request.token_row = prompt.first_row
                request.step_tokens = prefill if prefill > 0 else 1
                request.steps_left = prompt.decode_tokens + (1 if prefill > 0 else 0)
                request.ids_left = request.steps_left
                request.context = 0
                request.decoding = prefill == 0
                request.layer = 0
                action = BEGIN_PASS
                to = scenario.execution[request.table_row, 0]
                if to != home:
                    action = NOTHING
                    payload = int64(BYTES_PER_TOKEN_ID * request.step_tokens)
                    send_hop(
                        state, r, int64(-1), int64(home), int64(to), payload, int64(IDS), True,
                        now + hop_overhead_s,
                    )  # fmt: skip
            elif action == ENTER_LAYER:
                action = NOTHING
                at = request.location
                layer = request.layer
                to = scenario.execution[request.table_row, layer]
                if at != to:
                    payload = int64(request.step_tokens * token_bytes)
                    send_hop(
                        state, r, int64(layer), int64(at), int64(to), payload, int64(STATES), False,
                        now + hop_overhead_s,
                    )  # fmt: skip
                else:
                    g = scenario.servers[at].dense_gpu
                    gpu = state.gpus[g]
                    table_row = scenario.gpus[g].kind
                    dense_class = scenario.layers[layer].dense_class
                    if request.decoding:
                        work_s = scenario.decode_s[table_row, dense_class, request.context]
                    else:
                        work_s = scenario.prefill_s[table_row, dense_class, request.step_tokens]
                    gpu.free_s = max(now, gpu.free_s) + work_s
                    gpu.gpu_busy_s += work_s
                    push_event(gpu.free_s, int64(DENSE), r, heap)
            elif action == END_PASS:
                home = scenario.requests[r].home
                at = request.location
                to = scenario.execution[request.table_row, 0]
                request.steps_left -= 1
                goes_on = request.steps_left > 0
                if goes_on:
                    request.token_row += request.step_tokens
                    request.context += request.step_tokens
                    request.step_tokens = 1
                    request.decoding = True
                    request.layer = 0
                    if to != at:
                        send_hop(
                            state, r, int64(layers), int64(at), int64(to),
                            int64(BYTES_PER_TOKEN_ID), int64(IDS), True, now + hop_overhead_s,
                        )  # fmt: skip
                if at != home and (not goes_on or to != home):
                    send_hop(
                        state, r, int64(layers), int64(at), int64(home),
                        int64(BYTES_PER_TOKEN_ID), int64(IDS), False, now + hop_overhead_s,
                    )  # fmt: skip
                goes_on = goes_on and to == at
                action = BEGIN_PASS if goes_on else NOTHING
                if at == home:
                    action = DELIVER_ID
            else:  # DELIVER_ID
                action = BEGIN_PASS if goes_on else NOTHING
                if np.isnan(request.first_token_s):
                    request.first_token_s = now
                request.ids_left -= 1
                if request.ids_left == 0:
                    home = scenario.requests[r].home
                    request.done_s = now
                    run.finished += 1
                    server = state.servers[home]
                    server.present_s += server.num_present * (now - server.present_since_s)
                    server.present_since_s = now
                    server.num_present -= 1
                    server.num_active -= 1
                    if request.table_row != run.table_row + home:
                        run.num_on_older_tables -= 1
                        tables_changed = run.num_on_older_tables == 0
                    if server.queue_head >= 0:
                        r = int64(server.queue_head)
                        server.queue_head = state.requests[r].next_queued
                        action = ADMIT
        if tables_changed:
            return TABLES_CHANGED
    return NO_EVENT_LEFT
