"""How a server comes into its run: by what it agrees on with the others, and under its name."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

from prism_plan.errors import InputError, PrismError
from prism_plan.io.json import parse_json
from runtime_adapter.control.store.client import StoreClient
from runtime_adapter.server_config import ServerConfig
from runtime_adapter.shared_status import SharedStatus
from runtime_adapter.transport.dialing import dial
from runtime_adapter.transport.failure_detector import HEARTBEAT_MARGIN_S
from runtime_adapter.transport.handshake import Claim, HandshakeFailed
from runtime_adapter.transport.nccl_channel import card_id, require_own_card
from runtime_adapter.transport.rendezvous import NameTaken, RuntimeFailure

#: Between two questions to the store, while this server waits for others.
POLL_INTERVAL_S = 0.1
#: So long after this one looked, an earlier process of the name would have sent a heartbeat.
HEARTBEATS_S = 1.0
#: What a server says to the others, by the store, when it cannot join.
DOES_NOT_JOIN = "does not join: "
MAX_REASON = 400


class Joining:
    """Brings one server into its run; ``report`` gets lines for its log.

    ``may_abort`` says whether others wait for this server, so that the run ends if it cannot join.
    """

    def __init__(
        self, config: ServerConfig, client: StoreClient, report: Callable[[str], None]
    ) -> None:
        self.may_abort = False
        self._config = config
        self._rank = config.rendezvous.rank
        self._client = client
        self._report = report

    def start_run(self) -> bool:
        """Agree with the other servers on what is run; returns whether the run has begun.

        The first server says what it is; the others wait for it.
        """
        config, placement = self._config, self._config.placement
        limit_s = config.rendezvous.rendezvous_timeout_s
        deadline = time.monotonic() + limit_s
        while self._rank != 0 and self._client.run(limit_s)["run"] is None:
            if time.monotonic() > deadline:
                raise RuntimeFailure(
                    f"server {placement.servers[0]!r} did not come within {limit_s:g} s"
                )
            time.sleep(POLL_INTERVAL_S)
        scheduler = config.migration.scheduler
        answer = self._client.start_run(
            {
                "facts": config.facts,
                "servers": list(placement.servers),
                "timeout_s": config.rendezvous.timeout_s,
                "bounds": [placement.on_gpu.shape[0], placement.model.num_pairs],
                "gpus": [len(gpus) for gpus in placement.gpu_capacity],
                "movable": config.migration.movable,
                "scheduler": None if scheduler is None else scheduler.to_json(),
            },
            limit_s,
        )
        if answer["run"]["servers"] == list(placement.servers):
            self._claim_name()
            self.may_abort = not answer["begun"]
        self._require_same_facts(answer["run"])
        return bool(answer["begun"])

    def _require_same_facts(self, run: dict[str, Any]) -> None:
        own = {
            **parse_json(json.dumps(self._config.facts), "facts"),
            "servers": list(self._config.placement.servers),
        }
        expected = {**run["facts"], "servers": run["servers"]}
        for key, value in own.items():
            if expected.get(key) != value:
                raise InputError(
                    f"{value!r:.80}",
                    source=f"server {self._config.name!r}",
                    parameter=key,
                    expected=f"{expected.get(key)!r:.80}, as the first server has it",
                )

    def _claim_name(self) -> None:
        """Wait until an earlier process of this name is down.

        Raises
        ------
        NameTaken
            It is alive.
        """
        began_s = time.monotonic()
        rendezvous = self._config.rendezvous
        waiting = False
        while True:
            member = self._client.members()[self._rank]
            if member["state"] not in ("up", "joining"):
                return
            silent = [member[key] for key in ("worker_silent_s", "driver_silent_s")]
            silent_s = min([seconds for seconds in silent if seconds is not None], default=1e9)
            waited_s = time.monotonic() - began_s
            if silent_s < waited_s - 2 * POLL_INTERVAL_S:  # one came since we look
                raise self._name_taken("is there already")
            if silent_s > HEARTBEAT_MARGIN_S and self._is_refused(member["address"]):
                return  # that process is gone, and its machine says so
            if silent_s > rendezvous.timeout_s + HEARTBEAT_MARGIN_S:
                return
            if waited_s > rendezvous.rendezvous_timeout_s:
                limit_s = rendezvous.rendezvous_timeout_s
                raise self._name_taken(f"is still in the run after {limit_s:g} s")
            if not waiting and waited_s > HEARTBEATS_S:
                waiting = True
                self._report("an earlier process of this server is silent: waiting for its end")
            time.sleep(POLL_INTERVAL_S)

    def _name_taken(self, how: str) -> NameTaken:
        return NameTaken(
            f"server {self._config.name!r} {how}",
            parameter="server",
            remedy="start each server once",
        )

    def _is_refused(self, address: Any) -> bool:
        if address is None:
            return True
        claim = Claim("ping", server=self._config.name)
        try:
            connection, _ = dial(tuple(address), claim, self._config.rendezvous.secret, 0.5)
        except ConnectionRefusedError:
            return True
        except (OSError, HandshakeFailed):
            return False
        connection.close()
        return False

    def require_own_card(self, begun: bool) -> None:
        """Say which card this server computes on; raises where another server has it as well."""
        assert self._config.channels is not None
        servers = self._config.placement.servers
        card = card_id(self._config.channels.device)
        epoch = str(self._client.run()["epoch"])
        self._client.put(f"card/{self._rank}", card.encode(), epoch)
        cards, deadline = [], time.monotonic() + self._config.rendezvous.rendezvous_timeout_s
        for n, name in enumerate(servers):
            while not self._client.has([f"card/{n}"]):
                if begun or time.monotonic() > deadline:
                    break
                time.sleep(POLL_INTERVAL_S)
            found = self._client.has([f"card/{n}"])
            if not found and not begun:
                raise RuntimeFailure(f"server {name!r} did not come in time")
            cards.append(self._client.get(f"card/{n}").decode() if found else "")
        cards[self._rank] = card
        require_own_card(self._rank, cards, servers)

    def agree_on_start(self, status: SharedStatus) -> float:
        """Wait until the run begins; returns when it does, by ``time.monotonic``.

        That is in the past where the run has begun before.

        Raises
        ------
        RuntimeFailure
            Not all servers are there in time, or one of them does not join.
        NameTaken
            Another process of this name has joined first.
        """
        limit_s = self._config.rendezvous.rendezvous_timeout_s
        deadline = time.monotonic() + limit_s
        while True:
            if status.name_taken[0]:  # by one that was started at the same time
                raise self._name_taken("is there already")
            if status.joined[0]:
                seconds = self._client.begin_when_all(self._rank)
                if seconds is not None:
                    return time.monotonic() + seconds
            members = self._client.members()
            missing = [member["name"] for member in members if member["state"] != "up"]
            for member in members:
                error = member["info"].get("error") or ""
                if member["state"] != "up" and error.startswith(DOES_NOT_JOIN):
                    raise RuntimeFailure(f"server {member['name']!r} {error}")
            if time.monotonic() > deadline:
                names = ", ".join(map(repr, missing))
                raise RuntimeFailure(f"server {names} did not come within {limit_s:g} s")
            time.sleep(POLL_INTERVAL_S)

    def tell_why_not(self, error: BaseException) -> bool:
        """Tell the servers that wait for this one why it does not join; returns whether any do."""
        if not self.may_abort or isinstance(error, NameTaken):
            return False
        reason = error.message if isinstance(error, PrismError) else "it was stopped"
        with contextlib.suppress(PrismError):
            self._client.heartbeat(
                self._rank, 0, "driver", timeout_s=2.0, error=(DOES_NOT_JOIN + reason)[:MAX_REASON]
            )
        return True
