"""The expected latency of a plan by formula: a request on its own, and its waiting for others.

Work, hops and calls of a request on its own follow the simulator's rules, for the prompts that are
given. Waiting is approximated (docs/design.md, section 10, "Latency of a plan"): at the home's
places as in M/G/c; at GPUs and ports by the phases of requests that are there together. Where
something is busy for more than a third of the time the formula orders plans at best.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.latency.contention import Contention
from prism_plan.latency.home_work import HomeWork, home_work, ratio
from prism_plan.latency.queueing import BUSIEST, waiting_for_places
from prism_plan.latency.workload import Site as Site
from prism_plan.latency.workload import Workload as Workload
from prism_plan.model_spec import require_same_model
from prism_plan.placement import Placement
from prism_plan.simulate.scenario import Scenario, require_covered

Floats = npt.NDArray[np.float64]

#: Parts of a request's time, in the order of ``PlanLatency.parts``.
PARTS = ("compute", "attention", "hops", "calls", "places", "gpus", "ports")
#: Up to this share of time waiting at GPUs is counted as it is.
TRUSTED = 0.25
#: Rounds at most in which waiting times and the requests in progress are made to agree.
ROUNDS = 12
#: They agree where no phase changes by more than this share.
AGREED = 1e-6


@dataclass(frozen=True, eq=False)
class PlanLatency:
    """Expected seconds of a request under a plan, by home and part.

    ``parts`` [N, 7] by home and :data:`PARTS`, zero without users; ``weights`` [N] the share of
    each home in all requests. ``gpu_share`` [G], ``up_share`` and ``down_share`` [N] are shares of
    time for which GPUs, uplinks and downlinks would be in use to serve all requests, and
    ``place_share`` [N] for which places of a home would be taken; at 1 and above requests come
    faster than they are answered, and the seconds mean no more than "too long".
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
    def busiest(self) -> float:
        """The largest share of time for which a GPU, a port or the places of a home are taken.

        Up to 0.3 the seconds are mostly within 10 % of the simulator's (design, section 10).
        """
        shares = (self.gpu_share, self.up_share, self.down_share, self.place_share)
        return float(max(share.max() for share in shares))

    @property
    def busiest_place(self) -> float:
        """The largest share of time for which the places of a home are taken."""
        return float(self.place_share.max())


def expected_latency(placement: Placement, scenario: Scenario) -> PlanLatency:
    """The expected latency of the scenario's requests under a placement and its execution table.

    Requests, model, cluster and route are the scenario's; its own placement and table are not
    looked at. Arrivals are taken for Poisson at the requests' rates, those without stationary rates
    for Poisson at their mean rate. Token buckets (``burst_kb``) are left out, and route `spread`
    takes the number of a prompt for that of a request.

    Raises
    ------
    InputError
        There are no requests; the scenario is of servers that offload, or of other servers or GPUs
        than the placement; an expert that is called is held nowhere.
    WrongModel
        The placement is of another model.
    """
    _require_same_cluster(placement, scenario)
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
        scenario.model, scenario.network, scenario.timing, scenario.gpu_start, scenario.dense_gpu,
        scenario.route,
    )  # fmt: skip
    return latency_of(placement.on_gpu, placement.execution_table, workload, site)


def _require_same_cluster(placement: Placement, scenario: Scenario) -> None:
    requests = scenario.requests
    if len(requests) == 0:
        raise InputError("no requests", parameter="scenario", expected="one at least")
    if scenario.offload:
        raise InputError(
            "servers that offload", parameter="scenario", expected="servers that call each other"
        )
    require_same_model(placement.model, scenario.model, source="", other="the scenario")
    gpus, expected = (
        ", ".join(
            f"{name} ({len(slots)} GPUs)"
            for name, slots in zip(of.servers, of.gpu_capacity, strict=True)
        )
        for of in (placement, scenario.placement)
    )
    if gpus != expected:
        raise InputError(
            gpus,
            parameter="placement",
            place="servers",
            expected=f"those of the scenario: {expected}",
        )
    require_covered(placement, requests)


