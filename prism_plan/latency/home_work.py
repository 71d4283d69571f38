"""What the mean request of each home asks of GPUs and links under an execution table.

Adds up the work of layers (:mod:`prism_plan.latency.layer_work`) along the table's rows, and the
hops between the servers that execute them (docs/design.md, section 10, rules 1 to 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.latency.idle_layers import layer_problem
from prism_plan.latency.layer_work import DECODE, PREFILL, LayerWork, layer_work
from prism_plan.latency.workload import Site, Workload
from prism_plan.simulate.network import BYTES_PER_TOKEN_ID

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.integer]


@dataclass(frozen=True, eq=False)
class HomeWork:
    """Sums of a mean request of each home n; zero for a home without users.

    The second axis is the phase, :data:`PREFILL` or :data:`DECODE`, for a prompt holds GPUs and
    links far longer at a time than a token does; the last axis of size 3 counts uses, their
    seconds, and the sum of squares of these.

    ``idle_s`` [N, 2, 4] seconds of a request on its own: compute, attention, hops, calls;
    ``squared_s2`` [N] the mean square of all of them. ``gpus`` [N, G] seconds on each GPU.
    ``servers`` [N, 2, N, 3]: uses of the GPUs of each server. ``links`` [N, 2, N, N, 3]: messages
    from server to server; ``trains`` [N, 2, 2, N]: what the squares of messages that one step sends
    together are more, at uplinks and at downlinks. ``hops_s`` [N, 2, N, N]: of the seconds of links
    those of hidden states and token ids between the servers that execute layers.
    ``visits`` [N, 2, N] and ``messages`` [N, 2, N, N] count uses of servers and links for which the
    request itself waits: of those that a step has side by side, one; ``beside`` [N, 2, N] counts
    the calls to each server that are left out by this. ``runs`` [N, 2, N] counts sequences of
    visits to a server with nothing else between.
    """

    idle_s: Floats
    squared_s2: Floats
    gpus: Floats
    servers: Floats
    links: Floats
    trains: Floats
    visits: Floats
    runs: Floats
    beside: Floats
    hops_s: Floats
    messages: Floats


def home_work(
    on_gpu: npt.NDArray[np.bool_], table: Ints, workload: Workload, site: Site
) -> HomeWork:
    """The work under a placement bool [G, L, E] and an execution table [N, L]."""
    servers, gpus = len(table), len(on_gpu)
    work = HomeWork(
        idle_s=np.zeros((servers, 2, 4)),
        squared_s2=np.zeros(servers),
        gpus=np.zeros((servers, gpus)),
        servers=np.zeros((servers, 2, servers, 3)),
        links=np.zeros((servers, 2, servers, servers, 3)),
        trains=np.zeros((servers, 2, 2, servers)),
        visits=np.zeros((servers, 2, servers)),
        runs=np.zeros((servers, 2, servers)),
        beside=np.zeros((servers, 2, servers)),
        hops_s=np.zeros((servers, 2, servers, servers)),
        messages=np.zeros((servers, 2, servers, servers)),
    )
    layers, number = _layers(on_gpu, table, workload, site)
    prompts = workload.prompts
    passes = np.array([prompts.prefill_tokens > 0, prompts.decode_tokens], np.float64)
    of_class = workload.members @ passes.T  # of each phase
    for n in np.flatnonzero(workload.shares.any(axis=1)).tolist():
        members = workload.shares[n] @ workload.members
        prompt_s = _add_hops(work, n, table[n], members, workload, site)
        for group in np.flatnonzero(workload.shares[n]).tolist():
            q = number[group, np.arange(table.shape[1]), table[n]]
            share = float(workload.shares[n, group])
            _add_layers(work, n, table[n], layers, q, share, share * of_class[group])
            prompt_s += np.where(workload.members[group] > 0, layers.prompt_s[q].sum(axis=0), 0.0)
        work.squared_s2[n] = members @ prompt_s**2
    return work


def _layers(
    on_gpu: npt.NDArray[np.bool_], table: Ints, workload: Workload, site: Site
) -> tuple[LayerWork, Ints]:
    """Work of all classes, layers and servers that the table needs; [classes, L, N] tells which."""
    servers, layers = table.shape
    wanted = np.zeros((workload.shares.shape[1], layers, servers), bool)
    for n in range(servers):
        for group in np.flatnonzero(workload.shares[n]):
            wanted[group, np.arange(layers), table[n]] = True
    number = np.cumsum(wanted.ravel()).reshape(wanted.shape) - 1
    problem, scratch = layer_problem(
        on_gpu, site.model, site.gpu_start, site.dense_gpu, site.network, site.timing,
        workload.prompts, site.route,
    )  # fmt: skip
    return layer_work(problem, scratch, workload.members, np.argwhere(wanted)), number


def _add_layers(
    work: HomeWork, n: int, row: Ints, layers: LayerWork, q: Ints, share: float, passes: Floats
) -> None:
    """Add the layers of a class of requests, executed at ``row`` [L].

    ``q`` [L] are their positions in ``layers``; ``share`` is that of the class in the home's
    requests, and ``passes`` [2] are passes of the class in a mean request of the home.
    """
    dense, attention, experts, calls = share * layers.seconds[q].sum(axis=0).T
    work.idle_s[n] += np.stack([dense + experts, attention, np.zeros(2), calls], axis=1)
    work.gpus[n] += share * layers.gpus[q].sum(axis=(0, 1))
    work.servers[n] += share * layers.visits[q].sum(axis=0)
    links, messages = work.links[n], work.messages[n]
    sent = share * layers.sent[q]
    np.add.at(links.transpose(1, 0, 2, 3), row, sent)
    np.add.at(links.transpose(2, 0, 1, 3), row, share * layers.returned[q])
    np.add.at(work.trains[n].transpose(2, 0, 1), row, share * layers.trains[q])

    # A step waits for its slowest part: the calls where it has any, else the experts at hand.
    number = sent[..., 0]  # [L, 2, N]: to each server
    most, total = number.max(axis=2), number.sum(axis=2)
    called = np.minimum(ratio(most, passes), 1.0)  # share of passes
    slowest = number * ratio(most, total)[..., None]
    at_hand = share * layers.visits[q, :, row, 0] - passes  # without the dense part, [L, 2]
    np.add.at(work.visits[n].T, row, passes + (1 - called) * at_hand)
    work.visits[n] += slowest.sum(axis=0)
    work.beside[n] += (number - slowest).sum(axis=0)
    # a run ends where the next layer executes elsewhere, and at a call
    ends = np.append(row[1:] != row[:-1], True)[:, None]
    np.add.at(work.runs[n].T, row, np.where(ends, 1.0, called) * passes)
    work.runs[n] += slowest.sum(axis=0)
    np.add.at(messages.transpose(1, 0, 2), row, slowest)
    np.add.at(messages.transpose(2, 0, 1), row, slowest)


def _add_hops(
    work: HomeWork, n: int, row: Ints, members: Floats, workload: Workload, site: Site
) -> Floats:
    """Add the hops of a home's requests, ``members`` [P] of each prompt; their seconds, [P]."""
    prompts, network = workload.prompts, site.network
    prefill = prompts.prefill_tokens.astype(np.float64)
    decode = prompts.decode_tokens.astype(np.float64)
    with_prefill = (prefill > 0).astype(np.float64)
    found = np.zeros(len(prefill))
    first, driver = int(row[0]), int(row[-1])

    def add(phase: int, a: int, b: int, size: Floats, number: Floats) -> None:
        """So many messages of so many bytes, by prompt, from a to b."""
        if a == b:
            return
        held_s = size * network.seconds_per_byte[a, b]
        each_s = number * (held_s + network.half_rtt_s[a, b] + network.hop_overhead_s)
        found[:] += each_s
        work.idle_s[n, phase, 2] += members @ each_s
        for power in range(3):
            work.links[n, phase, a, b, power] += members @ (number * held_s**power)
        work.messages[n, phase, a, b] += members @ number
        work.hops_s[n, phase, a, b] += members @ (number * held_s)

    ones = np.ones_like(prefill)
    add(PREFILL, n, first, BYTES_PER_TOKEN_ID * np.maximum(prefill, 1), ones)
    pairs, times = np.unique(np.stack([row[:-1], row[1:]]), axis=1, return_counts=True)
    for (a, b), number in zip(pairs.T.tolist(), times.tolist(), strict=True):
        add(PREFILL, a, b, prefill * network.token_bytes, number * with_prefill)
        add(DECODE, a, b, ones * network.token_bytes, number * decode)
    id_bytes = ones * BYTES_PER_TOKEN_ID
    add(DECODE, driver, first, id_bytes, np.maximum(with_prefill + decode - 1, 0))
    add(DECODE, driver, n, id_bytes, ones)
    return found


def ratio(part: Floats, whole: Floats) -> Floats:
    """``part / whole``, zero where the whole is zero."""
    whole = np.broadcast_to(whole, part.shape)
    found: Floats = np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
    return found
