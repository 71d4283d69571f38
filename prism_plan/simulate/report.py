"""The report of a simulated run: latencies, shares and traffic, from an engine's measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.simulate.engine_interface import Outcome
from prism_plan.simulate.loss_report import Losses
from prism_plan.simulate.requests import Requests
from prism_plan.simulate.scenario import Scenario

Floats = npt.NDArray[np.float64]

#: Bins of the timeline, over the time in which requests arrive.
TIMELINE_BINS = 60
#: Little's law holds within this share, or the engine is broken.
LITTLE_TOLERANCE = 1e-9


@dataclass(frozen=True)
class ReviewRecord:
    """One review: its decision, and the end of the migration where that was a move.

    ``saving_s`` and ``cost_s`` are those of the move that was considered, ``None`` where the review
    considered none: the migration before was still under way, or no candidate fits beside the KV
    caches of its execution table.
    """

    at_s: float
    moved_experts: int
    moved_bytes: int
    decision: str
    saving_s: float | None
    cost_s: float | None
    finished_at_s: float | None = None


@dataclass(frozen=True, eq=False)
class SimulationRun:
    """The simulated run of one placement: its scenario, measurements, reviews and losses."""

    placement: str
    solver: str
    scenario: Scenario
    outcome: Outcome
    experts: npt.NDArray[np.int64]
    migrations: tuple[ReviewRecord, ...] = ()
    partial: bool = False
    runtime_s: float = 0.0
    notes: tuple[str, ...] = ()
    losses: Losses | None = None

    @property
    def latency_s(self) -> Floats:
        """From arrival to the last token of each request, [R]; NaN where it has none."""
        return self.outcome.done_s - self.scenario.requests.arrival_s

    @property
    def ttft_s(self) -> Floats:
        """From arrival to the first token, [R]."""
        return self._of_counted(self.outcome.first_token_s) - self.scenario.requests.arrival_s

    @property
    def tpot_s(self) -> Floats:
        """Time per output token after the first, [R]; NaN where there is only one."""
        return time_per_output_token(self.scenario.requests, self.outcome)

    @property
    def queueing_s(self) -> Floats:
        """From arrival to admission, [R]."""
        return self._of_counted(self.outcome.start_s) - self.scenario.requests.arrival_s

    def _of_counted(self, times_s: Floats) -> Floats:
        """Times of the requests that count, [R]; NaN for those that left without an answer."""
        if self.losses is None:
            return times_s
        return np.where(np.isfinite(self.losses.outcome.left_s), np.nan, times_s)

    def utilisation(self) -> list[float | None]:
        """Utilisation of each server's admission slots: rate x mean service / concurrency.

        At 1 or more, requests arrive faster than they are served and the queue grows without end.
        ``None`` where nothing finished or no rate is known.
        """
        requests, outcome = self.scenario.requests, self.outcome
        service_s = outcome.done_s - outcome.start_s
        utilisations: list[float | None] = []
        for n, places in enumerate(self.scenario.concurrency):
            own = requests.home == n
            served = service_s[own & np.isfinite(service_s)]
            rate = _rate(requests, n, own)
            known = len(served) > 0 and rate is not None
            utilisations.append(float(served.mean()) * rate / places if known and rate else None)
        return utilisations

    def offered_load(self) -> dict[str, float]:
        """Utilisation that the arrivals ask of admission slots, GPUs and links, by name.

        Names are ``a`` (the slots of server a), ``a gpu[0]``, ``a uplink`` and ``a downlink``;
        what is not known is left out. Slots: see :meth:`utilisation`. GPUs and links: their busy
        time over the time in which the run's requests arrive, or over the simulated time if the
        run is partial. At 1 or more, queues grow as long as requests arrive; where a GPU or link
        is at 1, more ``concurrency`` does not help.
        """
        names = self.scenario.placement.servers
        load_by_name = {
            name: share
            for name, share in zip(names, self.utilisation(), strict=True)
            if share is not None
        }
        span_s = self._span_s()
        if not span_s:
            return load_by_name
        outcome, start = self.outcome, self.scenario.gpu_start
        for n, name in enumerate(names):
            for g in range(int(start[n]), int(start[n + 1])):
                load_by_name[f"{name} gpu[{g - int(start[n])}]"] = float(
                    outcome.gpu_busy_s[g] / span_s
                )
            load_by_name[f"{name} uplink"] = float(outcome.up_busy_s[n] / span_s)
            load_by_name[f"{name} downlink"] = float(outcome.down_busy_s[n] / span_s)
        return load_by_name

    def _span_s(self) -> float | None:
        """Seconds in which that many requests arrive at their rates."""
        requests, now_s = self.scenario.requests, self.outcome.now_s
        if self.partial:
            return now_s
        spans = []
        for n in np.unique(requests.home):
            own = requests.home == n
            rate = _rate(requests, int(n), own)
            if rate:
                spans.append(int(own.sum()) / rate)
        return max(spans, default=None)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as in docs/design.md, section 6."""
        self.require_littles_law()
        requests, outcome = self.scenario.requests, self.outcome
        phases = [start.to_json() for start in requests.phases]
        return {
            "placement": self.placement,
            "solver": self.solver,
            "partial": self.partial,
            "requests": len(requests),
            "finished": int(np.isfinite(outcome.done_s).sum()),
            "latency_s": summary(self.latency_s),
            "ttft_s": summary(self.ttft_s),
            "tpot_s": summary(self.tpot_s),
            "user_tokens_per_s": user_tokens_per_s(self.tpot_s),
            "queueing_s": summary(self.queueing_s),
            "remote_share": _share(outcome.remote_calls.sum(), outcome.calls.sum()),
            "waiting_share": _share(outcome.waiting.sum(), outcome.steps.sum()),
            "destinations": _share(outcome.destinations.sum(), outcome.steps.sum()),
            "expert_calls": int(outcome.calls.sum()),
            "remote_calls": int(outcome.remote_calls.sum()),
            "messages": int(outcome.messages.sum()),
            **({"hops": int(outcome.hops.sum())} if self._had_table else {}),
            "bytes_sent": int(outcome.bytes_out.sum()),
            "busiest": max(self.offered_load().values(), default=None),
            "servers": self._servers(),
            "migrations": [vars(migration) for migration in self.migrations],
            "layer_latency_s": [
                {
                    "remote_experts": remote,
                    "steps": int(steps),
                    "mean": float(total / steps) if steps else None,
                }
                for remote, (steps, total) in enumerate(
                    zip(outcome.layer_steps, outcome.layer_s, strict=True)
                )
            ],
            "latency_quantiles_s": _quantiles(self.latency_s),
            "timeline": _timeline(requests.arrival_s, self.latency_s),
            **({"phases": phases} if phases else {}),
            **({"losses": self._losses(self.losses)} if self.losses else {}),
            "loads": outcome.loads,
            "loaded_bytes": outcome.loaded_bytes,
            "events": outcome.events,
            "simulated_s": outcome.now_s,
            "runtime_s": self.runtime_s,
        }

    def _losses(self, losses: Losses) -> dict[str, Any]:
        """Lost servers, what became of requests, and times before, during and after."""
        when = losses.when(self.scenario.requests.arrival_s, self.outcome.done_s)
        return {
            "servers": [record.to_json() for record in losses.records],
            **losses.counts(),
            **{
                name: {
                    "requests": int(chosen.sum()),
                    "latency_s": summary(self.latency_s[chosen]),
                    "ttft_s": summary(self.ttft_s[chosen]),
                }
                for name, chosen in when.items()
            },
        }

    @property
    def _had_table(self) -> bool:
        """Whether layers executed elsewhere than at home, from the start or since a review."""
        return self.scenario.has_table or bool(self.outcome.hops.any())

    def _servers(self) -> list[dict[str, Any]]:
        requests, outcome = self.scenario.requests, self.outcome
        span_s = outcome.now_s or math.inf
        rows = []
        utilisation = self.utilisation()
        for n, name in enumerate(self.scenario.placement.servers):
            own = requests.home == n
            gpus = range(int(self.scenario.gpu_start[n]), int(self.scenario.gpu_start[n + 1]))
            rows.append(
                {
                    "name": name,
                    "requests": int(own.sum()),
                    "latency_s": summary(self.latency_s[own]),
                    "utilisation": utilisation[n],
                    "remote_share": _share(outcome.remote_calls[n], outcome.calls[n]),
                    "waiting_share": _share(outcome.waiting[n], outcome.steps[n]),
                    "destinations": _share(outcome.destinations[n], outcome.steps[n]),
                    "bytes_sent": int(outcome.bytes_out[n]),
                    "bytes_received": int(outcome.bytes_in[n]),
                    "uplink_busy": float(outcome.up_busy_s[n] / span_s),
                    "downlink_busy": float(outcome.down_busy_s[n] / span_s),
                    "gpus": [
                        {
                            "busy": float(outcome.gpu_busy_s[g] / span_s),
                            "experts": int(self.experts[g]),
                            "expert_calls": int(outcome.served[g]),
                        }
                        for g in gpus
                    ],
                }
            )
        return rows

    def require_littles_law(self) -> None:
        """Check that requests' times at a server add up to the integral of their number.

        Raises
        ------
        AssertionError
            They do not: the engine is broken.
        """
        requests, outcome = self.scenario.requests, self.outcome
        end_s = np.where(np.isfinite(outcome.done_s), outcome.done_s, outcome.now_s)
        if self.losses is not None:
            left_s = self.losses.outcome.left_s
            end_s = np.where(np.isfinite(left_s), left_s, end_s)
        spent_s = np.maximum(end_s - requests.arrival_s, 0.0)
        for n, present_s in enumerate(outcome.present_s):
            total_s = math.fsum(spent_s[requests.home == n])
            if abs(total_s - present_s) > LITTLE_TOLERANCE * max(total_s, outcome.now_s, 1.0):
                raise AssertionError(
                    f"server {n}: requests spent {total_s} s, but {present_s} s were counted"
                )


