"""Faults of links: servers and store in network namespaces, with cables that are taken out.

    python -m studies.faults.network              # as root, five minutes; into studies/faults.json
    python -m studies.faults.network --only n1

Each expert is held twice, and servers that do not answer for six seconds are taken for lost. No
request may fail at any home: one that reaches nobody waits.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from prism_plan.errors import PrismError
from runtime_adapter.control.move_command import request_move
from runtime_adapter.control.store.client import StoreAddress, StoreClient
from studies.faults import processes
from studies.faults.cluster import Cluster, ClusterConfig
from studies.faults.records import FILE, run_and_record
from studies.faults.run import run_and_judge
from studies.faults.trials import SERVERS, Model
from studies.testbed.testbed import Testbed

PLACES = (*SERVERS, "store")
PORT = 29400
MBPS = 500.0
TIMEOUT_S = 6.0
CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class NetworkTrial:
    """A link that is away, or slow by ``factor``, for some seconds."""

    name: str
    model: Model
    place: str
    seconds: float
    factor: float | None = None

    def __str__(self) -> str:
        what = "away" if self.factor is None else f"{self.factor:g} times slower"
        return (
            f"{self.name}: {self.model}: the link of {self.place} is {what} for {self.seconds:g} s"
        )


TRIALS = (
    NetworkTrial("n0", "deepseek-v2", "edge-1", 5.0),
    NetworkTrial("n1", "deepseek-v2", "edge-1", 12.0),
    NetworkTrial("n2", "mixtral", "edge-0", 12.0),
    NetworkTrial("n3", "mixtral", "store", 12.0),
    NetworkTrial("n4", "deepseek-v2", "store", 12.0),
    NetworkTrial("n5", "deepseek-v2", "edge-2", 20.0, factor=250.0),
)


class InTestbed:
    """The places of a cluster in a testbed; the store has a namespace of its own."""

    def __init__(self, testbed: Testbed) -> None:
        self.testbed = testbed
        self.store = testbed.address(PLACES.index("store")), PORT
        self.options = ["--interface", testbed.interface]
        self._client = StoreClient(StoreAddress(*self.store), "status")
        self._inside = ThreadPoolExecutor(1, initializer=self._enter)

    def close(self) -> None:
        """Close the connections to the store."""
        self._client.close()

    def popen(self, place: str, words: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a command in the namespace of a server or of the store."""
        environment = processes.environment()
        return self.testbed.run(PLACES.index(place), words, env=environment, **options)

    def status(self) -> dict[str, Any] | None:
        """What the store says to somebody beside it; None if it does not answer soon."""

        def ask() -> dict[str, Any] | None:
            try:
                return self._client.status(1.0)
            except PrismError:
                return None

        return self._inside.submit(ask).result()

    def move(self, placement: Any, path: Path) -> tuple[int, str]:
        """Move the run; who asks is beside the store."""

        def ask() -> tuple[int, str]:
            try:
                return request_move(StoreAddress(*self.store), placement, 10.0)
            except PrismError as error:
                return error.exit_code, str(error)

        # threads that it starts are inside as well
        with ThreadPoolExecutor(1, initializer=self._enter) as threads:
            return threads.submit(ask).result()

    def _enter(self) -> None:
        """Make this thread's sockets, and those of threads that it starts, in the namespace."""
        libc = ctypes.CDLL(None, use_errno=True)
        namespace = self.testbed.namespace(PLACES.index("store"))
        with open(f"/var/run/netns/{namespace}") as handle:
            if libc.setns(handle.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextlib.contextmanager
def disturbed(trial: NetworkTrial, testbed: Testbed) -> Iterator[None]:
    """The link of a trial is away or slow meanwhile."""
    place = PLACES.index(trial.place)
    if trial.factor is None:
        testbed.cut(place)
    else:
        testbed.slow_down(place, trial.factor)
    try:
        yield
    finally:
        if trial.factor is None:
            testbed.mend(place)
        else:
            testbed.slow_down(place, 1.0)


def run_trial(trial: NetworkTrial, folder: Path) -> dict[str, Any]:
    """Run a trial in an empty folder; returns its record."""
    with Testbed(len(PLACES), MBPS, names=PLACES) as testbed:
        config = ClusterConfig(trial.model, timeout_s=TIMEOUT_S)
        cluster = Cluster(config, folder, InTestbed(testbed))

        def course(cluster: Cluster) -> dict[str, Any]:
            begin_s = time.monotonic()
            with disturbed(trial, testbed):
                cluster.pass_time(trial.seconds)
            end_s = time.monotonic()
            cluster.wait_until_well()
            return {
                "answered_meanwhile": cluster.answered_between(begin_s, end_s),
                "well_after_s": round(time.monotonic() - end_s, 1),
                "incarnations": [m["incarnation"] for m in cluster.members()],
            }

        record = run_and_judge(cluster, course, may_lack=False)
    return {"text": str(trial), **record}


@click.command("network", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", multiple=True, metavar="NAME", help="These trials.")
@click.option("--logs", type=click.Path(path_type=Path), help="Keep what failed trials wrote here.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=FILE, help="The file of records."
)
def command(only: tuple[str, ...], logs: Path | None, output: Path) -> None:
    """Run the trials of links and record them."""
    failed = []
    for trial in TRIALS:
        if only and trial.name not in only:
            continue
        print(trial, flush=True)

        def run(folder: Path, trial: NetworkTrial = trial) -> dict[str, Any]:
            return run_trial(trial, folder)

        if not run_and_record(trial.name, run, output, logs):
            failed.append(trial.name)
    if failed:
        print(f"not well: {', '.join(failed)}")
        sys.exit(1)


if __name__ == "__main__":
    command()
