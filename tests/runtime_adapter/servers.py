"""Servers of ``serve`` on one machine, each a launch of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

from prism_plan.io.placement import placement_to_json, write_placement
from prism_plan.placement import Placement
from runtime_adapter.control.move_command import request_move
from runtime_adapter.control.store.client import StoreAddress
from runtime_adapter.transport.secrets import NO_SECRET, read_secret
from tests.runtime_adapter.checkpoints import TRACES
from tests.runtime_adapter.replays import PATIENCE_S, environment, free_port, status_of
from tests.warm_processes import WarmProcess, start_warm

#: Parts of lines that every run of the tests says.
USUAL = ("kv_tokens", "NO SECRET", "the store listens")


class Servers:
    """Launches of ``serve`` by name; whatever is left of them ends with the block.

    They are forks of a process that has loaded what they need, unless they are not to be ``warm``.
    ``requests`` are the lines of each server's file, ``launcher`` words before ``-m``. Without
    requests a server takes what :meth:`ask` sends until :meth:`finish`, so that a test decides by
    what has happened, and not by a clock, when a request comes. The run's secret is in the file
    ``secret``, if it has one.
    """

    def __init__(
        self, folder: Path, placement: Placement, checkpoint: str, *options: str, secret: str = "",
        warm: bool = True,
    ) -> None:  # fmt: skip
        self.folder = folder
        self._warm = warm
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen[bytes] | WarmProcess] = {}
        key = read_secret(secret) if secret else NO_SECRET
        self._store = StoreAddress("127.0.0.1", self.port, key)
        self._placement = folder / "placement.json"
        write_placement(self._placement, placement)
        self._options = [
            *("--placement", str(self._placement), "--checkpoint", str(TRACES / checkpoint)),
            *("--store", f"127.0.0.1:{self.port}", "--join", str(PATIENCE_S), *options),
        ]

    def start_store(self, *options: str) -> None:
        """Start the store as a process of its own; servers would start it themselves otherwise."""
        words = ["store", "--listen", f"127.0.0.1:{self.port}", *options]
        with open(self.folder / "store.err", "wb") as errors:
            self.processes["store"] = subprocess.Popen(
                [sys.executable, "-m", "runtime_adapter", *words], cwd=self.folder,
                env=environment(), stdin=subprocess.DEVNULL, stderr=errors, stdout=errors,
                start_new_session=True,
            )  # fmt: skip
        self.until(lambda: any("the store listens" in line for line in self.said("store")))

    def start(
        self, name: str, requests: Sequence[Mapping[str, Any]] | None = (), *options: str,
        launcher: Sequence[str] = (), called: str = "",
    ) -> subprocess.Popen[bytes] | WarmProcess:  # fmt: skip
        """Start a server; its files and its place in ``processes`` are ``called`` after it."""
        called = called or name
        lines = "".join(json.dumps(request) + "\n" for request in requests or ())
        (self.folder / f"{called}.requests").write_text(lines)
        source = "-" if requests is None else f"{called}.requests"
        own = ["--requests", source, "-o", f"{called}.jsonl"]
        own += ["--server", name, "--stats", f"{called}.json"]
        words = ["serve", *self._options, *own, *options]
        with open(self.folder / f"{called}.err", "wb") as errors:
            if self._warm and not launcher:
                self.processes[called] = start_warm(
                    words, cwd=self.folder, env=environment(), stdin=requests is None,
                    output=errors,
                )  # fmt: skip
                return self.processes[called]
            self.processes[called] = subprocess.Popen(
                [sys.executable, *launcher, "-m", "runtime_adapter", *words],
                cwd=self.folder, env=environment(),
                stdin=subprocess.PIPE if requests is None else subprocess.DEVNULL,
                stderr=errors, stdout=errors, start_new_session=True,
            )  # fmt: skip
        return self.processes[called]

    def ask(self, name: str, request: Mapping[str, Any]) -> None:
        """Send a request to a server that was started without any."""
        stream = self.processes[name].stdin
        assert stream is not None
        stream.write(json.dumps(request).encode() + b"\n")
        stream.flush()

    def finish(self, name: str) -> None:
        """No more requests for a server that was started without any."""
        stream = self.processes[name].stdin
        assert stream is not None
        stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            for one in family(process.pid):
                one.kill()
            process.kill()
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(OSError):  # what was not sent is lost with its reader
                    process.stdin.close()

    def errors(self, name: str) -> list[str]:
        """The lines that a server has said so far, but for those of every run.

        These are warnings of KV caches and of the missing secret, and where the store listens.
        """
        return [line for line in self.said(name) if not any(part in line for part in USUAL)]

    def said(self, name: str) -> list[str]:
        """All lines that a server has said so far."""
        return (self.folder / f"{name}.err").read_text().splitlines()

    def answers(self, name: str) -> list[dict[str, Any]]:
        """The results of a server so far."""
        path = self.folder / f"{name}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def stats(self, name: str) -> dict[str, Any]:
        """What a server that has ended has counted."""
        values: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
        return values

    def status(self) -> dict[str, Any]:
        """What the store knows of the run; empty where it does not answer."""
        return status_of(self._store)

    def move(self, placement: Placement) -> tuple[int, str]:
        """Ask the run for another placement, as the command does; returns code and text."""
        return request_move(self._store, placement_to_json(placement), PATIENCE_S)

    def state(self, name: str) -> str:
        """The state of a server, as the store has it; "" if it does not answer."""
        members = self.status().get("members", [])
        found = [member["state"] for member in members if member["name"] == name]
        return found[0] if found else ""

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait for something to happen."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            said = {name: self.errors(name) for name in self.processes}
            assert time.monotonic() < deadline, said
            time.sleep(0.02)

    def codes(self, names: Iterable[str] | None = None) -> dict[str, int]:
        """Exit codes, once all, or those of the names, have ended."""
        chosen = self.processes if names is None else names
        return {name: self.processes[name].wait(timeout=PATIENCE_S) for name in chosen}

    def send(self, name: str, number: signal.Signals, *, worker: bool = True) -> None:
        """Send a signal to a server's driver, and to its worker as well."""
        process = self.processes[name]
        pids = [one.pid for one in family(process.pid)] if worker else []
        if process.poll() is None:
            pids.insert(0, process.pid)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, number)


def family(pid: int) -> list[psutil.Process]:
    """All processes that a process has started."""
    try:
        found: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return found


def gone(processes: Sequence[psutil.Process]) -> bool:
    """Whether all have ended (or wait for their parent to notice)."""

    def ended(one: psutil.Process) -> bool:
        try:
            return not one.is_running() or one.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:  # between the two
            return True

    return all(map(ended, processes))
