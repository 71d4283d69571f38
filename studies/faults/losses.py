"""Losses of a server, simulated and measured: latency before, during and after, side by side.

    python -m studies.faults.losses              # as root, 20 quiet minutes: studies/losses.json
    python -m studies.faults.losses machine      # one of the parts; the others stay in the file
    python -m studies.faults.losses --tables     # prints the file's tables

DeepSeek-V2-Lite on three servers of the testbed, with two copies of each expert or (`single`) one,
planned by `exact` on one half of the requests; the other half is replayed with real messages and
timed work, and simulated with the same arrivals, the calibration of the same testbed and the same
loss. Needs the real routing data in ../shared/traces or $PRISM_TRACES.

A server that is switched off is taken for lost after the timeout, in both. Where only its processes
die, its machine refuses connections, and the runtime suspects it at once: the simulator is told of
a timeout of that length.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import prism_plan as pp
from prism_plan.io.trace_writer import write_trace
from prism_plan.simulate.loss_report import WHEN, LossRecord, when
from prism_plan.simulate.losses import Loss
from prism_plan.simulate.report import summary
from runtime_adapter.transport.peer import REFUSED_S
from studies.faults import processes
from studies.paper import trace
from studies.parts import compact, run_parts
from studies.testbed import experiment
from studies.testbed.processors import ProcessorMonitor
from studies.testbed.testbed import Testbed

HERE = Path(__file__).resolve().parent
FILE = HERE.parent / "losses.json"
CLUSTER = HERE.parent / "shaped-v2lite.toml"
SEEDS = (0, 1)
#: Slots of each GPU by the number of copies; the last server has two GPUs.
SLOTS_PER_GPU = {1: (541, 541, 617, 617), 2: (832, 832, 832, 832)}
REQUESTS = 32
INTERVAL_S = 2.5
#: Requests that a server serves at once.
PLACES = 2
#: Part of the time of arrivals after which the server is lost.
LOST_AFTER = (0.3, 0.4)
RTT_MS = 1.0
TIMEOUT_S = 6.0
#: Seconds from the loss to the start of the server's process, where it comes back.
RESTART_AFTER_S = 20.0
LOST = 1
PORT = 29400


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is replayed: files in a folder, and the same as objects."""

    folder: Path
    cluster: pp.Cluster
    scored: pp.Trace
    placement: pp.Placement

    @property
    def names(self) -> tuple[str, ...]:
        """The servers."""
        return tuple(server.name for server in self.cluster.servers)

    def path(self, name: str) -> str:
        """A file's path."""
        return str(self.folder / name)


def prepared(folder: Path, copies: int) -> Setting:
    """Plan so many copies of each expert; writes what the servers read to a folder."""
    slots = iter(SLOTS_PER_GPU[copies])
    text = re.sub(
        r"memory_gb = .*\nmemory_fraction = .*",
        lambda found: f"slots = {next(slots)}",
        CLUSTER.read_text(),
    )
    arrivals = f"arrival_interval_s = {INTERVAL_S}\nconcurrency = {PLACES}"
    text = re.sub(r"arrival_interval_s = .*", arrivals, text)
    (folder / "cluster.toml").write_text(text)
    cluster = pp.read_cluster(str(folder / "cluster.toml"))
    planned, scored = trace().split(0.5, 0)
    placement = pp.solve(pp.Instance.build(planned, cluster, min_replicas=copies), "exact")
    pp.write_placement(folder / "placement.json", placement)
    write_trace(folder / "scored.parquet", dataclasses.replace(scored, name="scored.parquet"))
    scored = pp.read_trace(str(folder / "scored.parquet"))
    return Setting(folder, cluster, scored, placement)


def run_server(
    setting: Setting, testbed: Testbed, server: int, seed: int, launch: int = 0
) -> subprocess.Popen[bytes]:
    """Start a server's replay; ``launch`` counts those of the same server."""
    name, mark = setting.names[server], f"{setting.names[server]}-{launch}"
    words = [
        sys.executable, "-m", "runtime_adapter", "replay", "--server", name,
        "--store", f"{testbed.address(0)}:{PORT}", "--interface", testbed.interface, "--insecure",
        "--placement", setting.path("placement.json"), "--trace", setting.path("scored.parquet"),
        "--cluster", setting.path("cluster.toml"), "--requests", str(REQUESTS),
        "--seed", str(seed), "--rtt-ms", str(RTT_MS), "--timeout", f"{TIMEOUT_S:g}",
        "--log-format", "json", "--stats", setting.path(f"{mark}.stats.json"),
        "-o", setting.path(f"{mark}.jsonl"),
    ]  # fmt: skip
    with open(setting.path(f"{mark}.log"), "wb") as log:
        return testbed.run(server, words, env=processes.environment(), stdout=log, stderr=log)


