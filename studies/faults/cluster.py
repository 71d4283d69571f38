"""Three servers and their store as processes, which are fed, hit, started again and judged."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from prism_plan.io.placement import placement_to_json, write_placement
from studies.faults import processes, workload
from studies.faults.processes import Places, ServerProcess
from studies.faults.trials import SERVERS, TIMEOUT_S, Fault

#: Seconds after which something that has not happened is taken for a hang.
HANG_S = 240.0
#: How often processes and the store's status are looked at.
POLL_INTERVAL_S = 0.1
#: What a server says of an expert that nobody has.
NOBODY_HAS = "is held by no server"
#: Answers of each server that show that it serves.
ANSWERS_WHEN_WELL = 2
LINE_BEGINS = "prism-runtime: "


class Hang(Exception):
    """Something did not happen in time."""


class Crash(Exception):
    """A process has ended that was neither killed nor told to end."""


@dataclass(frozen=True)
class ClusterConfig:
    """What a cluster runs; as in :class:`studies.faults.trials.Trial`.

    Each server has ``outstanding`` requests at any time, ``concurrency`` of them at once. Its
    processes have the secret in ``secret_file``, where one is given. With a ``tables_seed`` layers
    execute on servers that are drawn from it.
    """

    model: str
    replicas: int = 2
    roomy: bool = False
    own_store: bool = False
    journal: bool = False
    peers: bool = True
    restart_after_s: float = 0.5
    timeout_s: float = TIMEOUT_S
    concurrency: int = 2
    outstanding: int = 3
    secret_file: Path | None = None
    tables_seed: int | None = None


@dataclass(frozen=True)
class Request:
    """A request to a launch of a server; times of the monotonic clock."""

    number: int
    server: str
    launch: int
    asked_s: float

    @property
    def id(self) -> str:
        """As the server knows it."""
        return f"{self.server}/{self.number}"

    @property
    def prompt(self) -> str:
        """One of the committed prompts."""
        return prompt_of(self.number)


@dataclass(frozen=True)
class Answered:
    """An answered request; ``error`` is None if it was answered in full."""

    request: Request
    answered_s: float
    error: str | None


def prompt_of(number: int) -> str:
    """The prompt of a numbered request."""
    texts = workload.prompts()
    return texts[number % len(texts)]


class Cluster:
    """A running cluster; a context, at whose end all its processes are gone.

    Processes that end without having been told to are started again, as a supervisor would.
    """

    def __init__(self, config: ClusterConfig, folder: Path, places: Places) -> None:
        self.config = config
        self.folder = folder
        self.places = places
        self.changed = threading.Condition()
        self.answers: list[Answered] = []
        #: Answers whose tokens are not those of plain transformers.
        self.wrong: list[str] = []
        #: Requests that ended with their home, and answers to what had been answered before.
        self.lost: list[Request] = []
        self.repeated: list[str] = []
        self.servers: dict[str, ServerProcess] = {}
        self.store: subprocess.Popen[bytes] | None = None
        #: Exit codes of all launches that have ended, by server or "store".
        self.exit_codes: dict[str, list[int]] = {name: [] for name in (*SERVERS, "store")}
        #: Codes and texts of the moves that were asked for.
        self.moves: list[tuple[int, str]] = []
        self.num_restarts = 0
        #: Processes that have ended by themselves.
        self.crashed: list[str] = []
        self.targets = list(workload.placements(config.model, config.replicas, config.roomy))
        if config.tables_seed is not None:
            self.targets = workload.with_tables(self.targets, config.tables_seed)
        self._seen: dict[int, psutil.Process] = {}
        self._launches = itertools.count()
        self._numbers = itertools.count()
        self._open: dict[str, dict[str, Request]] = {name: {} for name in SERVERS}
        self._reference = workload.reference(config.model)
        self._joined_before: dict[str, tuple[str, int]] = {}
        self._timers: list[threading.Timer] = []
        self._mover = threading.Thread()
        self._is_feeding = False
        self._is_keeping = False
        self._is_closing = False
        self._is_moving = threading.Event()
        self._paths = [folder / f"placement-{n}.json" for n in range(len(self.targets))]

    # ------------------------------------------------------------------ begin and end

    def __enter__(self) -> Self:
        for path, placement in zip(self._paths, self.targets, strict=True):
            write_placement(path, placement)
        try:
            if not self.config.own_store:
                self._start_store()
            for name in SERVERS:
                self._start_server(name)
        except BaseException:
            self.__exit__()
            raise
        self._is_keeping = self._is_feeding = True
        self._start_thread(self._keep)
        for name in SERVERS:
            self._start_thread(self._feed, name)
        return self

    def __exit__(self, *_: object) -> None:
        with self.changed:
            self._is_keeping = self._is_feeding = False
            self._is_closing = True
            self.changed.notify_all()
        self._is_moving.clear()
        self._note_processes()
        processes.send(list(self._seen.values()), signal.SIGKILL)
        for server in self.servers.values():
            server.finish()
            server.process.kill()
            server.process.wait()
        if self.store is not None:
            self.store.kill()
            self.store.wait()
        self.places.close()

    def abort(self) -> None:
        """Let all processes write where each of their threads is, and end."""
        self._note_processes()
        processes.send(list(self._seen.values()), signal.SIGCONT)
        processes.send(list(self._seen.values()), signal.SIGABRT)

    def _start_thread(self, work: Callable[..., None], *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        thread.start()
        return thread

    def _start_store(self) -> None:
        host, port = self.places.store
        words = [*processes.runtime_command(), "store", "--listen", f"{host}:{port}"]
        words += self._trust()
        with open(self.folder / "store.err", "ab") as errors:
            self.store = self.places.popen(
                "store", words, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors,
                cwd=self.folder,
            )  # fmt: skip

    def _trust(self) -> list[str]:
        """Options that say whom the processes believe."""
        path = self.config.secret_file
        return ["--insecure"] if path is None else ["--secret-file", str(path)]

    def _start_server(self, name: str) -> None:
        config = self.config
        host, port = self.places.store
        options = {
            "placement": self._paths[0],
            "checkpoint": workload.checkpoint(config.model),
            "requests": "-",
            "server": name,
            "store": f"{host}:{port}",
            "dtype": "float32",
            "max-new-tokens": workload.NEW_TOKENS,
            "concurrency": config.concurrency,
            "timeout": config.timeout_s,
            "join": HANG_S,
            "stats": f"{name}.stats.json",
            "weights": "peer" if config.peers else "checkpoint",
        }
        answers = self.folder / f"{name}.jsonl"
        if config.journal:
            options["journal"] = f"{name}.journal"
        else:
            answers = self.folder / f"{name}.{next(self._launches)}.jsonl"
        options["output"] = answers
        words = [*processes.runtime_command(), "serve", "--movable", *self._trust()]
        words += [str(word) for key, value in options.items() for word in (f"--{key}", value)]
        with open(self.folder / f"{name}.err", "ab") as errors:
            process = self.places.popen(
                name, [*words, *self.places.options], stdin=subprocess.PIPE, stdout=errors,
                stderr=errors, cwd=self.folder,
            )  # fmt: skip
        before = self.servers.get(name)
        offset = before.offset if before is not None and config.journal else 0
        server = ServerProcess(name, process, answers, offset, self._take_answer, self._take_end)
        with self.changed:
            self.servers[name] = server
        server.start()

    def _keep(self) -> None:
        """Start again what has ended."""
        due: dict[str, float] = {}
        while not self._is_closing:
            with self.changed:
                self.changed.wait(POLL_INTERVAL_S)
                if not self._is_keeping:
                    continue
                ended = [name for name in SERVERS if self.servers[name].ended]
                if self.store is not None and self.store.poll() is not None:
                    ended.append("store")
            for name in ended:
                self._note_crash(name)
                if self.crashed:
                    continue
                now = time.monotonic()
                if now < due.setdefault(name, now + self.config.restart_after_s):
                    continue
                del due[name]
                self.num_restarts += 1
                if name == "store":
                    assert self.store is not None
                    self.exit_codes["store"].append(self.store.returncode)
                    self._start_store()
                else:
                    self._start_server(name)

    def _note_crash(self, name: str) -> None:
        code = (
            self.store.returncode if name == "store" and self.store is not None
            else self.servers[name].process.returncode
        )  # fmt: skip
        if code != -signal.SIGKILL:
            text = f"{name} ended by itself with {code}"
            with self.changed:
                if text not in self.crashed:
                    self.crashed.append(text)

    # ------------------------------------------------------------------ requests

    def _feed(self, name: str) -> None:
        """Keep some requests of a server under way."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._is_closing or self._takes_request(name))
                if self._is_closing:
                    return
                request, server = self._new_request(name), self.servers[name]
            server.ask({"id": request.id, "prompt": request.prompt})

    def _takes_request(self, name: str) -> bool:
        if not self._is_feeding or self.servers[name].ended:
            return False
        return len(self._open[name]) < self.config.outstanding

    def _new_request(self, name: str) -> Request:
        launch = self.servers[name].pid
        request = Request(next(self._numbers), name, launch, time.monotonic())
        self._open[name][request.id] = request
        return request

    def _take_answer(self, server: ServerProcess, answer: dict[str, Any]) -> None:
        error, tokens = answer["error"], answer["tokens"]
        expected = self._reference.tokens(prompt_of(int(answer["id"].rpartition("/")[2])))
        with self.changed:
            if tokens != (expected if error is None else expected[: len(tokens)]):
                self.wrong.append(f"{answer['id']}: {tokens}, and not {expected}")
            request = self._open[server.name].pop(answer["id"], None)
            if request is None:
                self.repeated.append(answer["id"])
            else:
                self.answers.append(Answered(request, time.monotonic(), error))
            self.changed.notify_all()

    def _take_end(self, server: ServerProcess) -> None:
        server.finish()  # nobody reads what it is sent
        known = self._journalled(server.name) if self.config.journal else set()
        with self.changed:
            requests = self._open[server.name]
            self.lost += [request for name, request in requests.items() if name not in known]
            self._open[server.name] = {
                name: request for name, request in requests.items() if name in known
            }
            self.exit_codes[server.name].append(server.process.returncode)
            server.ended = True
            self.changed.notify_all()

    def _journalled(self, name: str) -> set[str]:
        """Ids of the requests of a server that its journal has."""
        path = self.folder / f"{name}.journal"
        found = set()
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                values = json.loads(line)
                if "accept" in values:
                    found.add(values["line"].get("id"))
        return found

    def answered(self, name: str, since_s: float) -> int:
        """Requests of a server's latest launch, asked since then, that were answered well."""
        launch = self.servers[name].pid
        count = 0
        for answer in reversed(self.answers):
            if answer.answered_s < since_s:
                break
            request = answer.request
            if request.launch == launch and request.asked_s >= since_s and answer.error is None:
                count += 1
        return count

    def answered_between(self, begin_s: float, end_s: float) -> int:
        """Requests that were answered in a period of time, well or not."""
        return sum(begin_s <= answer.answered_s <= end_s for answer in self.answers)

    # ------------------------------------------------------------------ waiting

    def wait(self, condition: Callable[[], Any], what: str, limit_s: float = HANG_S) -> None:
        """Wait for something to happen, in a process or in an answer.

        Raises
        ------
        Hang
            It did not.
        Crash
            A process has ended by itself instead.
        """
        deadline = time.monotonic() + limit_s
        while True:
            if condition():
                return
            if self.crashed:
                raise Crash("; ".join(self.crashed))
            if time.monotonic() > deadline:
                raise Hang(what)
            with self.changed:
                self.changed.wait(POLL_INTERVAL_S)

    def wait_until_serving(self) -> None:
        """Wait until each server has answered requests that are asked from now on."""
        begin_s = time.monotonic()

        def serving() -> bool:
            with self.changed:
                return all(self.answered(name, begin_s) >= ANSWERS_WHEN_WELL for name in SERVERS)

        self.wait(serving, "every server answers")

    def wait_until_well(self) -> None:
        """Wait until all servers are up and hold all replicas, and answer what is asked then."""
        self.wait(self.is_well, "every server is up and all replicas are there")
        self.wait_until_serving()
        self.wait(self.is_well, "every server is up and all replicas are there")

    def members(self) -> list[dict[str, Any]]:
        """The servers as the store knows them; none if it does not answer."""
        status = self.places.status()
        return [] if status is None else list(status["members"])

    def is_well(self) -> bool:
        """Whether the store says that all is well."""
        status = self.places.status()
        if status is None or len(status["members"]) < len(SERVERS):
            return False
        for member in status["members"]:
            before = self._joined_before.get(member["name"])
            if before == (status["epoch"], member["incarnation"]):
                return False
            if member["state"] != "up" or not member["experts"]:
                return False
        silent_s = status["scheduler"]["silent_s"]
        pairs = self.targets[0].model.num_pairs
        return (
            status["begun_s"] is not None
            and status["begun_s"] >= 0
            and silent_s is not None
            and silent_s < self.config.timeout_s + 2
            and sum(member["experts"] for member in status["members"])
            >= self.config.replicas * pairs
        )

    def pass_time(self, seconds: float) -> None:
        """Let a trial's own time pass, in which the cluster serves."""
        deadline = time.monotonic() + seconds
        with self.changed:
            self.changed.wait_for(lambda: time.monotonic() >= deadline, seconds)

    # ------------------------------------------------------------------ moves

    def move_without_end(self, pause_s: float = POLL_INTERVAL_S) -> None:
        """Move from one placement to the other and back, until :meth:`stop_moving`."""
        self._is_moving.set()

        def work() -> None:
            for at in itertools.cycle((1, 0)):
                if not self._is_moving.is_set():
                    return
                self._move(at)
                self.pass_time(pause_s)

        self._mover = self._start_thread(work)

    def wait_for_migration(self) -> None:
        """Wait until experts move."""

        def moving() -> bool:
            status = self.places.status()
            return status is not None and bool(status["open_plans"])

        self.wait(moving, "a migration begins")

    def stop_moving(self) -> None:
        """Begin no more moves, and wait for the end of the last one."""
        self._is_moving.clear()
        self.wait(lambda: not self._mover.is_alive(), "the last move ends")

    def move_once(self, at: int) -> tuple[int, str]:
        """Move to one of the two placements; returns code and text."""
        mover = self._start_thread(self._move, at)
        self.wait(lambda: not mover.is_alive(), "a move ends")
        return self.moves[-1]

    def _move(self, at: int) -> None:
        code, text = self.places.move(placement_to_json(self.targets[at]), self._paths[at])
        with self.changed:
            self.moves.append((code, text))

    # ------------------------------------------------------------------ faults

    def hit(self, fault: Fault) -> int:
        """Kill or stop what a fault says; one that is stopped continues later, in a thread.

        Returns how many processes were hit: none if there are none of that kind just now.
        """
        self._note_processes()
        victims = self._victims(fault)
        status = self.places.status() if fault.server else None
        if fault.stop_s is None:
            if status is not None:
                for member in status["members"]:
                    if member["name"] == fault.server:
                        joined = status["epoch"], member["incarnation"]
                        self._joined_before[fault.server] = joined
            return processes.send(victims, signal.SIGKILL)
        count = processes.send(victims, signal.SIGSTOP)
        timer = threading.Timer(fault.stop_s, processes.send, (victims, signal.SIGCONT))
        timer.daemon = True
        timer.start()
        self._timers.append(timer)
        return count

    def wait_until_continued(self) -> None:
        """Wait until all that was stopped continues."""
        timers = self._timers
        self.wait(lambda: not any(one.is_alive() for one in timers), "stopped processes continue")

    def _victims(self, fault: Fault) -> list[psutil.Process]:
        if fault.server:
            with self.changed:
                server = self.servers[fault.server]
                if server.ended:
                    return []
            if fault.target == "worker":
                return processes.worker_of(server.pid)
            everything = processes.family(server.pid)
            return everything[:1] if fault.target == "front" else everything
        supervisor = self.store_pid()
        if supervisor is None:
            return []
        if fault.target == "store":
            return processes.family(supervisor)
        return processes.store_children(supervisor)[fault.target]

    def store_pid(self) -> int | None:
        """The process that supervises the store, if it is there."""
        if self.store is None:
            return processes.own_store(self.servers[SERVERS[0]].pid)
        return self.store.pid if self.store.poll() is None else None

    def _note_processes(self) -> None:
        """Remember all processes, to see at the end that they are gone."""
        with self.changed:
            roots = [server.pid for server in self.servers.values() if not server.ended]
        if self.store is not None and self.store.poll() is None:
            roots.append(self.store.pid)
        for process in itertools.chain.from_iterable(map(processes.family, roots)):
            self._seen.setdefault(process.pid, process)

    # ------------------------------------------------------------------ the end

    def stop_feeding(self) -> None:
        """Ask nothing more, and wait until all that was asked is answered or lost."""
        with self.changed:
            self._is_feeding = False
        self.wait(lambda: not any(self._open.values()), "all requests are answered")

    def finish(self) -> dict[str, int]:
        """End all servers in good order; returns exit codes, of the store as well."""
        self._note_processes()
        with self.changed:
            self._is_keeping = False
        for server in self.servers.values():
            server.finish()
        self.wait(lambda: all(one.ended for one in self.servers.values()), "servers end")
        codes = {name: one.process.returncode for name, one in self.servers.items()}
        if self.store is not None:
            store = self.store
            self.wait(lambda: store.poll() is not None, "the store ends")
            codes["store"] = store.returncode
        everything = list(self._seen.values())
        self.wait(lambda: all(map(processes.is_gone, everything)), "all processes end")
        return codes

    def left_in_shared_memory(self) -> list[str]:
        """What processes have left there: torch names it after them."""
        pids = set(map(str, self._seen))
        names = [entry.name for entry in os.scandir("/dev/shm")]
        return [name for name in names if pids & set(re.findall("[0-9]+", name))]

    def held(self, name: str) -> Any:
        """The experts that a server held at its end, as its statistics have them."""
        return json.loads((self.folder / f"{name}.stats.json").read_text())["gpus"]

    def said(self, name: str) -> list[str]:
        """All lines of standard error of a server's launches, or of the store."""
        path = self.folder / f"{name}.err"
        return path.read_text(errors="replace").splitlines() if path.exists() else []

    def noise(self) -> list[str]:
        """Lines that are not the program's own."""
        return [
            f"{name}: {line}"
            for name in (*SERVERS, "store")
            for line in self.said(name)
            if not line.startswith(LINE_BEGINS)
        ]

    def failed(self) -> list[Answered]:
        """Requests that were answered with an error."""
        return [answer for answer in self.answers if answer.error is not None]

    def counts(self) -> dict[str, int]:
        """Requests by what became of them."""
        failed = len(self.failed())
        return {
            "answered": len(self.answers) - failed,
            "failed": failed,
            "lost_with_home": len(self.lost),
            "answered_twice": len(self.repeated),
        }


def last_lines(lines: Iterable[str], count: int = 40) -> list[str]:
    """The last lines, none longer than a screen."""
    return [line[:300] for line in list(lines)[-count:]]
