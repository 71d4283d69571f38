"""When a request whose step has failed is run again from its prompt and the tokens so far."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from prism_plan.errors import PrismError
from runtime_adapter.transport.nccl_channel import DataChannelBroken
from runtime_adapter.transport.peer import ConnectionLost
from runtime_adapter.transport.rendezvous import RequestTimeout, RuntimeFailure
from runtime_adapter.transport.wire_format import StepTooLong, WireError

#: A request is run again so often, and all requests of a home together so often within a minute,
#: or so often for each of its lanes: one lost server may end the step of every lane.
MAX_REPEATS, MAX_REPEATS_PER_MINUTE = 2, 20


class RepeatBudget:
    """How often requests may be run again: a fault that stays must not double the load.

    ``lanes`` are those of the home; ``now`` is a clock in seconds.
    """

    def __init__(self, lanes: int = 1, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._taken_s: deque[float] = deque(maxlen=max(MAX_REPEATS_PER_MINUTE, MAX_REPEATS * lanes))

    def take(self) -> bool:
        """Whether one more request may be run again now."""
        with self._lock:
            now = self._now()
            if len(self._taken_s) == self._taken_s.maxlen and now - self._taken_s[0] < 60.0:
                return False
            self._taken_s.append(now)
            return True


class StepFailed(PrismError):
    """A server that executes layers of a request cannot do a step.

    ``may_pass`` is whether the request may go well when it is run again.
    """

    exit_code = 5

    def __init__(self, text: str, *, may_pass: bool) -> None:
        self.may_pass = may_pass
        super().__init__(text)


def may_pass(error: Exception) -> bool:
    """Whether a step that failed for this reason may go well when it is run again."""
    if isinstance(error, StepFailed):
        return error.may_pass
    if isinstance(error, (RequestTimeout, StepTooLong)):
        return False
    return isinstance(error, (RuntimeFailure, WireError, ConnectionLost, DataChannelBroken))
