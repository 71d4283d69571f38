"""The least seconds of one layer, by which servers execute it and how many experts each holds.

Every way in which the servers can hold the experts of a layer is enumerated: each expert on one or
more servers, (2^N - 1)^E ways, 5.8 million with 3 servers and 8 experts. Steps that call the same
experts are counted together, and the seconds of a step follow from where its experts lie. The
rules are those of the simulator (docs/design.md, section 4), written anew and not those of
:mod:`prism_plan.latency.idle_layers`, so that one is a check of the other.

Where every other server holds all that a token lacks, route ``cover`` chooses by what the servers
were sent before, by all steps of all layers: a tie that no layer can decide on its own. Here every
such token takes the better server (``ties`` "better"), so that the seconds are a lower bound, the
worse one, or the mean of both. There is no difference in decode steps where links are all alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.compiled_loops import as_constant
from prism_plan.jit import kernel
from prism_plan.model_spec import ModelSpec
from prism_plan.simulate.network import BYTES_PER_CALL, Network
from prism_plan.simulate.requests import Requests

Array = Any
Floats = npt.NDArray[np.float64]

#: A step calls at most so many different experts: its table has (2^N - 1)^experts rows.
MAX_EXPERTS_OF_STEP = 6
MAX_SERVERS, MAX_TOP_K = 3, 2

#: Which server a token calls where several would do.
Ties = Literal["better", "mean", "worse"]
TIES: tuple[Ties, ...] = ("better", "mean", "worse")

#: A step: the experts of each of its tokens, sorted.
Step = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class LayerTable:
    """The least seconds of a layer, [columns, (E + 1)^N], infinite where nothing was found.

    The second axis is Σ_m count[m] · (E + 1)^m of the experts that each server holds; ``holdings``
    has the way that is least: Σ_e (holders of e - 1) · (2^N - 1)^e, holders as a mask of servers.
    """

    seconds: Floats
    holdings: npt.NDArray[np.int64]
    servers: int
    experts: int

    def counts(self, index: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Experts that each server holds, [..., N], of positions on the second axis."""
        base = (self.experts + 1) ** np.arange(self.servers)
        return index[..., None] // base % (self.experts + 1)

    def local(self, column: int, index: int) -> npt.NDArray[np.bool_]:
        """Which server holds which expert, bool [N, E], of the way that is least."""
        ways = (1 << self.servers) - 1
        holders = self.holdings[column, index] // ways ** np.arange(self.experts) % ways + 1
        held: npt.NDArray[np.bool_] = (holders >> np.arange(self.servers)[:, None]) & 1 == 1
        return held


def steps_of_layer(requests: Requests, tasks: int, layer: int) -> dict[Step, Floats]:
    """How often a request of each task makes a step in this layer, [tasks], by step.

    ``requests`` are the prompts that the measure looks at, each task as a home of its own.
    """
    prompts = requests.prompts
    found: dict[Step, Floats] = {}
    for home in np.unique(requests.home).tolist():
        mine = requests.prompt[requests.home == home].tolist()
        number: Counter[Step] = Counter()
        for prompt, copies in Counter(mine).items():
            first = int(prompts.first_row[prompt])
            begin = first + int(prompts.prefill_tokens[prompt])
            end = begin + int(prompts.decode_tokens[prompt])
            rows = [tuple(sorted(row)) for row in prompts.experts[first:end, layer].tolist()]
            if begin > first:
                number[tuple(sorted(rows[: begin - first]))] += copies
            for row in rows[begin - first :]:
                number[row,] += copies
        task = int(prompts.task[mine[0]])
        for step, count in number.items():
            found.setdefault(step, np.zeros(tasks))[task] = count / len(mine)
    return found


