"""Servers that are lost during a run, and when the others know (docs/design.md, section 4)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError, did_you_mean
from prism_plan.simulate.arrival_trace import MAX_S
from prism_plan.simulate.requests import Requests

#: What a user may write for seconds: no sign, no infinity, no spaces.
_SECONDS = r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?"
_TIMES = re.compile(rf"({_SECONDS})(?::({_SECONDS}))?")


@dataclass(frozen=True)
class Loss:
    """A server that stops at a time, and perhaps comes back; seconds from the start of the run.

    Raises
    ------
    InputError
        A time is out of range, or the return is not after the loss.
    """

    server: str
    at_s: float
    return_s: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.at_s <= MAX_S:  # NaN is neither
            raise InputError(
                f"{self.server}: {self.at_s}",
                parameter="lose",
                expected=f"seconds from 0 to {MAX_S:g}",
            )
        if self.return_s is not None and not self.at_s < self.return_s <= MAX_S:
            raise InputError(
                f"{self.server}: lost at {self.at_s:g} s, back at {self.return_s:g} s",
                parameter="lose",
                expected="a return after the loss, in seconds from the start of the run",
            )


def parse_loss(text: str) -> Loss:
    """A loss from its text ``NAME@SECONDS`` or ``NAME@SECONDS:RETURN``.

    Raises
    ------
    InputError
        The text is not of this form, or a time is out of range.
    """
    name, at, times = text.rpartition("@")
    found = _TIMES.fullmatch(times)
    if not (name and at and found):
        raise InputError(
            f"{text!r:.80}",
            parameter="lose",
            expected="NAME@SECONDS or NAME@SECONDS:RETURN, both times in seconds from the start",
        )
    return Loss(name, float(found[1]), None if found[2] is None else float(found[2]))


class LossEvent(NamedTuple):
    """Something that happens to one server: see :meth:`LossPlan.events`."""

    at_s: float
    kind: Literal["loss", "notice", "return"]
    server: int
    #: Which of the losses it belongs to.
    number: int


@dataclass(frozen=True)
class LossPlan:
    """The losses of a run, in order of time.

    Parameters
    ----------
    losses
        Which servers are lost, and when.
    timeout_s
        Seconds after a loss at which all other servers know of it.
    request_timeout_s
        Seconds for which a step waits for an expert that no server holds.

    Raises
    ------
    InputError
        A number is out of range, or a server is lost while it is away.
    """

    losses: tuple[Loss, ...]
    timeout_s: float = 10.0
    request_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for name, least in (("timeout_s", "at least 0"), ("request_timeout_s", "above 0")):
            value = getattr(self, name)
            if not 0 <= value <= MAX_S or (name == "request_timeout_s" and value == 0):
                raise InputError(
                    f"{value}", parameter=name, expected=f"seconds {least}, at most {MAX_S:g}"
                )
        ordered = tuple(sorted(self.losses, key=lambda loss: loss.at_s))
        object.__setattr__(self, "losses", ordered)
        before: dict[str, Loss] = {}
        for loss in ordered:
            last = before.get(loss.server)
            if last is not None and (last.return_s is None or last.return_s >= loss.at_s):
                raise InputError(
                    f"{loss.server} at {loss.at_s:g} s, while it is away since {last.at_s:g} s",
                    parameter="lose",
                    expected="a server that is there",
                    remedy=f"give the earlier loss a return before {loss.at_s:g} s",
                )
            before[loss.server] = loss

    def notice_s(self, loss: Loss) -> float:
        """When all other servers know of a loss: after the timeout, or at an earlier return."""
        known_s = loss.at_s + self.timeout_s
        return known_s if loss.return_s is None else min(known_s, loss.return_s)

    def check(self, requests: Requests) -> None:
        """Refuse losses that do not fit the servers and the requests of a run.

        Raises
        ------
        InputError
            A server is not there, all of them are away at once, or a loss comes after the last
            arrival.
        """
        servers = requests.servers
        for loss in self.losses:
            if loss.server not in servers:
                raise InputError(
                    f"{loss.server!r:.60}{did_you_mean(loss.server, servers)}",
                    parameter="lose",
                    expected=f"a server of the cluster: {', '.join(servers)}",
                )
            last_s = float(requests.arrival_s[-1]) if len(requests) else 0.0
            if loss.at_s > last_s:
                raise InputError(
                    f"{loss.server} at {loss.at_s:g} s",
                    parameter="lose",
                    expected=f"a time up to the last arrival, at {last_s:g} s",
                )
            away = {
                other.server
                for other in self.losses
                if other.at_s <= loss.at_s
                and (other.return_s is None or other.return_s >= loss.at_s)
            }
            if len(away) == len(servers):
                raise InputError(
                    f"no server is left at {loss.at_s:g} s",
                    parameter="lose",
                    expected="one that is not lost, at any time",
                )

    def events(self, servers: Sequence[str]) -> list[LossEvent]:
        """All losses, notices and returns in order; of one time, those of the first loss first."""
        found = []
        for number, loss in enumerate(self.losses):
            server = servers.index(loss.server)
            found.append(LossEvent(loss.at_s, "loss", server, number))
            found.append(LossEvent(self.notice_s(loss), "notice", server, number))
            if loss.return_s is not None:
                found.append(LossEvent(loss.return_s, "return", server, number))
        return sorted(found, key=lambda event: (event.at_s, event.number))

    def served(self, requests: Requests) -> Requests:
        """The requests without those that arrive at a home server which is away.

        A server serves what arrives at the time of its loss, and not what arrives at that of its
        return: both follow the other events of their time.
        """
        if not self.losses:
            return requests
        kept = np.ones(len(requests), bool)
        for loss in self.losses:
            end_s = np.inf if loss.return_s is None else loss.return_s
            at_s = requests.arrival_s
            here = requests.home == requests.servers.index(loss.server)
            kept &= ~(here & (at_s > loss.at_s) & (at_s <= end_s))
        return dataclasses.replace(
            requests,
            home=requests.home[kept],
            arrival_s=requests.arrival_s[kept],
            prompt=requests.prompt[kept],
        )


#: Why a request left without an answer, by code; 0 if it did not.
LOST, HELD_NOWHERE, WAITED_TOO_LONG = 1, 2, 3


@dataclass(frozen=True, eq=False)
class LossOutcome:
    """What losses did to R requests.

    ``left_s`` [R] is when a request left without an answer, NaN if it did not, and ``why`` int8 [R]
    the code of the reason; ``restarts`` int64 [R] counts how often it was started again from its
    prompt and tokens. ``repeated_calls`` counts messages with calls whose server was lost before it
    answered, and whose calls were sent again.
    """

    left_s: npt.NDArray[np.float64]
    why: npt.NDArray[np.int8]
    restarts: npt.NDArray[np.int64]
    repeated_calls: int
