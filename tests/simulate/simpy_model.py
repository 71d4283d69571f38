"""The same scenarios as processes of SimPy: another simulator, another way to write the rules.

Requests are processes that hold a place at home; GPUs are resources of capacity one. Messages that
are ready stand in one list for the whole cluster, which is gone through from its front whenever a
message joins it or a transfer ends: each message whose sender's uplink and receiver's downlink are
both free leaves it and takes them. No bursts, no offload, no migration.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import numpy.typing as npt
import simpy

from prism_plan.simulate.network import BYTES_PER_CALL, BYTES_PER_TOKEN_ID
from prism_plan.simulate.routing_policies import cover, nearest, spread
from prism_plan.simulate.scenario import Scenario

Process = Generator[Any, Any, None]


class SimpyModel:
    """A scenario on SimPy; ``done_s`` [R] after :meth:`run`, ``processed`` counts its events."""

    def __init__(self, scenario: Scenario) -> None:
        self.s = scenario
        servers = len(scenario.concurrency)
        self.env = env = simpy.Environment()
        self.place = [simpy.Resource(env, places) for places in scenario.concurrency]
        self.gpu = [simpy.Resource(env) for _ in scenario.timing.kind]
        self.ready: list[tuple[int, int, simpy.Event]] = []  # sender, receiver, its start
        self.busy: set[tuple[str, int]] = set()  # ports in use
        self.sent = [[0] * servers for _ in range(servers)]
        self.done_s = np.full(len(scenario.requests), np.nan)
        self.local = scenario.placement.local

    def run(self) -> npt.NDArray[np.float64]:
        """When each request was answered."""
        self.env.process(self.arrivals())
        self.env.run()
        return self.done_s

    def arrivals(self) -> Process:
        """Start each request when it arrives."""
        for r, at_s in enumerate(self.s.requests.arrival_s):
            yield self.env.timeout(at_s - self.env.now)
            self.env.process(self.request(r))

    def request(self, r: int) -> Process:
        """Wait for a place; then prefill at once and decode token by token, span by span.

        The place is held until the last token's id is at home.
        """
        prompts, p = self.s.requests.prompts, self.s.requests.prompt[r]
        home = int(self.s.requests.home[r])
        row = int(prompts.first_row[p])
        prefill, decode = int(prompts.prefill_tokens[p]), int(prompts.decode_tokens[p])
        table = self.s.execution[home].tolist()
        first, driver = table[0], table[-1]
        passes = [prefill] * (prefill > 0) + [1] * decode
        to_home = []
        context = 0
        with self.place[home].request() as place:
            yield place
            if first != home:
                yield from self.hop(home, first, BYTES_PER_TOKEN_ID * passes[0])
            for number, tokens in enumerate(passes):
                at = first
                is_prompt = prefill > 0 and number == 0
                for layer, server in enumerate(table):
                    if server != at:
                        yield from self.hop(at, server, tokens * self.s.network.token_bytes)
                        at = server
                    step = prompts.experts[row : row + tokens, layer].tolist()
                    yield from self.layer(r, at, layer, step, None if is_prompt else context)
                row += tokens
                context += tokens
                last = number == len(passes) - 1
                begun = None
                if not last and first != driver:
                    begun = self.env.process(self.hop(driver, first, BYTES_PER_TOKEN_ID))
                if home != driver and (last or home != first):
                    id_home = self.hop(driver, home, BYTES_PER_TOKEN_ID)
                    to_home.append(self.env.process(id_home))
                if begun is not None:
                    yield begun
            yield self.env.all_of(to_home)
        self.done_s[r] = self.env.now

    def hop(self, a: int, b: int, payload: int) -> Process:
        """Overhead, then a message that nobody answers."""
        yield self.env.timeout(self.s.network.hop_overhead_s)
        yield from self.message(a, b, payload)

    def layer(
        self, r: int, home: int, layer: int, step: list[list[int]], context: int | None
    ) -> Process:
        """Dense part where the layer executes; then local experts and calls side by side."""
        gpu = int(self.s.dense_gpu[home])
        yield from self.work(gpu, self.s.timing.dense_s(gpu, layer, len(step), context))
        tokens_to: dict[int, int] = {}
        batches: dict[int, dict[int, int]] = {}
        for token in step:
            place = self.places(r, home, layer, token)
            for e, m in zip(token, place, strict=True):
                batch = batches.setdefault(m, {})
                batch[e] = batch.get(e, 0) + 1
            for m in set(place) - {home}:
                tokens_to[m] = tokens_to.get(m, 0) + 1
                self.sent[home][m] += 1
        parts = []
        for m, batch in sorted(batches.items()):
            if m == home:
                parts.append(self.env.process(self.compute(m, layer, batch)))
            else:
                parts.append(self.env.process(self.call(home, m, layer, tokens_to[m], batch)))
        yield self.env.all_of(parts)

    def places(self, r: int, home: int, layer: int, token: list[int]) -> list[int]:
        """The server of each expert of a token."""
        missing = [e for e in token if not self.local[home, layer, e]]
        holders = [np.flatnonzero(self.local[:, layer, e]).tolist() for e in missing]
        if self.s.route == "cover":
            chosen = cover(holders, self.sent[home])
        elif self.s.route == "nearest":
            rank = self.s.network.call_cost_s()[home].tolist()
            chosen = [nearest(rank, held) for held in holders]
        else:
            first = layer * self.local.shape[2]
            pairs = [first + e for e in missing]
            chosen = [spread(r, p, held) for p, held in zip(pairs, holders, strict=True)]
        where = dict(zip(missing, chosen, strict=True))
        return [where.get(e, home) for e in token]

    def compute(self, server: int, layer: int, batch: dict[int, int]) -> Process:
        """A batch on the GPUs of a server, side by side."""
        timing, held = self.s.timing, self.s.placement.on_gpu[:, layer]
        work_s: dict[int, float] = {}
        for e, tokens in batch.items():
            gpu = min(g for g in self.s.placement.gpus_of(server).tolist() if held[g, e])
            entry = timing.expert_s[timing.kind[gpu], timing.size[layer], tokens]
            work_s[gpu] = work_s.get(gpu, 0.0) + entry
        yield self.env.all_of([self.env.process(self.work(g, w)) for g, w in work_s.items()])

    def work(self, gpu: int, work_s: float) -> Process:
        """One thing at a time on a GPU."""
        with self.gpu[gpu].request() as turn:
            yield turn
            yield self.env.timeout(work_s)

    def call(self, home: int, m: int, layer: int, tokens: int, batch: dict[int, int]) -> Process:
        """Overhead, message out, experts there, message back."""
        states = tokens * self.s.network.token_bytes
        yield self.env.timeout(self.s.network.call_overhead_s)
        yield from self.message(home, m, states + BYTES_PER_CALL * sum(batch.values()))
        yield from self.compute(m, layer, batch)
        yield from self.message(m, home, states)

    def message(self, a: int, b: int, payload: int) -> Process:
        """Hold both ports while the payload passes; then half a round trip."""
        start = self.env.event()
        self.ready.append((a, b, start))
        self.start_messages()
        yield start
        yield self.env.timeout(payload * self.s.network.seconds_per_byte[a, b])
        self.busy -= {("up", a), ("down", b)}
        self.start_messages()
        yield self.env.timeout(self.s.network.half_rtt_s[a, b])

    def start_messages(self) -> None:
        """Start every message that finds its ports free, those that were ready first before."""
        for message in list(self.ready):
            a, b, start = message
            ports = {("up", a), ("down", b)}
            if not ports & self.busy:
                self.busy |= ports
                self.ready.remove(message)
                start.succeed()
