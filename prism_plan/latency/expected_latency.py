"""The expected latency of a plan by formula: a request on its own, and its waiting for others.

Work, hops and calls of a request on its own are those of the simulator, exactly, for the prompts
that are given. Waiting is approximated (docs/design.md, section 10, "Latency of a plan"): at the
home's places as in M/G/c; at GPUs and ports each visit waits for the visits of other requests that
it meets. Where places are busy for more than a third of the time the formula orders plans at best.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.latency.idle_layers import layer_problem
from prism_plan.latency.layer_work import DECODE, PREFILL, LayerWork, layer_work
from prism_plan.latency.queueing import waiting_for_places
from prism_plan.model_spec import ModelSpec
from prism_plan.placement import Placement
from prism_plan.simulate.network import BYTES_PER_TOKEN_ID, Network
from prism_plan.simulate.requests import Prompts
from prism_plan.simulate.scenario import Scenario
from prism_plan.simulate.timing import Timing

Floats = npt.NDArray[np.float64]

#: Parts of a request's time, in the order of ``PlanLatency.parts``.
PARTS = ("compute", "attention", "hops", "calls", "places", "gpus", "ports")
#: Rounds in which waiting times and the requests in progress are made to agree.
ROUNDS = 12


@dataclass(frozen=True, eq=False)
class Workload:
    """What the users of each home ask for.

    ``members`` [classes, P] is the share of each prompt in the requests of a class (rows of sum 1),
    ``shares`` [N, classes] that of each class in the requests of a home, zero without users;
    ``rates`` [N] requests per second, zero for a cluster that is planned as idle; ``weights`` [N]
    the share of each home in all requests; ``places`` [N] requests in progress at most.
    """

    prompts: Prompts
    members: Floats
    shares: Floats
    rates: Floats
    weights: Floats
    places: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Site:
    """What GPUs and links cost; ``gpu_start`` [N + 1] and ``dense_gpu`` [N] as in a scenario."""

    model: ModelSpec
    network: Network
    timing: Timing
    gpu_start: npt.NDArray[np.int32]
    dense_gpu: npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class PlanLatency:
    """Expected seconds of a request under a plan, by home and part.

    ``parts`` [N, 7] by home and :data:`PARTS`, zero without users; ``weights`` [N] the share of
    each home in all requests. ``gpu_share`` [G], ``up_share`` and ``down_share`` [N] are shares of
    time for which GPUs and ports work, ``place_share`` [N] for which places of a home are taken.
    """

    parts: Floats
    weights: Floats
    gpu_share: Floats
    up_share: Floats
    down_share: Floats
    place_share: Floats

    @property
    def of_home(self) -> Floats:
        """Seconds of a mean request of each home, float64 [N]."""
        seconds: Floats = self.parts.sum(axis=1)
        return seconds

    @property
    def mean_s(self) -> float:
        """Seconds of a mean request of the cluster."""
        return float(self.weights @ self.of_home)

    @property
    def by_part(self) -> dict[str, float]:
        """Seconds of a mean request of the cluster by part."""
        return dict(zip(PARTS, (self.weights @ self.parts).tolist(), strict=True))

    @property
    def busiest_place(self) -> float:
        """The largest share of time for which the places of a home are taken."""
        return float(self.place_share.max())


def expected_latency(placement: Placement, scenario: Scenario) -> PlanLatency:
    """The expected latency of the scenario's requests under a placement and its execution table.

    Route `cover`, whatever that of the scenario. Requests without stationary arrivals are taken to
    come at their mean rate.
    """
    requests = scenario.requests
    homes, servers = requests.home, len(requests.servers)
    members = np.zeros((servers, len(requests.prompts)))
    np.add.at(members, (homes, requests.prompt), 1.0)
    number = members.sum(axis=1)
    users = number > 0
    members[users] /= number[users, None]
    rates = requests.rate
    if rates is None:
        last_s = float(requests.arrival_s[-1])
        rates = number / last_s if last_s > 0 else np.zeros(servers)
    workload = Workload(
        prompts=requests.prompts,
        members=members,
        shares=np.diag(users.astype(np.float64)),
        rates=np.where(users, rates, 0.0),
        weights=number / number.sum(),
        places=scenario.concurrency,
    )
    site = Site(
        scenario.model, scenario.network, scenario.timing, scenario.gpu_start, scenario.dense_gpu
    )
    return latency_of(placement.on_gpu, placement.execution_table, workload, site)


def latency_of(
    on_gpu: npt.NDArray[np.bool_], table: npt.NDArray[np.int32], workload: Workload, site: Site
) -> PlanLatency:
    """The expected latency under a placement bool [G, L, E] and an execution table [N, L]."""
    problem, scratch = layer_problem(
        on_gpu, site.model, site.gpu_start, site.dense_gpu, site.network, site.timing,
        workload.prompts,
    )  # fmt: skip
    wanted = {
        (int(group), layer, at)
        for n, row in enumerate(table.tolist())
        for group in np.flatnonzero(workload.shares[n])
        for layer, at in enumerate(row)
    }
    triples = np.array(sorted(wanted), np.int64).reshape(-1, 3)
    work = layer_work(problem, scratch, workload.members, triples)
    return _Queues(work, triples, table, workload, site).latency()


class _Queues:
    """Adds up the work of all homes, and what each waits for.

    Requests are seen in two phases, for a prompt holds GPUs and links far longer at a time than a
    token does. ``P`` below counts phases of homes: 2 n + phase.
    """

    def __init__(
        self, work: LayerWork, triples: npt.NDArray[np.int64], table: npt.NDArray[np.int32],
        workload: Workload, site: Site,
    ) -> None:  # fmt: skip
        self._work, self._table, self._load, self._site = work, table, workload, site
        servers = len(table)
        self._server_of = np.repeat(np.arange(servers), np.diff(site.gpu_start))
        prompts = workload.prompts
        passes = np.array([prompts.prefill_tokens > 0, prompts.decode_tokens], np.float64)
        self._passes = workload.members @ passes.T  # of each class by phase
        self._index = {tuple(triple): q for q, triple in enumerate(triples.tolist())}
        self._homes = np.flatnonzero(workload.shares.any(axis=1)).tolist()
        gpus = len(self._server_of)
        self._gpu = np.zeros((servers, gpus))  # by home: seconds
        self._server = np.zeros((servers, 2, servers, 3))  # by home and phase: LayerWork.visits
        self._link = np.zeros((servers, 2, servers, servers, 3))  # also by sender and receiver
        # visits that make a request wait: of parallel ones those that take longest
        self._visits = np.zeros((servers, 2, servers))
        self._messages = np.zeros((servers, 2, servers, servers))
        self._idle = np.zeros((servers, 2, 4))  # compute, attention, hops, calls
        self._squared = np.zeros(servers)  # of the seconds of a request on its own
        for n in self._homes:
            self._add_home(n)

    def _add_home(self, n: int) -> None:
        work, load = self._work, self._load
        members = load.shares[n] @ load.members
        prompt_s = self._add_hops(n, members)
        for group in np.flatnonzero(load.shares[n]).tolist():
            share = float(load.shares[n, group])
            for layer, at in enumerate(self._table[n].tolist()):
                q = self._index[group, layer, at]
                dense, attention, experts, calls = share * work.seconds[q].T
                self._idle[n] += np.stack([dense + experts, attention, 0 * dense, calls], axis=1)
                self._gpu[n] += share * work.gpus[q].sum(axis=0)
                self._server[n] += share * work.visits[q]
                self._link[n, :, at] += share * work.sent[q]
                self._link[n, :, :, at] += share * work.returned[q]
                prompt_s += np.where(load.members[group] > 0, work.prompt_s[q], 0.0)
                for phase in range(2):
                    self._add_visits(n, phase, at, q, share, share * self._passes[group, phase])
        self._squared[n] = members @ prompt_s**2

    def _add_visits(self, n: int, phase: int, at: int, q: int, share: float, passes: float) -> None:
        if passes == 0:
            return
        batches = share * self._work.visits[q, phase, :, 0]
        batches[at] -= passes  # those of dense parts
        sent = share * self._work.sent[q, phase, :, 0]
        called = min(float(sent.max()) / passes, 1.0)
        visits = self._visits[n, phase]
        visits[at] += passes + (1 - called) * batches[at]
        if called > 0:  # calls take longer than the experts of the executing server
            visits += _slowest(sent)
            self._messages[n, phase, at] += _slowest(sent)
            self._messages[n, phase, :, at] += _slowest(sent)

    def _add_hops(self, n: int, members: Floats) -> Floats:
        """Count the hops of a home's requests; their seconds for each prompt, [P]."""
        prompts, network, row = self._load.prompts, self._site.network, self._table[n]
        prefill = prompts.prefill_tokens.astype(np.float64)
        decode = prompts.decode_tokens.astype(np.float64)
        found = np.zeros(len(prefill))
        first, driver = int(row[0]), int(row[-1])
        with_prefill = (prefill > 0).astype(np.float64)

        def message(phase: int, a: int, b: int, size: Floats, number: Floats) -> None:
            if a == b:
                return
            held = size * network.seconds_per_byte[a, b]
            each = number * (held + network.half_rtt_s[a, b] + network.hop_overhead_s)
            found[:] += each
            self._idle[n, phase, 2] += members @ each
            for power in range(3):
                self._link[n, phase, a, b, power] += members @ (number * held**power)
            self._messages[n, phase, a, b] += members @ number

        ones = np.ones_like(prefill)
        message(PREFILL, n, first, BYTES_PER_TOKEN_ID * np.maximum(prefill, 1), ones)
        for a, b in zip(row[:-1].tolist(), row[1:].tolist(), strict=True):
            message(PREFILL, a, b, prefill * network.token_bytes, with_prefill)
            message(DECODE, a, b, ones * network.token_bytes, decode)
        passes = with_prefill + decode
        ids = ones * BYTES_PER_TOKEN_ID
        message(DECODE, driver, first, ids, np.maximum(passes - 1, 0))
        message(DECODE, driver, n, ids, ones)
        return found

    def latency(self) -> PlanLatency:
        """Waiting times that agree with the requests in progress, and the sums."""
        load = self._load
        idle_s = self._idle.sum(axis=2)  # [N, 2]
        phase_s = idle_s.copy()
        places = np.array(load.places, np.float64)
        meet = _Meetings(self._server, self._visits, self._link, self._messages, self._site.network)
        for _ in range(ROUNDS):
            seconds = phase_s.sum(axis=1)
            most = places / np.maximum(seconds, 1e-300)
            served = np.minimum(load.rates, most)
            own = served * seconds
            others = np.minimum(1.0, (places - 1) / np.maximum(own, 1e-300))
            gpus, ports = meet.waiting_s(idle_s, phase_s, served, others)
            phase_s = idle_s + gpus + ports
        seconds = phase_s.sum(axis=1)
        parts = np.zeros((len(seconds), len(PARTS)))
        parts[:, :4] = self._idle.sum(axis=1)
        parts[:, 5], parts[:, 6] = gpus.sum(axis=1), ports.sum(axis=1)
        for n in self._homes:
            alone_s = idle_s[n].sum()
            scale = seconds[n] / alone_s if alone_s > 0 else 1.0
            parts[n, 4] = waiting_for_places(
                load.places[n], float(load.rates[n]), float(seconds[n]),
                float(self._squared[n] * scale**2),
            )  # fmt: skip
        by_port = np.einsum("n,nfab->ab", load.rates, self._link[..., 1])
        return PlanLatency(
            parts=parts,
            weights=load.weights,
            gpu_share=load.rates @ self._gpu,
            up_share=by_port.sum(axis=1),
            down_share=by_port.sum(axis=0),
            place_share=load.rates * seconds / places,
        )