def layer_table(
    steps: dict[Step, Floats], shares: Floats, columns: npt.NDArray[np.integer],
    slots: Sequence[int], model: ModelSpec, cluster: Cluster, ties: Ties = "better",
) -> LayerTable:  # fmt: skip
    """The table of a layer from its steps by task.

    ``shares`` [N, tasks] are those of each home and task in all requests; ``columns`` [C, N] the
    servers that may execute the layer, by home; no server holds more experts than its ``slots``.
    """
    servers, experts = cluster.num_servers, model.num_experts
    if servers > MAX_SERVERS or model.top_k > MAX_TOP_K:
        raise ValueError(f"{servers} servers and top {model.top_k}: too many ways to choose from")
    ways = (1 << servers) - 1
    # experts of few steps last: what steps cost is added up as soon as all their experts are placed
    used = np.zeros(experts)
    for step in steps:
        used[sorted({e for token in step for e in token})] += 1
    order = np.argsort(-used, kind="stable")
    rank = np.empty(experts, np.int64)
    rank[order] = np.arange(experts)
    network = Network.of(cluster, model)
    links = _Links(
        as_constant(network.seconds_per_byte),
        as_constant(network.half_rtt_s),
        float(network.call_overhead_s),
        int(network.token_bytes),
    )
    called, first, tables = [], [0], []
    for step in steps:
        own = sorted({int(rank[e]) for token in step for e in token})
        if len(own) > MAX_EXPERTS_OF_STEP:
            raise ValueError(f"a step calls {len(own)} experts, at most {MAX_EXPERTS_OF_STEP}")
        tokens = np.array([[own.index(rank[e]) for e in token] for token in step], np.int64)
        table = np.empty((ways ** len(own), servers))
        _step_table(as_constant(tokens), len(own), links, TIES.index(ties), table)
        called.append(own)
        first.append(first[-1] + len(table))
        tables.append(table)
    by_last = sorted(range(len(called)), key=lambda i: called[i][-1])
    experts_of = np.zeros((len(called), MAX_EXPERTS_OF_STEP), np.int64)
    for row, i in enumerate(by_last):
        experts_of[row, : len(called[i])] = called[i]
    last = np.array([called[i][-1] for i in by_last])
    weight = np.array([shares @ rates for rates in steps.values()]).reshape(-1, servers)
    problem = _Problem(
        experts_of=as_constant(experts_of),
        num_experts_of=as_constant(np.array([len(called[i]) for i in by_last])),
        first_row=as_constant(np.array([first[i] for i in by_last])),
        begin=as_constant(np.searchsorted(last, np.arange(experts + 1))),
        weight=as_constant(np.ascontiguousarray(weight[by_last])),
        step_s=as_constant(np.concatenate(tables)),
        columns=as_constant(np.ascontiguousarray(columns, np.int64)),
        slots=as_constant(np.array(slots, np.int64)),
        code=as_constant(ways**order),
    )
    seconds = np.full((len(columns), (experts + 1) ** servers), np.inf)
    holdings = np.zeros(seconds.shape, np.int64)
    scratch = (
        np.zeros(experts, np.int64),
        np.zeros((experts + 1, servers), np.int64),
        np.zeros((experts + 1, servers, servers)),
    )
    _enumerate(problem, *scratch, seconds, holdings)
    return LayerTable(seconds, holdings, servers, experts)


# --------------------------------------------------------------------------------------- compiled


class _Links(NamedTuple):
    """What messages cost."""

    seconds_per_byte: Array
    half_rtt_s: Array
    call_overhead_s: float
    token_bytes: int


class _Problem(NamedTuple):
    """What :func:`_enumerate` reads; steps are sorted by the last of their experts."""

    experts_of: Array
    num_experts_of: Array
    first_row: Array
    begin: Array
    weight: Array
    step_s: Array
    columns: Array
    slots: Array
    code: Array


@kernel
def _step_table(tokens: Array, experts: int, links: _Links, ties: int, found: Array) -> None:
    """Seconds of a step by the holders of its experts and the server that executes, [ways, N].

    ``tokens`` [T, K] name the step's experts 0, 1, ...; a row of ``found`` is Σ_e (holders - 1) ·
    (2^N - 1)^(experts - 1 - e). ``ties`` is a position in :data:`TIES`.
    """
    rows, servers = found.shape
    ways = (1 << servers) - 1
    number, top_k = tokens.shape
    for row in range(rows):
        for at in range(servers):
            least, most, total = 1e300, 0.0, 0.0
            for choice in range(1 << number):  # of tokens that could go to either server
                states0 = states1 = states2 = calls0 = calls1 = calls2 = 0
                for t in range(number):
                    to_all = (1 << servers) - 1 & ~(1 << at)  # servers that hold all it lacks
                    missing = 0
                    for k in range(top_k):
                        holders = _holders(row, tokens[t, k], experts, ways)
                        if not holders >> at & 1:
                            missing += 1
                            to_all &= holders
                    if missing == 0:
                        continue
                    if to_all:
                        to = _lowest(to_all)
                        if to_all & (to_all - 1) and choice >> t & 1:
                            to = _lowest(to_all & (to_all - 1))
                        states0 += to == 0
                        states1 += to == 1
                        states2 += to == 2
                        calls0 += missing * (to == 0)
                        calls1 += missing * (to == 1)
                        calls2 += missing * (to == 2)
                        continue
                    for k in range(top_k):  # two experts that lie on two servers, one on each
                        holders = _holders(row, tokens[t, k], experts, ways)
                        if not holders >> at & 1:
                            to = _lowest(holders)
                            states0 += to == 0
                            states1 += to == 1
                            states2 += to == 2
                            calls0 += to == 0
                            calls1 += to == 1
                            calls2 += to == 2
                states = (states0, states1, states2)
                calls = (calls0, calls1, calls2)
                seconds = _call_s(links, at, servers, states, calls)
                least, most, total = min(least, seconds), max(most, seconds), total + seconds
            found[row, at] = most if ties == 2 else least
            if ties == 1:
                found[row, at] = total / (1 << number)