def wait_for_first_answer(setting: Setting) -> None:
    """Wait until the run has begun, as a first answer shows."""
    deadline = time.monotonic() + 120.0
    while not any(path.stat().st_size for path in setting.folder.glob("*-0.jsonl")):
        if time.monotonic() > deadline:
            raise TimeoutError("no server has answered")
        time.sleep(0.05)


def replayed(
    setting: Setting, testbed: Testbed, seed: int, *, switched_off: bool, returns: bool
) -> dict[str, Any]:
    """Replay with a loss in the middle; returns when what was, and the requests' times."""
    for path in (*setting.folder.glob("*.jsonl"), *setting.folder.glob("*.stats.json")):
        path.unlink()
    generator = np.random.default_rng(seed)
    started = [run_server(setting, testbed, n, seed) for n in range(len(setting.names))]
    with ProcessorMonitor() as processors:
        wait_for_first_answer(setting)
        time.sleep(float(generator.uniform(*LOST_AFTER)) * INTERVAL_S * REQUESTS)
        lost_s = time.time()
        if switched_off:
            testbed.cut(LOST)
        os.killpg(started[LOST].pid, signal.SIGKILL)
        started[LOST].wait()
        if returns:
            time.sleep(RESTART_AFTER_S)
            if switched_off:
                testbed.mend(LOST)
            started.append(run_server(setting, testbed, LOST, seed, launch=1))
        codes = [process.wait() for process in started]
    if switched_off and not returns:
        testbed.mend(LOST)  # for the next run
    del codes[LOST]
    if any(codes):
        raise RuntimeError(f"exit codes {codes}; see the logs in {setting.folder}")
    stats = json.loads(Path(setting.path(f"{setting.names[0]}-0.stats.json")).read_text())
    began_s = stats["began_s"]
    rows = [
        json.loads(line)
        for path in sorted(setting.folder.glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    joined_s = None
    if returns:
        again = Path(setting.path(f"{setting.names[LOST]}-1.stats.json"))
        joined_s = json.loads(again.read_text())["joined_s"]
    last_s = max(row["done_s"] or 0.0 for row in rows)
    processors.restrict(began_s, began_s + last_s)
    return {
        "at_s": lost_s - began_s,
        "return_s": joined_s,
        "over_s": over_s(setting) - began_s,
        "rows": rows,
        "void": processors.saturated > experiment.MAX_SATURATED,
        "processors_busy": processors.busy,
    }


def over_s(setting: Setting) -> float:
    """When the loss was known and what can be repaired was, in seconds since 1970."""
    lines = Path(setting.path(f"{setting.names[0]}-0.log")).read_text().splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return max(
        float(one["time"])
        for one in found
        if f"server {setting.names[LOST]!r} is down" in one["message"]
        or ("is done" in one["message"] and "(a repair)" in one["message"])
    )


def simulated(
    setting: Setting, seed: int, calibration: Any, loss: Loss, timeout_s: float
) -> dict[str, Any]:
    """The simulator's figures of the same requests and the same loss."""
    requests = pp.sample_requests(
        setting.scored, setting.cluster, requests_per_server=REQUESTS, seed=seed
    )
    options = pp.SimulationOptions(
        calibration=calibration, seed=seed, lose=(loss,), timeout_s=timeout_s
    )
    simulation = pp.simulate_placements(
        [("exact", setting.placement)], requests, setting.scored, setting.cluster, options
    )
    (run,) = simulation.runs
    assert run.losses is not None
    (record,) = run.losses.records
    return {
        "arrival_s": run.scenario.requests.arrival_s,
        "done_s": run.outcome.done_s,
        "over_s": record.over_s,
        "counts": run.losses.counts(),
    }


def sorted_latency(
    record: LossRecord, arrival_s: npt.NDArray[np.float64], done_s: npt.NDArray[np.float64]
) -> dict[str, list[float]]:
    """Latencies of answered requests before, during and after a loss, by the simulator's rule."""
    chosen = when((record,), arrival_s, done_s)
    return {moment: (done_s - arrival_s)[of].tolist() for moment, of in chosen.items()}


def times(rows: Sequence[Mapping[str, Any]]) -> tuple[npt.NDArray[np.float64], ...]:
    """Arrivals and ends of measured requests in seconds, NaN where there was no answer."""
    done_s = [np.nan if row["done_s"] is None else row["done_s"] for row in rows]
    return np.array([row["arrival_s"] for row in rows]), np.array(done_s)


@contextlib.contextmanager
def on_testbed(copies: int) -> Iterator[tuple[Setting, Testbed]]:
    """The testbed, and what is replayed on it."""
    with tempfile.TemporaryDirectory(prefix="prism-losses-") as name:
        setting = prepared(Path(name), copies)
        names = setting.names
        with Testbed(servers=len(names), mbps=500.0, names=names, burst_kb=64.0) as testbed:
            yield setting, testbed


def part(*, copies: int = 2, switched_off: bool = True, returns: bool = False) -> dict[str, Any]:
    """All seeds of a part: latencies of all requests together, and of each seed."""
    timeout_s = TIMEOUT_S if switched_off else REFUSED_S
    together: dict[str, dict[str, list[float]]] = {
        kind: {moment: [] for moment in WHEN} for kind in ("measured", "simulated")
    }
    seeds = []
    with on_testbed(copies) as (setting, testbed):
        config = experiment.ExperimentConfig(
            trace="", cluster=setting.path("cluster.toml"), requests=REQUESTS
        )
        values = experiment.calibrate(
            testbed, setting.names, setting.folder, config, setting.scored.model.name, RTT_MS
        )
        calibration = experiment.mean_calibration([values], 0)
        for seed in SEEDS:
            found = replayed(setting, testbed, seed, switched_off=switched_off, returns=returns)
            loss = Loss(setting.names[LOST], found["at_s"], found["return_s"])
            expected = simulated(setting, seed, calibration, loss, timeout_s)
            # the same moments of both: how long it takes until a loss is over is told beside
            record = LossRecord(loss.server, loss.at_s, loss.return_s, over_s=found["over_s"])
            measured = sorted_latency(record, *times(found["rows"]))
            predicted = sorted_latency(record, expected["arrival_s"], expected["done_s"])
            for kind, latencies in (("measured", measured), ("simulated", predicted)):
                for moment in WHEN:
                    together[kind][moment] += latencies[moment]
            seeds.append(
                {
                    "seed": seed,
                    **{key: value for key, value in found.items() if key != "rows"},
                    "failed": sum(row["error"] is not None for row in found["rows"]),
                    "simulated_over_s": expected["over_s"],
                    "simulated_counts": expected["counts"],
                    "mean_s": {
                        moment: [
                            float(np.mean(latencies[moment])) if latencies[moment] else None
                            for latencies in (measured, predicted)
                        ]
                        for moment in WHEN
                    },
                }
            )
            print(seeds[-1], flush=True)
    return {
        "timeout_s": timeout_s,
        "calibration": values,
        "seeds": seeds,
        "requests": {moment: len(latencies) for moment, latencies in together["measured"].items()},
        **{
            kind: {moment: summary(np.array(latencies[moment])) for moment in WHEN}
            for kind, latencies in together.items()
        },
    }


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "machine": part,
    "returning": functools.partial(part, returns=True),
    "process": functools.partial(part, switched_off=False),
    "single": functools.partial(part, copies=1),
}


def tables(values: Mapping[str, Any]) -> str:
    """A Markdown table of all parts."""
    lines = [
        "| loss | requests | when | measured mean | simulated | error | measured p95 | simulated |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in values["parts"].items():
        for moment in WHEN:
            measured, expected = row["measured"][moment], row["simulated"][moment]
            error = expected["mean"] / measured["mean"] - 1
            lines.append(
                f"| {name} | {row['requests'][moment]} | {moment} | {measured['mean']:.2f} s "
                f"| {expected['mean']:.2f} s | {error:+.1%} | {measured['p95']:.2f} s "
                f"| {expected['p95']:.2f} s |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_parts(FILE, PARTS, tables, compact))
