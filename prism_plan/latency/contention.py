"""How long requests delay each other at GPUs and links, by the phases in which they are there."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from prism_plan.latency.home_work import HomeWork, ratio
from prism_plan.latency.layer_work import DECODE, PREFILL
from prism_plan.simulate.network import Network

Floats = npt.NDArray[np.float64]

#: Of the calls that a step has beside its slowest, the share for which it waits where others are in
#: their way, by its own phase (row) and theirs (column). A token's calls are short against a
#: prompt's, so that any of them becomes the slowest; fitted to the simulator.
EXPOSED = np.array([[0.25, 0.0], [0.5, 0.25]])
#: The power with which waiting gives a phase more others beside it: 0 would be none, and 1 as if
#: no two of these others were ever there together; fitted to the simulator.
LONGER = 0.7
#: Of the other's time, the most for which one that follows it is taken to stand still.
MOST_FOLLOWED = 0.9


class Contention:
    """How long a phase of one request delays a phase of another that uses the same GPU or port.

    A request in a phase uses each GPU and port for a share of its time. One that finds it there
    waits for the rest of a use, or for all of it where both take turns; so it goes on more slowly,
    but never longer than the other's phase lasts (:func:`delay_s`).

    Resources are the GPUs of each server, its uplink and its downlink; a message uses an uplink and
    a downlink together. Two messages of one pair of servers would be counted at both ports, so what
    they wait for each other is taken off once, as at a resource of its own, the pair.
    ``P`` below counts phases of homes, 2 n + phase, and ``R`` resources, GPUs first.
    """

    def __init__(self, work: HomeWork, network: Network) -> None:
        servers = len(work.idle_s)
        by_pair = (servers, 2, servers**2)
        up, down = work.links.sum(axis=3), work.links.sum(axis=2)  # [N, 2, N, 3]
        up[..., 2] += work.trains[:, :, 0]
        down[..., 2] += work.trains[:, :, 1]
        links = np.concatenate([up, down, work.links.reshape(*by_pair, 3)], axis=2)
        messages = np.concatenate(
            [work.messages.sum(axis=3), work.messages.sum(axis=2), work.messages.reshape(by_pair)],
            axis=2,
        )
        beside = np.concatenate([work.beside, work.beside, np.zeros(by_pair)], axis=2)
        sign = np.repeat([1.0, -1.0], [2 * servers, servers**2])
        tokens_wait = network.short_bytes <= network.token_bytes
        if not tokens_wait:  # short messages have ports of their own, so prompts do not delay them
            links, messages, beside = (_by_phase(of) for of in (links, messages, beside))
            sign = np.tile(sign, 2)
        kept = links[..., 1].any(axis=(0, 1))
        uses = np.concatenate([work.servers, links[:, :, kept]], axis=2).reshape(2 * servers, -1, 3)
        visits = np.concatenate([work.visits, messages[:, :, kept]], axis=2)
        self._servers = servers
        self._sign = np.concatenate([np.ones(servers), sign[kept]])  # [R]
        self._visits = visits.reshape(2 * servers, -1)  # [P, R]
        self._beside = np.concatenate([work.beside, beside[:, :, kept]], axis=2).reshape(
            2 * servers, -1
        )
        self._held_s = uses[..., 1]
        # seconds of a use that a visit finds: the longer, the more often
        self._size_s = ratio(uses[..., 2], uses[..., 1])
        self._waiting_s = np.zeros_like(self._held_s)
        self._turns = self._again(work)
        self._followed_s = self._common_hops_s(work) if tokens_wait else 0.0

    def _again(self, work: HomeWork) -> Floats:
        """Share of visits to GPUs that come right after another one there, [P, N].

        The square root, so that the product of two requests' is that of both where they are alike.
        """
        visits = self._visits[:, : self._servers]
        runs = work.runs.reshape(visits.shape)
        again: Floats = np.sqrt(np.maximum(ratio(visits - runs, visits), 0.0))
        return again

    def _common_hops_s(self, work: HomeWork) -> Floats:
        """Seconds of a prompt's hops (column) along pairs that tokens (row) take too, [P, P]."""
        hops_s = work.hops_s.reshape(2 * self._servers, -1)
        common: Floats = (hops_s > 0) @ hops_s.T
        common[PREFILL::2] = 0.0
        common[:, DECODE::2] = 0.0
        return common

    def waiting_s(
        self, idle_s: Floats, phase_s: Floats, rates: Floats, others: Floats
    ) -> tuple[Floats, Floats]:
        """Seconds that phases wait at GPUs and at ports, [N, 2] each.

        ``idle_s`` and ``phase_s`` [N, 2] last phases without and with the waiting that the call
        before this one found; ``rates`` [N] are requests per second, and ``others`` [N] the share
        of them that a request of the same home can have beside it.
        """
        n = self._servers
        work_s, lasts_s = idle_s.ravel()[:, None], phase_s.ravel()[:, None]
        homes = np.repeat(np.arange(n), 2)
        same = homes[:, None] == homes[None]
        starts = np.where(same, (rates * others)[homes], rates[homes])  # [own P, their P]

        # Of its time that the other is at a resource, in use or waiting; and for how long a visit
        # that finds it there waits: half a use, or all of it where the other comes back in turn.
        share = ratio(self._held_s + self._waiting_s, lasts_s)
        half_s = self._size_s * share / 2
        back = np.minimum(share, 1.0)
        wait_s = half_s * (1 + back) * self._sign  # [their P, R]
        turn_s = half_s[:, :n] * (1 - back[:, :n]) * self._turns
        own_turns = self._visits[:, :n] * self._turns
        visits = [  # by their phase, [own P, R]
            self._visits + np.tile(EXPOSED[:, phase], n)[:, None] * self._beside
            for phase in (PREFILL, DECODE)
        ]
        gpus_s = own_turns @ turn_s.T  # [own P, their P]: while both are there all the time
        ports_s = np.zeros_like(gpus_s)
        for phase in (PREFILL, DECODE):
            theirs = slice(phase, None, 2)
            gpus_s[:, theirs] += visits[phase][:, :n] @ wait_s[theirs, :n].T
            ports_s[:, theirs] += visits[phase][:, n:] @ wait_s[theirs, n:].T
        ports_s = np.maximum(ports_s, 0.0)

        # A token that catches up with a prompt on a hop stays behind it on the hops that follow.
        followed_s = np.broadcast_to(self._followed_s, ports_s.shape)
        followed = np.minimum(ratio(followed_s, lasts_s.T), MOST_FOLLOWED)
        behind_s = np.maximum(ports_s, work_s * followed / (1 - followed))
        # The longer a phase lasts with its waiting, the more others are beside it.
        alone_s = work_s ** (1 - LONGER) * lasts_s**LONGER
        slowdown = ratio(gpus_s + behind_s, alone_s)
        # A prompt that others slow down ends, and its tokens begin, rather when these are gone.
        there = np.ones_like(slowdown)
        there[DECODE::2] = 1 / (1 + slowdown[PREFILL::2])
        delays_s = starts * delay_s(slowdown, alone_s, lasts_s.T, there)

        met = ratio(delays_s, gpus_s + ports_s)
        waiting_s = np.zeros_like(self._held_s)
        waiting_s[:, :n] = own_turns * (met @ turn_s)
        for phase in (PREFILL, DECODE):
            theirs = slice(phase, None, 2)
            waiting_s += visits[phase] * (met[:, theirs] @ wait_s[theirs])
        self._waiting_s = np.abs(waiting_s)
        at_gpus = waiting_s[:, :n].sum(axis=1).reshape(idle_s.shape)
        at_ports = waiting_s[:, n:].sum(axis=1).reshape(idle_s.shape)
        return at_gpus, at_ports