class _Meetings:
    """How long a phase of one request delays a phase of another where they meet.

    A request in a phase uses each GPU and port for a share of its time. One that meets it there
    waits for the rest of a visit, or for all of it where both take turns; so it goes on more
    slowly, but never longer than the other's phase lasts.
    """

    def __init__(
        self, server: Floats, visits: Floats, link: Floats, messages: Floats, network: Network
    ) -> None:
        number = 2 * len(server)
        up, down = link.sum(axis=3), link.sum(axis=2)  # [N, 2, N, 3]
        ports = np.concatenate([up, down], axis=2)
        port_visits = np.concatenate([messages.sum(axis=3), messages.sum(axis=2)], axis=2)
        if network.short_bytes > network.token_bytes:  # tokens do not wait for prompts
            ports, port_visits = (_by_phase(values) for values in (ports, port_visits))
        self._servers = len(server)
        use = np.concatenate([server.reshape(number, -1, 3), ports.reshape(number, -1, 3)], axis=1)
        self._held_s = use[..., 1]  # [P, resources], servers first
        # a visit that is met: its size, weighted by how long it lasts
        size = np.divide(
            use[..., 2], use[..., 1], out=np.zeros(use.shape[:2]), where=use[..., 1] > 0
        )
        self._size_s = size
        self._visits = np.concatenate(
            [visits.reshape(number, -1), port_visits.reshape(number, -1)], axis=1
        )
        self._waiting_s = np.zeros_like(self._held_s)

    def waiting_s(
        self, idle_s: Floats, phase_s: Floats, rates: Floats, others: Floats
    ) -> tuple[Floats, Floats]:
        """Seconds that phases wait at GPUs and at ports, [N, 2] each.

        ``idle_s`` and ``phase_s`` [N, 2] last phases without and with the waiting that the call
        before this one found; ``rates`` [N] are requests per second, and ``others`` [N] the share
        of them that a request of the same home can meet.
        """
        own_s, their_s = np.maximum(idle_s.ravel(), 1e-300), phase_s.ravel()
        starts = np.repeat(np.repeat(rates, 2)[None], len(own_s), axis=0)  # [own P, their P]
        homes = np.repeat(np.arange(len(rates)), 2)
        same = homes[:, None] == homes[None]
        starts = np.where(same, starts * np.repeat(others, 2)[None], starts)
        # of its time that the other is at a GPU or port, in work or waiting
        share = (self._held_s + self._waiting_s) / np.maximum(their_s, 1e-300)[:, None]
        wait = self._size_s * share * (1 + np.minimum(share, 1.0)) / 2  # of a visit that meets it
        slowdown = (self._visits @ wait.T) / own_s[:, None]
        delay = starts * _delay_s(slowdown, own_s[:, None], their_s[None])
        met = np.divide(delay, slowdown, out=np.zeros_like(delay), where=slowdown > 0)
        self._waiting_s = self._visits * (met @ wait) / own_s[:, None]
        shape = idle_s.shape
        at_gpus = self._waiting_s[:, : self._servers].sum(axis=1).reshape(shape)
        at_ports = self._waiting_s[:, self._servers :].sum(axis=1).reshape(shape)
        return at_gpus, at_ports


