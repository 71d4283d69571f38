"""`simulate_placements`: from placements, requests and a cluster to latencies and migrations."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prism_plan.cluster import Cluster
from prism_plan.errors import InputError
from prism_plan.evaluate.loss_runner import LossRunner
from prism_plan.evaluate.simulation_checks import cluster_rules, prepare, require_few_reviews
from prism_plan.evaluate.simulation_options import SimulationOptions
from prism_plan.evaluate.simulation_runner import SimulationRunner
from prism_plan.io.file_writing import write_bytes
from prism_plan.io.text_files import file_name_text
from prism_plan.migration.statistics import Window
from prism_plan.placement import InputFile, Placement
from prism_plan.simulate.report import SimulationRun, notes
from prism_plan.simulate.requests import Requests
from prism_plan.trace import Trace

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Simulation:
    """The simulated runs of several placements under the same requests.

    ``partial``: a run is incomplete or missing; ``interrupted``: because of Ctrl-C, not of the time
    limit.
    """

    runs: tuple[SimulationRun, ...]
    options: SimulationOptions
    seed: int
    trace: InputFile
    kind: str
    cluster: InputFile
    partial: bool = False
    notes: tuple[str, ...] = field(default=())
    interrupted: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values, format ``prism-plan/simulation`` version 1."""
        options, timing_name = self.options, "cluster"
        if options.calibration is not None:
            timing_name = file_name_text(options.calibration.name) or "calibration"
        values: dict[str, Any] = {
            "format": "prism-plan/simulation",
            "version": 1,
            "partial": self.partial,
            "seed": self.seed,
            "route": options.route,
            "migrate": options.migrate,
            "timing": timing_name,
            "trace": {"name": self.trace.name, "sha256": self.trace.sha256, "kind": self.kind},
            "cluster": {"name": self.cluster.name, "sha256": self.cluster.sha256},
            "notes": list(self.notes),
        }
        if options.migrate != "never":
            policy, counting = options.policy(), options.counting()
            values["review"] = {
                "every_s": options.migrate_every_s,
                "horizon_s": policy.horizon_s,
                "half_life_s": counting.half_life_s if isinstance(counting, Window) else None,
                "cost": policy.cost,
                "solver": policy.solver if policy.kind == "prism" else None,
            }
        if options.lose:
            values["losses"] = {
                "timeout_s": options.timeout_s,
                "request_timeout_s": options.request_timeout_s,
            }
        return {**values, "runs": [run.to_json() for run in self.runs]}

    def to_frame(self, level: str = "placement") -> pd.DataFrame:
        """One row a placement, or with ``level`` "server", "review" or "request" one of these.

        Columns are those of :func:`prism_plan.simulation_frame`. Of requests, numbered from 0, they
        are those of ``prism-plan simulate --per-request``: run, placement, request, server, task,
        trace_request, prefill_tokens, decode_tokens, and arrival_s, start_s, first_token_s and
        done_s in seconds, NaN where it did not happen.

        Raises
        ------
        InputError
            An unknown level.
        """
        from prism_plan.evaluate.data_frames import require_request_level, simulation_frame
        from prism_plan.evaluate.request_table import request_table

        if require_request_level(level):
            return request_table(self).to_pandas()
        return simulation_frame(self.to_json(), level)


def simulate_placements(
    placements: Sequence[tuple[str, Placement]],
    requests: Requests,
    trace: Trace,
    cluster: Cluster,
    options: SimulationOptions | None = None,
    *,
    planned_on: Trace | None = None,
    inputs: Mapping[str, InputFile] | None = None,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Simulation:
    """Simulate each placement under the same requests.

    A placement of :func:`prism_plan.offload_placement` is run as the baseline `offload`. Ctrl-C and
    the time limit end the current run; the result is then marked partial and lacks the runs that
    had not started. Ctrl-C before the first event is raised.

    Parameters
    ----------
    placements
        Pairs of a name and a placement.
    requests
        Of :func:`prism_plan.simulate.sampling.sample_requests`.
    trace
        Gives the model; ``requests`` were sampled from it.
    cluster
        Servers, GPUs and links.
    options
        How to simulate.
    planned_on
        The trace by whose prompts reviews plan where layers execute; ``trace`` by default.
    inputs
        Identities of the files ``"trace"`` and ``"cluster"``, for the report.
    progress
        Called with the placement's name, finished requests and all.

    Raises
    ------
    InputError
        A placement does not fit the cluster, or lacks an expert that the requests call; a figure
        of the cluster is not a positive number.
    WrongModel
        A placement is of another model than the trace.
    Infeasible
        A GPU is too small for what must reside on it.
    UnsupportedFeature
        The migration policy does not support a rule of the cluster.
    """
    options = options or SimulationOptions()
    losses = options.losses()
    losses.check(requests)
    asked = len(requests)
    requests = losses.served(requests)
    require_few_reviews(options, requests)
    deadline = math.inf
    if options.time_limit_s is not None:
        deadline = time.monotonic() + options.time_limit_s
    known = trace if planned_on is None else planned_on
    rules = cluster_rules(trace, cluster).replace(trace=known)
    prepared = []
    for name, placement in placements:
        try:
            prepared.append(prepare(placement, requests, trace.model, rules, cluster, options))
        except InputError as error:
            raise error.within(name) from error
    runs: list[SimulationRun] = []
    interrupted = False
    try:
        for (name, placement), (scenario, own_rules) in zip(placements, prepared, strict=True):
            if runs and (runs[-1].partial or time.monotonic() > deadline):
                break

            def report(done: int, name: str = name) -> None:
                progress(name, done, len(requests))

            given = (name, placement, scenario, own_rules, cluster, options, report, deadline)
            runner = (
                LossRunner(*given, plan=losses, not_served=asked - len(requests))
                if options.lose
                else SimulationRunner(*given)
            )
            runs.append(runner.run())
            if runner.interrupted:
                interrupted = True
                break
    except KeyboardInterrupt:
        if not runs:
            raise
        interrupted = True
    partial = len(runs) < len(prepared) or any(run.partial for run in runs)
    files = dict(inputs or {})
    own_notes = [f"{run.placement}: {note}" for run in runs for note in run.notes]
    return Simulation(
        runs=tuple(runs),
        options=options,
        seed=options.seed,
        trace=files.get("trace", InputFile(trace.name, trace.sha256)),
        kind=trace.kind,
        cluster=files.get("cluster", InputFile(cluster.name, "")),
        partial=partial,
        notes=(*own_notes, *notes(runs, calibrated=options.calibration is not None)),
        interrupted=interrupted,
    )


def write_simulation(path: str | os.PathLike[str], simulation: Simulation) -> None:
    """Write the report whole or not at all.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    write_bytes(path, dump_report(simulation.to_json()))


def dump_report(values: Mapping[str, Any]) -> bytes:
    """The bytes of a report file."""
    return (json.dumps(values, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()
