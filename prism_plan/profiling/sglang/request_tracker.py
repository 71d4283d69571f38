"""Tell apart the requests of a per_token recording by their positions; see :mod:`.reader`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.profiling.sglang.forward_pass import EXTEND_MODE, RecordedPass
from prism_plan.trace import DECODE_PHASE, PREFILL_PHASE


@dataclass(eq=False)
class _Request:
    """A running request: its number, its next position, and whether it decodes yet."""

    number: int
    next_position: int
    decoding: bool = False


class RequestTracker:
    """Assigns the tokens of one rank's passes to requests; :mod:`.reader` describes the rules.

    ``num_requests`` counts from that of the ranks before it; ``swappable`` counts requests that may
    have been taken for each other.
    """

    def __init__(self, num_requests: int) -> None:
        self.num_requests = num_requests
        self.swappable = 0
        self._active: list[_Request] = []  # in batch order
        self._extended: list[_Request] = []  # of the last extend pass

    def assign(self, step: RecordedPass) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int8]]:
        """Request number and phase of each of the T tokens of a pass."""
        number = np.zeros(len(step.positions), np.int32)
        phase = np.full(len(step.positions), DECODE_PHASE, np.int8)
        decode_rows: list[int] = []
        extended: list[_Request] = []
        running = {request.next_position for request in self._active}
        if step.extend_lengths is None:
            decode_rows = np.flatnonzero(step.recorded).tolist()
        else:
            start = 0
            for length in step.extend_lengths:
                rows = slice(start, start + length)
                start += length
                if not length:
                    continue
                position = int(step.positions[rows.start])
                if length == 1 and position in running:
                    decode_rows.append(rows.start)
                    continue
                request = self._extend(position, length)
                extended.append(request)
                number[rows] = request.number
                phase[rows] = PREFILL_PHASE
        others = [request for request in self._active if request not in extended]
        decoded = self._decode(step.positions[decode_rows].tolist(), others)
        number[decode_rows] = [request.number for request in decoded]
        if step.mode == EXTEND_MODE:
            new = [request for request in decoded if request not in others]
            self._active = others + extended + new
        elif decoded or extended:
            # The whole running batch steps together: others have ended, but for a prompt of
            # which only a part was fed.
            ended = [request for request in others if request not in decoded]
            fed = {request.next_position - 1 for request in decoded}
            self.swappable += sum(request.next_position in fed for request in ended)
            unfinished = [request for request in self._extended if not request.decoding]
            self._active = extended + decoded + ([] if extended else unfinished)
        if step.extend_lengths is not None:
            self._extended = extended
        return number, phase

    def _extend(self, position: int, length: int) -> _Request:
        """The request that a piece of a prompt continues, or a new one."""
        request = None
        if position:
            request = next(
                (r for r in self._extended if r.next_position == position and not r.decoding), None
            )
        if request is None:
            request = self._new(position)
        else:
            self._extended.remove(request)
        request.next_position = position + length
        return request

    def _new(self, position: int) -> _Request:
        self.num_requests += 1
        return _Request(self.num_requests - 1, position)

    def _decode(self, positions: list[int], running: list[_Request]) -> list[_Request]:
        """The requests that rows of one token continue, in batch order where that is possible."""
        batch: list[_Request] = []
        first = 0
        for position in positions:
            in_order = range(first, len(running))
            found = next((i for i in in_order if running[i].next_position == position), None)
            if found is not None:
                first = found + 1
                request = running[found]
            else:
                earlier = (r for r in running if r.next_position == position and r not in batch)
                request = next(earlier, None) or self._new(position)
            request.next_position = position + 1
            request.decoding = True
            batch.append(request)
        return batch
