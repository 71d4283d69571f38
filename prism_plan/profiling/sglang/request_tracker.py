"""The requests of a per_token recording, told apart; see :mod:`.reader`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.profiling.common.json_fields import DECODE, PREFILL
from prism_plan.profiling.sglang.forward_pass import EXTEND_MODE, Pass


@dataclass(eq=False)
class _Request:
    """A request being followed: its number, its next position, and whether it decodes yet."""

    number: int
    next: int
    decoding: bool = False


class Follower:
    """Tells the requests of one rank apart by their positions, as sglang.py describes."""

    def __init__(self, first: int) -> None:
        self.count = first
        self.active: list[_Request] = []  # in batch order
        self.chunked: list[_Request] = []  # of the last extend pass
        self.swappable = 0

    def follow(self, step: Pass) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int8]]:
        """Request number and phase of each of the T tokens of a pass."""
        request = np.zeros(len(step.positions), np.int32)
        phase = np.full(len(step.positions), DECODE, np.int8)
        rows: list[int] = []
        fresh: list[_Request] = []
        running = {one.next for one in self.active}
        if step.pieces is None:
            rows = np.flatnonzero(step.kept).tolist()
        else:
            start = 0
            for length in step.pieces:
                piece = slice(start, start + length)
                start += length
                if not length:
                    continue
                at = int(step.positions[piece.start])
                if length == 1 and at in running:
                    rows.append(piece.start)
                    continue
                one = self._extend(at, length)
                fresh.append(one)
                request[piece] = one.number
                phase[piece] = PREFILL
        batch = self._match(
            step.positions[rows].tolist(), [one for one in self.active if one not in fresh]
        )
        request[rows] = [one.number for one in batch]
        if step.mode == EXTEND_MODE:
            others = [one for one in self.active if one not in fresh]
            self.active = others + fresh + [one for one in batch if one not in others]
        elif batch or fresh:
            # The whole running batch steps together: others have ended, but for a prompt of
            # which only a part was fed.
            ended = [one for one in self.active if one not in batch and one not in fresh]
            taken = {one.next - 1 for one in batch}
            self.swappable += sum(one.next in taken for one in ended)
            waiting = [] if fresh else [one for one in self.chunked if not one.decoding]
            self.active = fresh + batch + waiting
        if step.pieces is not None:
            self.chunked = fresh
        return request, phase

    def _extend(self, at: int, length: int) -> _Request:
        going_on = (one for one in self.chunked if one.next == at and not one.decoding)
        one = next(going_on, None) if at else None
        if one is None:
            one = self._new(at)
        else:
            self.chunked.remove(one)
        one.next = at + length
        return one

    def _new(self, at: int) -> _Request:
        self.count += 1
        return _Request(self.count - 1, at)

    def _match(self, positions: list[int], running: list[_Request]) -> list[_Request]:
        """The requests that these rows go on with, in batch order where that is possible."""
        batch: list[_Request] = []
        pointer = 0
        for at in positions:
            ahead = range(pointer, len(running))
            found = next((i for i in ahead if running[i].next == at), None)
            if found is not None:
                pointer = found + 1
                one = running[found]
            else:
                late = (one for one in running if one.next == at and one not in batch)
                one = next(late, None) or self._new(at)
            one.next = at + 1
            one.decoding = True
            batch.append(one)
        return batch
