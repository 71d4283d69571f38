"""Every kind of process killed or stopped, in serving and in moving: what is healthy ends well."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from prism_plan.errors import PrismError  # noqa: E402
from prism_plan.io.placement import placement_to_json, write_placement  # noqa: E402
from prism_plan.placement import Placement  # noqa: E402
from runtime_adapter.control.move_command import request_move  # noqa: E402
from runtime_adapter.transport.rendezvous import Rendezvous  # noqa: E402
from runtime_adapter.transport.tcp_store import join_store  # noqa: E402
from tests.runtime_adapter.cli.test_faults import MODEL, NAMES, OWN, replicated  # noqa: E402
from tests.runtime_adapter.cli.test_serve import alone, lines  # noqa: E402
from tests.runtime_adapter.replays import PATIENCE_S, environment  # noqa: E402
from tests.runtime_adapter.servers import Servers, family, gone  # noqa: E402

#: What is hit: a server's driver, its worker, both, for the first server (whose driver hosts the
#: store) and for another one; the scheduler; a client that asks for a move.
TARGETS = (
    "driver of edge-0", "worker of edge-0", "all of edge-0", "driver of edge-1", "worker of edge-1",
    "all of edge-1", "scheduler", "client",
)  # fmt: skip
#: When: requests are answered; experts move; a server has finished and waits for the others.
MOMENTS = ("serving", "moving", "ending")
#: In which a run has to end that has lost something; it takes seconds.
END_S = 300.0
MOVE = "moved.json"


def turned() -> Placement:
    """The placement in which each server holds what its neighbour held."""
    placement = replicated()
    return placement.replace(on_gpu=placement.on_gpu[[1, 2, 0]])


def requests() -> dict[str, list[dict[str, Any]]]:
    """Of each server: edge-2 is done early, the others go on for some seconds."""
    prompts = [line["prompt"] for line in lines()["ascii-word"][:4]]
    asked = [{"prompt": prompt, "id": i, "at_s": 2.0 * i} for i, prompt in enumerate(prompts)]
    return {"edge-0": asked, "edge-1": asked, "edge-2": asked[:1]}


def spawned(driver: int) -> list[psutil.Process]:
    """A server's worker and, of the first server, the scheduler."""
    found = [one for one in family(driver) if "spawn_main" in " ".join(one.cmdline())]
    return sorted(found, key=lambda one: one.create_time())


def client(run: Servers) -> subprocess.Popen[bytes]:
    """A launch of the command ``move``."""
    with open(run.folder / "client.err", "wb") as errors:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "runtime_adapter", "move", "--placement", MOVE),
                *("--store", f"127.0.0.1:{run.port}", "--join", str(PATIENCE_S)),
            ],
            cwd=run.folder, env=environment(), stderr=errors, start_new_session=True,
        )  # fmt: skip


def move_without_end(run: Servers) -> None:
    """Ask for one placement and the other by turns, until the run is no more."""
    targets = [placement_to_json(one) for one in (turned(), replicated())]
    rendezvous = Rendezvous(1, -1, port=run.port, rendezvous_timeout_s=PATIENCE_S)

    def move() -> None:
        with contextlib.suppress(PrismError):
            while request_move(rendezvous, targets[0])[0] == 0:
                targets.reverse()

    threading.Thread(target=move, daemon=True).start()


def shared_memory(processes: list[psutil.Process]) -> list[str]:
    """What these processes have left in shared memory: torch names it after them."""
    pids = {str(one.pid) for one in processes}
    return [
        entry.name
        for entry in os.scandir("/dev/shm")
        if pids & set(re.findall("[0-9]+", entry.name))
    ]


def trial(folder: Path, target: str, number: signal.Signals, moment: str) -> set[int]:
    """Hit one kind of process at one moment, and see what becomes of all others.

    Returns the exit codes of the healthy servers.
    """
    write_placement(folder / MOVE, turned())
    options = (*OWN, "--timeout", "3", "--movable")
    with Servers(folder, replicated(), f"tiny-{MODEL}", *options) as run:
        for name, asked in requests().items():
            run.start(name, asked)
        run.until(lambda: all(run.answers(name) for name in NAMES))
        everything = [
            one
            for driver in run.processes.values()
            for one in [psutil.Process(driver.pid), *family(driver.pid)]
        ]
        store = join_store(
            Rendezvous(1, -1, port=run.port, rendezvous_timeout_s=PATIENCE_S), host_it=False
        )
        asking = client(run) if target == "client" else None
        if asking is not None:
            everything.append(psutil.Process(asking.pid))
        elif moment == "moving":
            move_without_end(run)
        if asking is not None or moment == "moving":
            # nobody has moved before, so these are the first entries of the log
            entry = "log/0" if moment == "serving" else "log/2"
            run.until(lambda: store.check([entry]) or ended(asking))
        if moment == "ending":
            run.until(lambda: store.check(["finished/2"]))
        hit = processes_of(run, target, asking)
        for one in hit:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(number)
        healthy = {
            name: driver
            for name, driver in run.processes.items()
            if driver.pid not in [one.pid for one in hit]
        }
        codes = {name: driver.wait(timeout=END_S) for name, driver in healthy.items()}
        if asking is not None and number != signal.SIGKILL and not ended(asking):
            asking.kill()
        if asking is not None:
            asking.wait(timeout=END_S)
        for one in hit:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        run.until(lambda: gone(everything))
    assert set(codes.values()) <= {0, 5}, (codes, {name: run.errors(name) for name in NAMES})
    for name in NAMES:
        said = run.errors(name)
        assert all(line.startswith("prism-runtime: ") for line in said), said
        if not target.endswith(name):
            assert not any("its worker" in line for line in said), said
        for answer in run.answers(name):
            if answer["error"] is None:
                prompt = requests()[name][answer["id"]]["prompt"]
                assert answer["tokens"] == alone(MODEL, prompt, 8)
        if name in codes:
            assert len(run.answers(name)) == len(requests()[name])
            assert (codes[name] == 5) == any(answer["error"] for answer in run.answers(name))
    if asking is not None:
        lines_of_client = (folder / "client.err").read_text().splitlines()
        assert all(line.startswith("prism-runtime: ") for line in lines_of_client)
    assert shared_memory(everything) == []
    return set(codes.values())


def ended(process: subprocess.Popen[bytes] | None) -> bool:
    """Whether a process that there is has ended."""
    return process is not None and process.poll() is not None


def processes_of(
    run: Servers, target: str, asking: subprocess.Popen[bytes] | None
) -> list[psutil.Process]:
    """The processes that a trial hits."""
    if asking is not None:
        return [psutil.Process(asking.pid)] if asking.poll() is None else []
    if target == "scheduler":
        return spawned(run.processes["edge-0"].pid)[1:]
    kind, _, name = target.rpartition(" of ")
    driver = run.processes[name].pid
    if kind == "driver":
        return [psutil.Process(driver)]
    if kind == "worker":
        return spawned(driver)[:1]
    return [psutil.Process(driver), *family(driver)]


@pytest.mark.long
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("target", TARGETS)
def test_whatever_is_hit(target: str, number: signal.Signals, moment: str, tmp_path: Path) -> None:
    """No hang, no healthy process dies, right tokens, one-line messages, no shared memory left."""
    assert trial(tmp_path, target, number, moment) <= {0, 5}
