"""What strangers cost a run that serves and moves: paired windows of an attack and of a control.

    python -m studies.faults.attack                  # a quarter of an hour: studies/attack.json
    python -m studies.faults.attack --pairs 4 -o /tmp/attack.json

In each pair, in an order that is drawn, the attacker of the tests goes for every port of the run,
workers' and store's, without the secret, and for a listener that discards the same traffic: so the
difference is what the run's own processes spend on strangers, not what the attacker spends. The
interval is that of the mean ratio of pairs (bootstrap of pairs, 95 %).
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
from scipy.stats import bootstrap

from runtime_adapter.transport.secrets import read_secret
from studies.faults import processes
from studies.faults.cluster import Cluster, ClusterConfig
from studies.faults.processes import ROOT, Loopback
from studies.faults.run import run_and_judge
from studies.machine import commit, processor
from tests.runtime_adapter import attacker

FILE = Path(__file__).resolve().parents[1] / "attack.json"
WINDOW_S = 15.0
#: Of a window, in which its attacker starts or those of the one before are forgotten.
SETTLING_S = 2.0
PAUSE_S = 1.0
MEGABYTE = 1e6


def ports(cluster: Cluster) -> list[tuple[str, int]]:
    """Every address at which a process of the run listens."""
    found = set()
    for process in run_processes(cluster):
        for one in process.net_connections(kind="tcp"):
            if one.status == psutil.CONN_LISTEN:
                found.add((one.laddr.ip, one.laddr.port))
    return sorted(found)


def run_processes(cluster: Cluster) -> list[psutil.Process]:
    """The processes of the run."""
    pids = [server.pid for server in cluster.servers.values()]
    store = cluster.store_pid()
    return [one for pid in (*pids, *([store] if store else [])) for one in processes.family(pid)]


def resident_bytes(cluster: Cluster) -> int:
    """What all processes of the run hold together."""
    return sum(process.memory_info().rss for process in run_processes(cluster))


def window(
    cluster: Cluster, addresses: Sequence[tuple[str, int]], recording: Path, seed: int, *,
    is_control: bool,
) -> dict[str, Any]:  # fmt: skip
    """Attack for a while; answers a second, and resident bytes at the end."""
    words = [sys.executable, "-I", "-S", attacker.__file__]
    words += [f"{host}:{port}" for host, port in addresses]
    words += ["--seconds", str(WINDOW_S), "--seed", str(seed), "--recording", str(recording)]
    words += ["--sink"] if is_control else []
    process = subprocess.Popen(words, stdout=subprocess.PIPE, cwd=ROOT)
    cluster.pass_time(SETTLING_S)
    begin_s = time.monotonic()
    cluster.pass_time(WINDOW_S - SETTLING_S)
    end_s = time.monotonic()
    held = resident_bytes(cluster)
    counts = json.loads(process.communicate()[0])
    cluster.pass_time(PAUSE_S)
    return {
        "answers_per_s": cluster.answered_between(begin_s, end_s) / (end_s - begin_s),
        "resident_bytes": held,
        **{name: counts[name] for name in attacker.TOTALS},
    }


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """The mean, and the bounds of its 95 % interval by a bootstrap."""
    drawn = bootstrap((values,), np.mean, method="percentile", rng=seed).confidence_interval
    return float(np.mean(values)), float(drawn.low), float(drawn.high)


def attacked(pairs: int, seed: int, folder: Path) -> dict[str, Any]:
    """Run the pairs; returns the record."""
    secret_file = folder / "secret"
    secret_file.touch(0o600)
    secret_file.write_text(secrets.token_hex(32))
    secret = read_secret(secret_file)
    cluster = Cluster(
        ClusterConfig("deepseek-v2", secret_file=secret_file), folder, Loopback(secret)
    )
    generator = np.random.default_rng(seed)

    def course(cluster: Cluster) -> dict[str, Any]:
        cluster.move_without_end(PAUSE_S)
        cluster.pass_time(WINDOW_S)
        addresses = ports(cluster)
        recording = folder / "recording"
        recording.write_bytes(attacker.record(cluster.places.store, secret.key, "control"))
        before = cluster.places.status()
        found: dict[str, list[dict[str, Any]]] = {"attack": [], "control": []}
        for number in range(pairs):
            kinds = ["attack", "control"]
            generator.shuffle(kinds)
            for kind in kinds:
                found[kind].append(
                    window(
                        cluster, addresses, recording, seed + number, is_control=kind == "control"
                    )
                )
            print(number, {kind: rows[-1] for kind, rows in found.items()}, flush=True)
        cluster.stop_moving()
        after = cluster.places.status()
        assert before is not None
        assert after is not None
        ratios = [
            attack["answers_per_s"] / control["answers_per_s"]
            for attack, control in zip(found["attack"], found["control"], strict=True)
        ]
        more_mb = [
            (attack["resident_bytes"] - control["resident_bytes"]) / MEGABYTE
            for attack, control in zip(found["attack"], found["control"], strict=True)
        ]
        return {
            "ports": len(addresses),
            "unchanged": all(
                [one[key] for one in before["members"]] == [one[key] for one in after["members"]]
                for key in ("name", "state", "incarnation", "address")
            )
            and before["epoch"] == after["epoch"],
            "throughput_ratio": interval(ratios),
            "more_resident_mb": interval(more_mb),
            "windows": found,
        }

    record = run_and_judge(cluster, course, may_lack=False)
    return {
        "pairs": pairs, "window_s": WINDOW_S, "seed": seed, "rate_per_s": attacker.RATE,
        "commit": commit("studies/attack.json"), "processor": processor(), **record,
    }  # fmt: skip


def tell(record: dict[str, Any]) -> None:
    """Print what a record says."""
    for name in ("throughput_ratio", "more_resident_mb", "unchanged"):
        print(name, record.get(name))
    print(f"{'well' if record['well'] else 'NOT WELL'}: {'; '.join(record['problems'])[:1000]}")


@click.command("attack", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--pairs", default=24, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=FILE)
@click.option("--table", "tells", is_flag=True, help="Print what the file has.")
def command(pairs: int, seed: int, output: Path, tells: bool) -> None:
    """Attack a run that serves and moves, and record what that costs it."""
    if tells:
        tell(json.loads(output.read_text()))
        return
    with tempfile.TemporaryDirectory(prefix="prism-attack-") as folder:
        record = attacked(pairs, seed, Path(folder))
    output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    tell(record)
    sys.exit(not record["well"])


if __name__ == "__main__":
    command()
