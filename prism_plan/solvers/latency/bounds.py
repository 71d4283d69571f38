"""Lower bounds on the mean latency of plans: of all, and of those that execute whole layers.

Both are of requests on their own: waiting only adds to them. For each home by itself, since a plan
can at best be the best one for every home.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from prism_plan.latency.idle_time import MeanRequest
from prism_plan.solvers.latency.layer_times import least_layer_s
from prism_plan.solvers.latency.problem import Floats, LatencyProblem, Table
from prism_plan.solvers.paths import shortest_path

#: Steps of the search for prices. Of more servers the spans that memory makes necessary are left
#: out of account.
STEPS, MAX_SERVERS = 100, 8


def whole_layers_bound_s(problem: LatencyProblem, table: Table) -> float:
    """Seconds that no plan of whole layers is below, however GPUs share the experts of a layer.

    Every server could hold any layer, but no more layers than it has memory for without KV caches:
    at least so many of a home's layers are executed elsewhere. Zero for homes that execute at home.
    ``table`` [N, L] is that of some plan, which the search for prices aims at.
    """
    room = np.array([sum(gpus) for gpus in problem.instance.gpu_capacity])
    size = problem.instance.expert_size * problem.model.num_experts
    most = np.array([int((np.cumsum(np.sort(size)) <= own).sum()) for own in room])
    seconds = np.zeros(len(room))
    layer_s = least_layer_s(problem)
    for n in np.flatnonzero(problem.pipelines.idle.has_users).tolist():
        if not problem.at_home[n]:
            request = dataclasses.replace(problem.pipelines.idle.of_home(n), layer_s=layer_s[n])
            seconds[n] = _bounded_path_s(request, most, n, table[n])
    return float(problem.weights @ seconds)


def _bounded_path_s(request: MeanRequest, most: np.ndarray, home: int, known: np.ndarray) -> float:
    """Seconds of a path on which no server executes more layers than it can hold; a lower bound.

    By Lagrangean relaxation: each layer of a server is charged a price, which is paid back for as
    many layers as it can hold; paths have as many spans as memory makes necessary. Any prices give
    a bound; they grow by steps of a subgradient search
    (B. T. Polyak, 1969) towards the best path that holds to the limit.
    """
    layers, servers = request.layer_s.shape
    price = np.zeros(servers)
    spans = 1 + int((np.cumsum(np.sort(most)[::-1]) < layers).sum())  # at least
    if servers > MAX_SERVERS:
        spans = 1
    best, aim = -np.inf, request.of_row(known)
    for number in range(STEPS):
        charged = dataclasses.replace(request, layer_s=request.layer_s + price)
        row = shortest_path(charged, home) if spans == 1 else _path_of_spans(charged, spans)
        beyond = np.bincount(row, minlength=servers) - np.minimum(most, layers)
        value = charged.of_row(row) - float(price @ np.minimum(most, layers))
        best = max(best, value)
        if (beyond <= 0).all():
            aim = min(aim, request.of_row(row))
        change = np.where((price == 0) & (beyond < 0), 0, beyond)
        square = float((change * change).sum())
        if square == 0 or aim - best <= 1e-6 * abs(aim):
            break
        price = np.maximum(price + (aim - value) / square * change / (1 + number / 20), 0.0)
    return best


def _path_of_spans(request: MeanRequest, least: int) -> np.ndarray:
    """The path [L] of least time with so many spans at least."""
    layers, servers = request.layer_s.shape
    stay = np.eye(servers, dtype=bool)
    # by server of the first span, spans so far (at most ``least``), and server now
    cost = np.full((servers, least, servers), np.inf)
    first = np.arange(servers)
    cost[first, 0, first] = request.start_s + request.layer_s[0]
    before = np.zeros((layers, servers, least, servers, 2), np.int64)
    for layer in range(1, layers):
        made = np.full_like(cost, np.inf)
        for spans in range(least):
            options = cost[:, spans, :, None] + request.hop_s
            for to, allowed in ((spans, stay), (min(spans + 1, least - 1), ~stay)):
                value = np.where(allowed, options, np.inf)
                came_from = value.argmin(axis=1)
                shortest = value.min(axis=1)
                better = shortest < made[:, to]
                made[:, to][better] = shortest[better]
                before[layer, :, to, :, 0][better] = spans
                before[layer, :, to, :, 1][better] = came_from[better]
        cost = made + request.layer_s[layer]
    total = cost[:, least - 1] + request.id_s.T
    start, at = np.unravel_index(int(total.argmin()), total.shape)
    row, spans = np.zeros(layers, np.int64), least - 1
    for layer in range(layers - 1, -1, -1):
        row[layer] = at
        if layer:
            spans, at = before[layer, start, spans, at]
    return row


def all_plans_bound_s(problem: LatencyProblem) -> float:
    """Seconds that no plan at all is below, for the prompts that are planned with.

    Dense work and attention at the fastest server; of a step's experts what one GPU of the best
    server, or one call, cannot avoid; and, where no server holds the whole model, for each pass two
    messages (hidden states out, a token's id or hidden states back), or calls of the experts that
    the one executing server lacks, whichever is less.
    """
    measure, site, network = problem.measure, problem.site, problem.network
    prompts, tables = measure.prompts, site.timing
    gpus = np.diff(site.gpu_start)
    prefill = prompts.prefill_tokens.astype(np.int64)
    decode = prompts.decode_tokens.astype(np.int64)
    pairs = ~np.eye(len(gpus), dtype=bool)
    call_s = np.inf
    if pairs.any():
        call_s = float((network.call_overhead_s + network.call_cost_s())[pairs].min())
    # a token's experts are top_k different ones: one of g GPUs computes top_k / g at least
    one_s = float(tables.expert_s[:, :, 1].min())
    local_s = one_s * -(-problem.model.top_k // int(gpus.max()))
    step_s = min(local_s, call_s + one_s)
    kinds = tables.kind[site.dense_gpu]
    seconds = np.zeros(len(prompts))
    for number in range(len(prompts)):
        contexts = prefill[number] + np.arange(decode[number])
        for group in tables.dense_class:
            dense_s = tables.decode_s[kinds, group][:, contexts].sum(axis=1)
            if prefill[number]:
                dense_s = dense_s + tables.prefill_s[kinds, group, prefill[number]]
            seconds[number] += float(dense_s.min())
        passes = int(decode[number] + (prefill[number] > 0))
        seconds[number] += passes * problem.model.num_layers * step_s
    idle_s = measure.shares @ (measure.members @ seconds)
    return float(problem.weights @ (idle_s + _messages_s(problem, call_s + one_s - local_s)))


def _messages_s(problem: LatencyProblem, longer_s: float) -> Floats:
    """Seconds of messages that a mean request of each home cannot do without, [N].

    ``longer_s``: how much longer a step with a call takes than one without, at least.
    """
    instance, network, measure = problem.instance, problem.network, problem.measure
    servers = len(problem.places)
    found = np.zeros(servers)
    pairs = ~np.eye(servers, dtype=bool)
    size = np.repeat(instance.expert_size, instance.model.num_experts)
    room = np.array([sum(gpus) for gpus in instance.gpu_capacity], np.int64)
    beyond = int(size.sum()) - int(room.max())
    if beyond <= 0 or not pairs.any():
        return found
    hop_s = network.half_rtt_s + network.hop_overhead_s
    states_s = float((hop_s + network.token_bytes * network.seconds_per_byte)[pairs].min())
    id_s = float(hop_s[pairs].min())
    prompts = measure.prompts
    passes = measure.shares @ (
        measure.members @ (prompts.decode_tokens + (prompts.prefill_tokens > 0))
    )
    calls = measure.shares @ _decode_calls(problem)  # of a request by home, [N, L E]
    for n in np.flatnonzero(measure.shares.any(axis=1)).tolist():
        two_s = passes[n] * (states_s + id_s) - id_s  # no id begins a pass after the last one
        rarest = np.argsort(calls[n] / size, kind="stable")
        elsewhere = np.cumsum(size[rarest]) <= beyond
        steps = float(calls[n][rarest][elsewhere].sum()) / problem.model.top_k
        found[n] = max(min(two_s, steps * max(longer_s, 0.0)), 0.0)
    return found


def _decode_calls(problem: LatencyProblem) -> Floats:
    """Calls of each expert by decode steps of a mean request of each task, [T, L E]."""
    measure, model = problem.measure, problem.model
    prompts = measure.prompts
    pairs = model.num_layers * model.num_experts
    found = np.zeros((len(measure.members), pairs))
    first = np.arange(model.num_layers)[None, :, None] * model.num_experts
    for number in range(len(prompts)):
        begin = int(prompts.first_row[number]) + int(prompts.prefill_tokens[number])
        rows = prompts.experts[begin : begin + int(prompts.decode_tokens[number])]
        calls = np.bincount((first + rows).ravel(), minlength=pairs)
        weights = measure.members[:, number]
        for task in np.flatnonzero(weights):
            found[task] += weights[task] * calls
    return found