def time_per_output_token(requests: Requests, outcome: Outcome) -> Floats:
    """Seconds per output token after the first of each request, [R]; NaN where there is only one.

    TPOT of serving benchmarks: the time from the first token to the last over the tokens between.
    """
    tokens = requests.later_tokens
    after_s = outcome.done_s - outcome.first_token_s
    return np.where(tokens > 0, after_s / np.maximum(tokens, 1), np.nan)


def user_tokens_per_s(tpot_s: Floats) -> float | None:
    """Output tokens a second that a user sees after the first token: 1 / mean of ``tpot_s``.

    So serving benchmarks compute the speed for a user from the mean TPOT: every request counts
    alike, however long its answer. (A mean of the requests' own speeds would be larger, and hide
    the slow ones.) ``None`` where no finished request has a second token, or tokens take no time.
    """
    mean_s = summary(tpot_s)["mean"]
    return 1 / mean_s if mean_s else None


def _rate(requests: Requests, server: int, own: npt.NDArray[np.bool_]) -> float | None:
    if requests.rate is not None:
        return float(requests.rate[server])
    arrivals = requests.arrival_s[own]
    span_s = float(arrivals[-1] - arrivals[0]) if len(arrivals) else 0.0
    return (len(arrivals) - 1) / span_s if span_s > 0 else None