def latency_of(
    on_gpu: npt.NDArray[np.bool_], table: npt.NDArray[np.int32], workload: Workload, site: Site
) -> PlanLatency:
    """The expected latency under a placement bool [G, L, E] and an execution table [N, L].

    Every expert that prompts call must be held somewhere; calls of others are left out.
    """
    return latency_of_work(home_work(on_gpu, table, workload, site), workload, site)


def latency_of_work(work: HomeWork, workload: Workload, site: Site) -> PlanLatency:
    """The expected latency of requests that ask this of GPUs and links."""
    phase_s, gpus, ports = _with_contention(work, workload, site)
    seconds = phase_s.sum(axis=1)
    rates = workload.rates
    parts = np.zeros((len(seconds), len(PARTS)))
    parts[:, :4] = work.idle_s.sum(axis=1)
    parts[:, 5], parts[:, 6] = gpus.sum(axis=1), ports.sum(axis=1)
    # requests vary by their own work; waiting makes each of them longer by the same factor
    longer = ratio(seconds, work.idle_s.sum(axis=(1, 2)))
    for n in np.flatnonzero(seconds).tolist():
        parts[n, 4] = waiting_for_places(
            workload.places[n], float(rates[n]), float(seconds[n]),
            float(work.squared_s2[n] * longer[n] ** 2),
        )  # fmt: skip
    by_port = np.einsum("n,nfab->ab", rates, work.links[..., 1])
    return PlanLatency(
        parts=parts,
        weights=workload.weights,
        gpu_share=rates @ work.gpus,
        up_share=by_port.sum(axis=1),
        down_share=by_port.sum(axis=0),
        place_share=rates * seconds / np.array(workload.places, np.float64),
    )


def _shared_gpus_s(work: HomeWork, served: Floats, others: Floats) -> Floats:
    """Seconds that phases wait at GPUs at most, [N, 2]: contention is too much where all are busy.

    As in processor sharing, of which a request gets the half that comes to it where it is seldom at
    a GPU, as in M/D/1, and all of it where it is always there; and the rest of others' phases. No
    limit where servers are busy for :data:`TRUSTED` of the time at most; the whole limit at twice
    that.
    """
    held_s = work.servers[..., 1]  # [N, 2, N]
    by_home = held_s.sum(axis=1)
    asked = served @ by_home  # share of time by server
    own = (1 - others)[:, None] * served[:, None] * by_home
    share = np.clip(asked - own, 0.0, BUSIEST)
    rest = served @ (held_s**2 / 2).sum(axis=1)
    present = ratio(held_s, work.idle_s.sum(axis=2)[..., None])
    waiting = held_s * (1 + present) / 2 * (share / (1 - share))[:, None, :]
    visited = held_s > 0
    most = waiting.sum(axis=2) + (visited * rest).sum(axis=2)
    busiest = np.where(visited, share[:, None, :], 0.0).max(axis=2)
    found: Floats = most / np.clip((busiest - TRUSTED) / TRUSTED, 1e-9, 1.0)
    return found


def _with_contention(
    work: HomeWork, workload: Workload, site: Site
) -> tuple[Floats, Floats, Floats]:
    """Seconds of phases with waiting, and of these the waiting at GPUs and at ports, [N, 2] each.

    The longer requests wait, the more of them are in progress, and wait for each other.
    """
    idle_s = work.idle_s.sum(axis=2)
    phase_s = idle_s
    places = np.array(workload.places, np.float64)
    contention = Contention(work, site.network)
    for _ in range(ROUNDS):
        seconds = phase_s.sum(axis=1)
        asked = workload.rates * seconds  # requests in progress, where places are enough
        served = workload.rates * np.minimum(1.0, ratio(places, np.maximum(asked, places)))
        # of a home's own requests those that hold another place
        others = np.minimum(1.0, (places - 1) / np.maximum(np.minimum(asked, places), 1e-9))
        gpus, ports = contention.waiting_s(idle_s, phase_s, served, others)
        gpus = np.minimum(gpus, _shared_gpus_s(work, served, others))
        before, phase_s = phase_s, idle_s + gpus + ports
        if np.all(np.abs(phase_s - before) <= AGREED * phase_s):
            break
    return phase_s, gpus, ports