@kernel
def _holders(row: int, expert: int, experts: int, ways: int) -> int:
    """The mask of servers that hold an expert of a step, from 1 to 2^N - 1."""
    for _ in range(experts - 1 - expert):
        row //= ways
    return row % ways + 1


@kernel
def _lowest(mask: int) -> int:
    """The lowest server of a mask that is not empty."""
    server = 0
    while not mask >> server & 1:
        server += 1
    return server


@kernel
def _call_s(links: _Links, at: int, servers: int, states: Any, calls: Any) -> float:
    """Seconds until the answers to one step's messages are back, without compute.

    ``states`` and ``calls`` count the hidden states and the calls sent to each server. Messages
    leave one after the other in the order of servers; answers return in the order in which they
    are ready, and share the way in.
    """
    first = second = -1
    ready0 = ready1 = 0.0
    sent_s = links.call_overhead_s
    for m in range(servers):
        if states[m] == 0:
            continue
        payload = states[m] * links.token_bytes + BYTES_PER_CALL * calls[m]
        sent_s += payload * links.seconds_per_byte[at, m]
        if first < 0:
            first, ready0 = m, sent_s + links.half_rtt_s[at, m]
        else:
            second, ready1 = m, sent_s + links.half_rtt_s[at, m]
    if first < 0:
        return 0.0
    if second >= 0 and ready1 < ready0:
        first, second, ready0, ready1 = second, first, ready1, ready0
    back = links.token_bytes * links.seconds_per_byte[first, at]
    way_in = ready0 + states[first] * back
    done_s: float = way_in + links.half_rtt_s[first, at]
    if second >= 0:
        back = links.token_bytes * links.seconds_per_byte[second, at]
        way_in = max(way_in, ready1) + states[second] * back
        done_s = max(done_s, way_in + links.half_rtt_s[second, at])
    return done_s


@kernel
def _enumerate(
    p: _Problem, holders: Array, count: Array, sums: Array, seconds: Array, holdings: Array
) -> None:
    """Fill ``seconds`` and ``holdings`` by depth-first search over experts.

    ``holders`` [E], ``count`` [E + 1, N] and ``sums`` [E + 1, homes, N] are working memory: what
    the first experts fix of each home's seconds at each executing server.
    """
    experts, servers = len(holders), count.shape[1]
    ways = (1 << servers) - 1
    depth = 0
    holders[0] = -1
    while depth >= 0:
        holders[depth] += 1
        if holders[depth] == ways:
            depth -= 1
            continue
        fits = True
        for m in range(servers):
            more = (holders[depth] + 1) >> m & 1
            count[depth + 1, m] = count[depth, m] + more
            fits = fits and count[depth + 1, m] <= p.slots[m]
        if not fits:
            continue
        for n in range(servers):
            for m in range(servers):
                sums[depth + 1, n, m] = sums[depth, n, m]
        for i in range(p.begin[depth], p.begin[depth + 1]):
            row = 0
            for k in range(p.num_experts_of[i]):
                row = row * ways + holders[p.experts_of[i, k]]
            row += p.first_row[i]
            for n in range(servers):
                for m in range(servers):
                    sums[depth + 1, n, m] += p.weight[i, n] * p.step_s[row, m]
        if depth < experts - 1:
            depth += 1
            holders[depth] = -1
            continue
        index = 0
        for m in range(servers - 1, -1, -1):
            index = index * (experts + 1) + count[experts, m]
        for c in range(len(p.columns)):
            total = 0.0
            for n in range(servers):
                total += sums[experts, n, p.columns[c, n]]
            if total < seconds[c, index]:
                seconds[c, index] = total
                code = 0
                for e in range(experts):
                    code += holders[e] * p.code[e]
                holdings[c, index] = code