def summary(times_s: Floats) -> dict[str, float | None]:
    """Mean and percentiles of the finite times (linear between order statistics)."""
    finite = times_s[np.isfinite(times_s)]
    if not len(finite):
        return dict.fromkeys(("mean", "p50", "p95", "p99", "max"))
    p50, p95, p99 = np.percentile(finite, [50, 95, 99])
    return {
        "mean": math.fsum(finite) / len(finite),
        "p50": float(p50),
        "p95": float(p95),
        "p99": float(p99),
        "max": float(finite.max()),
    }


def _share(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None


def _quantiles(times_s: Floats) -> list[float]:
    finite = times_s[np.isfinite(times_s)]
    return np.percentile(finite, np.arange(101)).tolist() if len(finite) else []


def _timeline(arrival_s: Floats, latency_s: Floats) -> dict[str, Any]:
    """Requests and their mean latency by time of arrival."""
    last_s = float(arrival_s[-1]) if len(arrival_s) else 0.0
    bin_s = _round_up(last_s / TIMELINE_BINS)
    at = np.minimum((arrival_s / bin_s).astype(np.int64), TIMELINE_BINS - 1)
    bins = int(at[-1]) + 1 if len(at) else 0
    finite = np.isfinite(latency_s)
    number = np.bincount(at[finite], minlength=bins)
    total = np.bincount(at[finite], weights=latency_s[finite], minlength=bins)
    return {
        "bin_s": bin_s,
        "arrivals": np.bincount(at, minlength=bins).tolist(),
        "mean_latency_s": [float(s / k) if k else None for s, k in zip(total, number, strict=True)],
    }


def _round_up(seconds: float) -> float:
    """The next of 1, 2, 5, 10, ... times a power of ten."""
    if seconds < 1e-9:  # below what powers of ten can express
        return 1.0
    power = 10.0 ** math.floor(math.log10(seconds))
    return next(step * power for step in (1.0, 2.0, 5.0, 10.0, 20.0) if step * power >= seconds)


def notes(runs: Sequence[SimulationRun], *, calibrated: bool = False) -> list[str]:
    """Warnings about the runs: overloaded servers, routes drawn from counts, unknown attention.

    ``calibrated``: the dense time was measured, attention included.
    """
    warnings = []
    for run in runs:
        loads = sorted(run.offered_load().items(), key=lambda item: -item[1])
        unstable = [f"{name} {share:.2f}" for name, share in loads if share >= 1]
        if unstable:
            shown = ", ".join(unstable[:5]) + (
                f" and {len(unstable) - 5} more" if len(unstable) > 5 else ""
            )
            warnings.append(
                f"{run.placement}: unstable load: requests arrive faster than they are served "
                f"(utilisation {shown}); latencies grow with the length of the run"
            )
    if runs and not runs[0].scenario.requests.prompts.co_activation:
        warnings.append(
            "tokens were drawn from counts: which experts a token calls together is not real, so "
            "waiting shares, destinations and latencies are not those of the model"
        )
    if runs and not calibrated:
        scenario = runs[0].scenario
        unknown = scenario.model.attention_flops is None
        if unknown and scenario.requests.prompts.prefill_tokens.any():
            warnings.append(
                f"attention_flops of {scenario.model.name} is not known: prompts pay nothing for "
                "pairs of tokens, so the prefill of long ones takes longer than simulated"
            )
    return warnings