def _delay_s(slowdown: Floats, own_s: Floats, their_s: Floats) -> Floats:
    """Seconds of delay by phases that start once a second, on average.

    A phase of ``own_s`` takes ``slowdown`` seconds longer for each that it goes on while another is
    there, which starts at a random time and lasts ``their_s``. The integral over that time:
    """
    during = their_s / (1 + slowdown)  # of the own phase, while the other lasts
    longer = own_s * (their_s - slowdown * own_s / 2)
    shorter = during * own_s + slowdown * during**2 / 2
    found: Floats = slowdown * np.where(during >= own_s, longer, shorter)
    return found


def _by_phase(values: Floats) -> Floats:
    """Ports of each phase apart: [N, 2, ports, ...] becomes [N, 2, 2 ports, ...]."""
    apart = np.zeros((*values.shape[:2], 2 * values.shape[2], *values.shape[3:]))
    apart[:, PREFILL, : values.shape[2]] = values[:, PREFILL]
    apart[:, DECODE, values.shape[2] :] = values[:, DECODE]
    return apart


def _slowest(visits: Floats) -> Floats:
    """Parallel visits of a step, of which it waits for one: as many as the most frequent."""
    total = float(visits.sum())
    return visits * (float(visits.max()) / total) if total > 0 else visits
