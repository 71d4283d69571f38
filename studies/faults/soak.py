"""An hour of serving at concurrency 4, with moves, and a process that is killed each minute.

    python -m studies.faults.soak                   # studies/soak.json
    python -m studies.faults.soak --minutes 12 -o /tmp/soak.json

The first server is never hit, and after the first ten minutes the store's service is not either:
these processes see the whole hour, and their memory, descriptors and threads tell whether anything
grows. Everything else is hit at random, and started again at once.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import psutil

from studies.faults import processes
from studies.faults.cluster import Cluster, ClusterConfig
from studies.faults.processes import Loopback
from studies.faults.run import run_and_judge
from studies.faults.trials import SERVERS, Fault, Target
from studies.machine import commit, processor

FILE = Path(__file__).resolve().parents[1] / "soak.json"
MINUTE_S = 60.0
SAMPLE_INTERVAL_S = 10.0
#: Minutes after which nothing may grow.
SETTLED_MINUTES = 10
#: Seconds from the end of a move to the next one.
MOVE_PAUSE_S = 5.0
#: Processes that are there from the first minute, or minute ten, to the last.
LASTING = (f"{SERVERS[0]} driver", f"{SERVERS[0]} worker", "store service", "store supervisor")
FIGURES = ("resident_bytes", "descriptors", "threads")


def victims(minute: int) -> list[tuple[Target, str]]:
    """What may be hit in a minute."""
    of_servers: tuple[Target, ...] = ("front", "worker", "both")
    found: list[tuple[Target, str]] = list(itertools.product(of_servers, SERVERS[1:]))
    found.append(("scheduler", ""))
    if minute < SETTLED_MINUTES - 2:
        found += [("service", ""), ("store", "")]
    return found


def roles(cluster: Cluster) -> dict[str, int]:
    """Process ids by what they are, of those that are there now."""
    found = {}
    with cluster.changed:
        drivers = {name: one.pid for name, one in cluster.servers.items() if not one.ended}
    for name, pid in drivers.items():
        found[f"{name} driver"] = pid
        for worker in processes.worker_of(pid):
            found[f"{name} worker"] = worker.pid
    supervisor = cluster.store_pid()
    if supervisor is not None:
        found["store supervisor"] = supervisor
        for kind, children in processes.store_children(supervisor).items():
            for child in children:
                found[f"store {kind}"] = child.pid
    return found


def sample(cluster: Cluster) -> dict[str, Any]:
    """What each process uses now."""
    found = {}
    for role, pid in roles(cluster).items():
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            with process.oneshot():
                found[role] = {
                    "pid": pid,
                    "resident_bytes": process.memory_info().rss,
                    "descriptors": process.num_fds(),
                    "threads": process.num_threads(),
                }
    return found


class Sampler:
    """Samples all processes of a cluster every ten seconds; a context."""

    def __init__(self, cluster: Cluster) -> None:
        self.samples: list[dict[str, Any]] = []
        self._cluster = cluster
        self._begin_s = time.monotonic()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(SAMPLE_INTERVAL_S):
            at_s = round(time.monotonic() - self._begin_s, 1)
            self.samples.append({"at_s": at_s, "processes": sample(self._cluster)})


def growth(samples: Sequence[dict[str, Any]], minutes: float) -> dict[str, dict[str, float]]:
    """Of each lasting process, what it used from minute ten on and at the end, and the ratio.

    Of memory these are medians of a minute; of descriptors and threads, which come and go with
    connections, the largest numbers of ten minutes. Of a short run the first is the middle.
    """
    settled_s = MINUTE_S * min(SETTLED_MINUTES, minutes / 2)
    found: dict[str, dict[str, float]] = {}
    for role in LASTING:
        for figure in FIGURES:
            is_memory = figure == "resident_bytes"
            span_s = MINUTE_S if is_memory else settled_s
            early, late = (
                [
                    one["processes"][role][figure]
                    for one in samples
                    if begin_s <= one["at_s"] < begin_s + span_s and role in one["processes"]
                ]
                for begin_s in (settled_s, MINUTE_S * minutes - span_s)
            )
            if early and late:
                of = median if is_memory else max
                found.setdefault(role, {})[figure] = of(early)
                found[role][f"{figure}_end"] = of(late)
                found[role][f"{figure}_ratio"] = round(of(late) / of(early), 4)
    return found


def soak(minutes: float, seed: int, folder: Path) -> dict[str, Any]:
    """Serve for so long; returns the record."""
    config = ClusterConfig("deepseek-v2", concurrency=4, outstanding=6)
    cluster = Cluster(config, folder, Loopback())
    generator = np.random.default_rng(seed)
    hits: list[dict[str, Any]] = []

    def course(cluster: Cluster) -> dict[str, Any]:
        begin_s = time.monotonic()
        cluster.move_without_end(MOVE_PAUSE_S)
        with Sampler(cluster) as sampler:
            for minute in range(max(int(minutes), 1)):
                cluster.pass_time(float(generator.uniform(0, 0.4)) * MINUTE_S)
                choices = victims(minute)
                target, server = choices[int(generator.integers(len(choices)))]
                hit_s = time.monotonic()
                cluster.hit(Fault(target, server))
                cluster.wait_until_well()
                well_s = time.monotonic()
                hits.append(
                    {
                        "minute": minute,
                        "target": f"{target} of {server}" if server else target,
                        "well_after_s": round(well_s - hit_s, 1),
                        **cluster.counts(),
                    }
                )
                print(hits[-1], flush=True)
                cluster.pass_time(begin_s + (minute + 1) * MINUTE_S - time.monotonic())
        cluster.stop_moving()
        return {"samples": sampler.samples, "growth": growth(sampler.samples, minutes)}

    record = run_and_judge(cluster, course, may_lack=False)
    return {
        "minutes": minutes, "seed": seed, "commit": commit("studies/soak.json"),
        "processor": processor(), "hits": hits, **record,
    }  # fmt: skip


def write(path: Path, record: dict[str, Any]) -> None:
    """Write the record, a sample a line."""
    samples = ",\n".join(f"  {json.dumps(one)}" for one in record.get("samples", []))
    others = {key: value for key, value in record.items() if key != "samples"}
    text = json.dumps(others, indent=1)
    path.write_text(f'{text[:-2]},\n "samples": [\n{samples}\n ]\n}}\n', encoding="utf-8")


def tell(record: dict[str, Any]) -> None:
    """Print what a record says of growth, and whether all went well."""
    for role, figures in growth(record.get("samples", []), record["minutes"]).items():
        print(role, *(f"{name} {figures[f'{name}_ratio']:.3f}" for name in FIGURES))
    print(f"{len(record.get('hits', []))} kills, {record['answered']} answered")
    print(f"{'well' if record['well'] else 'NOT WELL'}: {'; '.join(record['problems'])[:1000]}")


@click.command("soak", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--minutes", default=60.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=FILE)
@click.option("--table", "tells", is_flag=True, help="Print what the file has.")
def command(minutes: float, seed: int, output: Path, tells: bool) -> None:
    """Serve for an hour while processes are killed, and record what it took."""
    if tells:
        tell(json.loads(output.read_text()))
        return
    with tempfile.TemporaryDirectory(prefix="prism-soak-") as folder:
        record = soak(minutes, seed, Path(folder))
    write(output, record)
    tell(record)
    sys.exit(not record["well"])


if __name__ == "__main__":
    command()