def delay_s(slowdown: Floats, own_s: Floats, their_s: Floats, there: Floats) -> Floats:
    """Seconds by which phases that start once a second delay a phase, on average; any one shape.

    A phase that lasts ``own_s`` without such another takes ``slowdown`` seconds longer for each
    second of its work while another is there, which begins at a random time and lasts ``their_s``.
    In x seconds beside the other x / (1 + slowdown) of the work is done, and slowdown times that is
    lost. The two are side by side until the own work or the other phase ends; this is the integral
    over the time at which the other begins. Those that begin before the own phase count ``there``.
    """
    during = their_s / (1 + slowdown)  # work that is done while the other phase lasts
    most = np.minimum(during, own_s)
    later = most * own_s - most**2 / 2
    before = (1 + slowdown) * (most**2 / 2 + own_s * (during - most))
    found: Floats = slowdown * (later + there * before)
    return found


def _by_phase(values: Floats) -> Floats:
    """Links of each phase apart: [N, 2, links, ...] becomes [N, 2, 2 links, ...]."""
    links = values.shape[2]
    apart = np.zeros((*values.shape[:2], 2 * links, *values.shape[3:]))
    apart[:, PREFILL, :links] = values[:, PREFILL]
    apart[:, DECODE, links:] = values[:, DECODE]
    return apart
