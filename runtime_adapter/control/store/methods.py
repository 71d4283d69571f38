"""What the store does for each request, without any input or output of its own.

A *run* is started by the first server that comes; the others find it. Its members join, in the log,
and are heard; those that are lost are declared down there. All that is kept belongs to one *epoch*,
and a new run begins another.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from prism_plan.errors import InputError, LimitReached
from runtime_adapter.control import log_entries
from runtime_adapter.control.log_entries import MAX_COUNT, Bounds, LogEntry, read_entry, write_entry
from runtime_adapter.control.store.entry_log import MAX_TEXT_BYTES, EntryLog
from runtime_adapter.control.store.key_values import KeyValues
from runtime_adapter.control.store.log_state import MAX_HELD, MAX_HELD_BY_SERVER, LogState
from runtime_adapter.control.store.members import Members, ObservedClock, read_driver_info
from runtime_adapter.control.store.messages import (
    MAX_HEAD_VALUES,
    MAX_KEY,
    NoRun,
    StoreRestartedError,
    count_in,
    list_in,
    seconds_in,
    text_in,
)
from runtime_adapter.transport.rendezvous import NameTaken

#: Servers of a run, and GPUs and (layer, expert) pairs of all its servers.
MAX_SERVERS, MAX_GPUS, MAX_PAIRS = 1_000, 1 << 20, 1 << 22
MAX_NAME = 1_000
#: A member that was heard within so long keeps its name against another process. Workers send a
#: heartbeat every half second at the latest.
NAME_KEPT_S = 2.0
#: A run that has not begun, and of which nobody is heard for so long, gives way to another one.
NOT_BEGUN_KEPT_S = 3.0
#: The run begins so long after its last server has joined, so that all hear of it before.
START_DELAY_S = 0.5
#: Incarnations whose addresses are known, to tell a process that was replaced from one that joined
#: again.
MAX_ADDRESSES = 8
#: Answers that are kept for requests that are repeated, since their answer was lost.
MAX_ANSWERS = 1_024
#: Values of a driver's text in an entry: half of what an answer can carry.
MAX_ENTRY_VALUES = MAX_HEAD_VALUES // 2
#: Entries that the store writes itself.
_OWN_ENTRIES = (log_entries.ServerJoined, log_entries.ServerDown, log_entries.ServerLeft)
#: Roles of clients that only look, or ask for a move: what they may call beside looking.
_VISITORS = {"status": frozenset[str](), "move": frozenset({"append", "put", "delete"})}
_LOOKING = frozenset({"run", "members", "status", "read", "get", "has"})

Fields = dict[str, Any]


class _Run:
    """One run: what it was started with, its log, its members."""

    def __init__(self, values: Fields, now: Callable[[], float]) -> None:
        self.values = values
        self.timeout_s = float(values["timeout_s"])
        self.servers: list[str] = values["servers"]
        gpus: list[int] = values["gpus"]
        self.bounds = Bounds(len(self.servers), sum(gpus), values["bounds"][1])
        self.state = LogState(self.servers, gpus)
        self.members = Members(self.servers, self.timeout_s, now)
        self.log = EntryLog()
        #: Addresses of the last incarnations of each server.
        self.addresses: list[dict[int, tuple[str, int]]] = [{} for _ in self.servers]
        self.start_s: float | None = None
        self.heard_s = now()
        self.over_since_s: float | None = None


class StoreMethods:
    """The store of one run after the other.

    ``now`` is a monotonic clock in seconds; ``on_append`` is called after entries were appended,
    and after a run was started. ``tell`` gets a line about each server that comes or goes, and what
    the scheduler says.
    """

    def __init__(
        self,
        now: Callable[[], float] = time.monotonic,
        on_append: Callable[[], None] = lambda: None,
        *,
        new_epoch: Callable[[], str] = lambda: secrets.token_hex(8),
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._tell = tell
        self._now = ObservedClock(now)
        self._on_append = on_append
        self._new_epoch = new_epoch
        self._methods: dict[str, Callable[[Fields, str], Any]] = {
            name: getattr(self, name)
            for name in (
                "run", "start_run", "join", "leave", "heartbeat", "members", "begin", "status",
                "append", "has", "delete",
            )
        }  # fmt: skip
        self.epoch = ""
        self._forget()

    def _forget(self) -> None:
        self.epoch = self._new_epoch()
        self._current: _Run | None = None
        self.values = KeyValues()
        self._answers: OrderedDict[str, Any] = OrderedDict()
        self._scheduler_heard_s: float | None = None
        self._migration = ""

    # ------------------------------------------------------------------ requests

    def call(self, method: str, fields: Fields, client: str, body: bytes) -> tuple[Any, bytes]:
        """Do what a request asks for; returns its result and the body of the answer.

        ``client`` is the client's name. For "read" see :meth:`read`, which this does not wait for.

        Raises
        ------
        PrismError
            The request is refused; nothing has changed.
        """
        role = client.partition(" ")[0]
        if role == "scheduler":
            self._scheduler_heard_s = self._now()
        if role in _VISITORS and method not in _LOOKING | _VISITORS[role]:
            raise InputError(f"{client!r:.60} may not call {method!r:.60}")
        if role == "move" and method in ("put", "delete"):
            name = "key" if method == "put" else "prefix"
            if not text_in(fields, name, MAX_KEY).startswith("move/"):
                raise InputError(f"{fields[name]!r:.60}", place=name, expected="move/...")
        if method == "put":
            self._put(fields, body)
            return None, b""
        if method == "get":
            return self.values.get(text_in(fields, "key", MAX_KEY))
        if method == "read":
            return self.read(fields), b""
        if method not in self._methods:
            raise InputError(f"no method {method!r:.60}", expected=", ".join(self._methods))
        if "token" not in fields:
            return self._methods[method](fields, client), b""
        token = text_in(fields, "token", MAX_KEY)
        if token not in self._answers:
            answer = self._methods[method](fields, client)
            self._answers[token] = answer
            while len(self._answers) > MAX_ANSWERS:
                self._answers.popitem(last=False)
        return self._answers[token], b""

    def tick(self) -> None:
        """Declare lost members down; to be called several times a second."""
        self._now()
        run = self._current
        if run is None:
            return
        for server, reason in list(run.members.lost(run.state, run.start_s is not None)):
            incarnation = run.state.members[server].incarnation
            self._append(run, log_entries.ServerDown(server, incarnation, reason))
        self._note_whether_over(run)

    @property
    def has_run(self) -> bool:
        """Whether a run was started in this epoch."""
        return self._current is not None

    @property
    def num_servers(self) -> int:
        """Servers of the run, 0 before it is started."""
        return len(self._current.servers) if self._current else 0

    @property
    def is_over(self) -> bool:
        """Whether all members of the run have left, or some have and nobody else is heard."""
        return self._current is not None and self._current.over_since_s is not None

    def _note_whether_over(self, run: _Run) -> None:
        states = [member.state for member in run.state.members]
        if "left" not in states:
            run.over_since_s = None
            return
        others = [n for n, state in enumerate(states) if state != "left"]
        # who was killed may be on the way back: it is waited for a while
        away = all(not run.members.alive(n, 3 * run.timeout_s) for n in others)
        quiet = self._now() - run.heard_s > 3 * run.timeout_s
        if not others or (away and quiet):
            if run.over_since_s is None:
                run.over_since_s = self._now()
        else:
            run.over_since_s = None

    # ------------------------------------------------------------------ the run

    def run(self, fields: Fields, client: str) -> Any:
        return {"epoch": self.epoch, "run": self._current.values if self._current else None}

    def start_run(self, fields: Fields, client: str) -> Any:
        begun, values = _read_run(fields.get("run"))
        run = self._current
        if run is not None:
            silent_s = self._now() - run.heard_s
            failed = run.start_s is None and values != run.values and silent_s > NOT_BEGUN_KEPT_S
            if failed or run.over_since_s is not None or silent_s > 2 * run.timeout_s:
                self._forget()  # of a run that has ended, or whose servers have all ended
                run = None
        if run is None:
            run = self._current = _Run(values, self._now)
            self._on_append()
        if values == run.values:
            run.heard_s = self._now()
            if begun:
                self._begin(run, 0.0)
        return {"epoch": self.epoch, "run": run.values, "begun": run.start_s is not None}

    def begin(self, fields: Fields, client: str) -> Any:
        if self._current is None:
            return None
        run = self._current
        count_in(fields, "server", len(run.servers))
        return None if run.start_s is None else run.start_s - self._now()

    def _begin(self, run: _Run, delay_s: float) -> None:
        if run.start_s is None:
            run.start_s = self._now() + delay_s

    # ------------------------------------------------------------------ members

    def join(self, fields: Fields, client: str) -> Any:
        run = self._require_run()
        server = count_in(fields, "server", len(run.servers))
        host = text_in(fields, "host", 255)
        port = count_in(fields, "port", 1 << 16)
        after = count_in(fields, "after", MAX_COUNT - 1)
        held = list_in(fields, "held", MAX_HELD_BY_SERVER)
        member = run.state.members[server]
        silent_s = run.members.worker_silent_s(server)
        if (
            member.state == "up"
            and member.incarnation > after
            and member.address != (host, port)
            and silent_s is not None
            and silent_s < NAME_KEPT_S
        ):
            raise NameTaken(
                f"server {run.servers[server]!r} is there already",
                parameter="server",
                remedy="start each server once",
            )
        incarnation = max(member.incarnation, after) + 1
        entry = self._check(
            run,
            {"kind": log_entries.ServerJoined.kind, "server": server, "incarnation": incarnation,
             "host": host, "port": port, "experts": held},
        )  # fmt: skip
        assert isinstance(entry, log_entries.ServerJoined)
        for expert in entry.experts:
            if run.state.server_of_gpu[expert.gpu] != server:
                raise InputError(
                    f"GPU {expert.gpu}", place="held", expected=f"a GPU of {run.servers[server]!r}"
                )
        held_by_others = run.state.num_held - len(run.state.held[server])
        self._require_room(held_by_others + len(entry.experts))
        if member.incarnation == 0 and after > 0:
            self._begin(run, 0.0)  # it was up before this store was
        if member.state == "up":
            self._append(
                run, log_entries.ServerDown(server, member.incarnation, log_entries.JOINS_ANEW)
            )
        run.members.hear_worker(server)
        run.heard_s = self._now()
        self._append(run, entry)
        run.addresses[server][incarnation] = host, port
        if len(run.addresses[server]) > MAX_ADDRESSES:
            del run.addresses[server][next(iter(run.addresses[server]))]
        if all(other.state == "up" for other in run.state.members):
            self._begin(run, START_DELAY_S)
        return incarnation

    def leave(self, fields: Fields, client: str) -> Any:
        run = self._current
        if run is None:
            return
        server = count_in(fields, "server", len(run.servers))
        incarnation = count_in(fields, "incarnation", MAX_COUNT)
        member = run.state.members[server]
        if member.state != "left" and incarnation >= member.incarnation:
            self._append(run, log_entries.ServerLeft(server, incarnation))
            self._note_whether_over(run)

    def heartbeat(self, fields: Fields, client: str) -> Any:
        kind = fields.get("kind")
        if kind not in ("worker", "driver", "scheduler"):
            raise InputError(f"{kind!r:.60}", place="kind", expected="worker, driver or scheduler")
        run = self._current
        state = "down"
        if kind == "scheduler":
            info = fields.get("info")
            migration = info.get("migration", "") if isinstance(info, dict) else None
            if type(migration) is not str:
                raise InputError(f"{info!r:.60}", place="info", expected="a text as `migration`")
            self._scheduler_heard_s = self._now()
            self._migration = migration[:MAX_KEY]
        elif run is not None:
            server = count_in(fields, "server", len(run.servers))
            incarnation = count_in(fields, "incarnation", MAX_COUNT)
            member = run.state.members[server]
            # who has joined again, but has not read so yet, lives as well
            same_address = run.addresses[server].get(incarnation) == member.address is not None
            is_current = incarnation == member.incarnation or (
                same_address and member.state == "up"
            )
            if kind == "driver":
                run.members.hear_driver(
                    server, read_driver_info(fields.get("info"), len(run.servers))
                )
                is_current = True
            elif is_current and member.state == "up":
                run.members.hear_worker(server)
            run.heard_s = self._now()
            if is_current and member.state in ("up", "left"):
                state = member.state
            elif incarnation < member.incarnation and member.state == "up":
                state = "replaced"
        return {"state": state, "epoch": self.epoch}

    def members(self, fields: Fields, client: str) -> Any:
        return [] if self._current is None else self._describe_members(self._current)

    def status(self, fields: Fields, client: str) -> Any:
        """What the store knows, for people.

        ``epoch``; ``run``: whether there is one; ``members``; ``timeout_s``; ``begun_s``, seconds
        since the run began, or ``None``; ``scheduler`` with ``silent_s`` since its last request
        (``None``: never) and ``migration``, a text; ``open_plans``; ``entries`` ever written;
        ``keys`` and ``bytes`` of values.
        """
        run, heard_s = self._current, self._scheduler_heard_s
        return {
            "epoch": self.epoch,
            "run": run is not None,
            "movable": run is not None and run.values["movable"],
            "members": [] if run is None else self._describe_members(run),
            "timeout_s": None if run is None else run.timeout_s,
            "begun_s": None if run is None or run.start_s is None else self._now() - run.start_s,
            "scheduler": {
                "silent_s": None if heard_s is None else self._now() - heard_s,
                "migration": self._migration,
            },
            "open_plans": [] if run is None else list(run.state.open_plans),
            "entries": 0 if run is None else run.log.last + 1,
            "keys": len(self.values),
            "bytes": self.values.num_bytes,
        }

    def _describe_members(self, run: _Run) -> list[Fields]:
        logged = run.state.snapshot()["members"]
        return [{**member, **run.members.describe(n)} for n, member in enumerate(logged)]

    # ------------------------------------------------------------------ the log

    def append(self, fields: Fields, client: str) -> Any:
        self._require_epoch(fields)
        run = self._require_run()
        text = text_in(fields, "entry", MAX_TEXT_BYTES)
        if sum(map(text.count, ",:[{")) > MAX_ENTRY_VALUES:
            raise InputError("too many values", place="entry")
        entry = read_entry(run.log.last + 1, text.encode(), run.bounds)
        if isinstance(entry, _OWN_ENTRIES):
            raise InputError(
                f"{entry.kind!r}", place="kind", expected="no entry of the store's own"
            )
        if client.partition(" ")[0] == "move" and not isinstance(entry, log_entries.MoveRequested):
            raise InputError(f"{entry.kind!r}", place="kind", expected="a request for a move")
        if isinstance(entry, log_entries.ExpertsLoaded):
            self._require_room(run.state.num_held + len(entry.experts))
        return self._append(run, entry, client)

    def read(self, fields: Fields) -> Any:
        """The entries after a number, and a snapshot where they do not continue what was read.

        ``None`` if there are none: to be called again after ``on_append``, up to
        :func:`wait_seconds`; then :meth:`nothing_to_read` is the answer.
        """
        epoch = fields.get("epoch")
        if epoch is not None:
            epoch = text_in(fields, "epoch", MAX_KEY)
        after = -1 if fields.get("after") == -1 else count_in(fields, "after", MAX_COUNT)
        run = self._current
        if run is None:
            return None
        if epoch != self.epoch or not run.log.can_continue(after):
            # which holds all entries: an answer with both might be too long
            snapshot = run.state.snapshot()
            snapshot["members"] = self._describe_members(run)
            return {"epoch": self.epoch, "snapshot": snapshot, "entries": []}
        entries = run.log.read(after)
        return {"epoch": self.epoch, "entries": entries} if entries else None

    def nothing_to_read(self, fields: Fields) -> Any:
        """The answer to a read that has waited for nothing."""
        return {"epoch": self.epoch, "entries": []}

    def _check(self, run: _Run, values: Fields) -> LogEntry:
        return read_entry(run.log.last + 1, json.dumps(values).encode(), run.bounds)

    def _append(self, run: _Run, entry: LogEntry, client: str = "store") -> int:
        number = run.log.append(write_entry(entry, client))
        run.state.apply(entry)
        run.members.note_states(run.state)
        self._on_append()
        if text := _line_about(entry, run.servers):
            self._tell(text)
        return number

    def _require_room(self, held: int) -> None:
        if held > MAX_HELD:
            raise LimitReached(
                f"{held:,} experts on GPUs; the run's store knows up to {MAX_HELD:,}"
            )

    # ------------------------------------------------------------------ values

    def _put(self, fields: Fields, body: bytes) -> None:
        self._require_epoch(fields)
        key = text_in(fields, "key", MAX_KEY)
        if not key.isprintable():
            raise InputError(f"{key!r:.60}", place="key", expected="printable text")
        self.values.put(key, count_in(fields, "parts", 1_000), body)

    def has(self, fields: Fields, client: str) -> Any:
        keys = list_in(fields, "keys", 10_000)
        return all(type(key) is str and self.values.has(key) for key in keys)

    def delete(self, fields: Fields, client: str) -> Any:
        self.values.delete(text_in(fields, "prefix", MAX_KEY))

    # ------------------------------------------------------------------ conditions

    def _require_run(self) -> _Run:
        if self._current is None:
            raise NoRun("no server has started a run at this store")
        return self._current

    def _require_epoch(self, fields: Fields) -> None:
        if text_in(fields, "epoch", MAX_KEY) != self.epoch:
            raise StoreRestartedError("the run's store was restarted meanwhile")


def wait_seconds(fields: Fields, maximum: float) -> float:
    """For how long a read waits."""
    return seconds_in(fields, "wait_s", maximum)


def _read_run(values: Any) -> tuple[bool, Fields]:
    """Whether the run has begun before, and the rest of what it is started with, checked."""
    if not isinstance(values, dict):
        raise InputError(f"{values!r:.60}", place="run", expected="an object")
    run = dict(values)
    begun = run.pop("begun", False)
    servers = list_in(run, "servers", MAX_SERVERS)
    named = all(type(name) is str and 0 < len(name) <= MAX_NAME for name in servers)
    if not servers or not named or len(set(servers)) < len(servers):
        raise InputError(f"{servers!r:.60}", place="servers", expected="different names")
    if seconds_in(run, "timeout_s", 1e6) <= 0:
        raise InputError("0", place="timeout_s", expected="seconds above 0")
    bounds = list_in(run, "bounds", 2)
    limits = (MAX_GPUS, MAX_PAIRS)
    if len(bounds) < 2 or not all(
        type(n) is int and 0 < n <= limit for n, limit in zip(bounds, limits, strict=True)
    ):
        raise InputError(f"{bounds!r:.60}", place="bounds", expected="numbers of GPUs and pairs")
    gpus = run.setdefault("gpus", [1] * len(servers))
    if (
        type(gpus) is not list
        or len(gpus) != len(servers)
        or not all(type(n) is int and 0 <= n <= MAX_GPUS for n in gpus)
        or sum(gpus) != bounds[0]
    ):
        raise InputError(
            f"{gpus!r:.60}", place="gpus", expected=f"{bounds[0]} GPUs of {len(servers)} servers"
        )
    for name, kinds in (("facts", dict), ("movable", bool), ("scheduler", (dict, type(None)))):
        if not isinstance(run.get(name), kinds):
            raise InputError(f"{run.get(name)!r:.60}", place=name)
    if type(begun) is not bool:
        raise InputError(f"{begun!r:.60}", place="begun", expected="a boolean")
    return begun, run


def _line_about(entry: LogEntry, servers: list[str]) -> str:
    """What a store's own log says of an entry; "" of most."""
    match entry:
        case log_entries.ServerJoined():
            return (
                f"server {servers[entry.server]!r} has joined at {entry.host}:{entry.port} with "
                f"{len(entry.experts)} experts"
            )
        case log_entries.ServerDown() if entry.reason != log_entries.JOINS_ANEW:
            return f"server {servers[entry.server]!r} is down: {entry.reason}"
        case log_entries.ServerLeft():
            return f"server {servers[entry.server]!r} has left"
        case log_entries.LogMessage():
            return entry.text
        case _:
            return ""
