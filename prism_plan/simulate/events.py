"""Events, their order, and the log that tests compare.

A heap entry is (time, priority, number, kind, subject): entries of one time are processed by the
priority of their kind, then in the order in which they were pushed, so the order is total and runs
repeat.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

#: A request arrives at its home server.
ARRIVAL = 0
#: The dense part of a request's layer is done; its tokens are routed.
DENSE = 1
#: The local experts of a request's layer are done.
LOCAL = 2
#: A message is ready for the link.
SEND = 3
#: A message has arrived at the other server.
ARRIVED = 4
#: The experts of a message are done; the partial sums are ready for the link.
COMPUTED = 5
#: The partial sums of a message are back.
RETURNED = 6
#: An expert has been loaded into its new place.
LOADED = 7
#: A transfer has ended: the uplink and the downlink that it held are free.
FREED = 8
#: A step that waits for an expert which no server holds is given up.
GIVEN_UP = 9

#: Of events at one time, ends of loads and transfers are processed first and arrivals last, so that
#: the others find the places and links that are free at that time. Lowest first.
PRIORITY = np.array([2, 1, 1, 1, 1, 1, 1, 0, 0, 1], np.int8)
PRIORITY.setflags(write=False)


class Event(NamedTuple):
    """One line of an event log.

    ``request`` is -1 for loads. ``at`` and ``to`` are servers: of a message its two ends in the
    direction in which it was first sent, of work the place where it is done, of a load the server
    and the GPU (in the cluster's order). ``layer`` is a layer position, L for the way home, -1 for
    arrivals and loads.
    """

    time_s: float
    kind: int
    request: int
    layer: int
    at: int
    to: int


Log = list[Event]
