"""Links between servers: how long a payload holds them, and how long a message is under way."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.errors import InputError
from prism_plan.model_spec import ModelSpec

Floats = npt.NDArray[np.float64]

#: Bytes of one expert call of a token in a message: id and gate weight (docs/design.md, section 4).
BYTES_PER_CALL = 4
#: Bytes of a token's id on its way between servers (docs/design.md, section 10, rules 1 and 3).
BYTES_PER_TOKEN_ID = 4


@dataclass(frozen=True, eq=False)
class Network:
    """What a message between two servers costs (docs/design.md, section 4, rule 3).

    A message starts when its sender's uplink and its receiver's downlink are both free; of those
    that wait, the one that was ready first. One that cannot start yet does not block those behind
    it: with many servers, queues that block each other would stop a cluster whose links are idle.

    ``seconds_per_byte`` [N, N] from sender (row) to receiver at the lowest rate of the sender's
    uplink, the receiver's downlink and the cap of the pair; ``half_rtt_s`` [N, N];
    ``up_bytes_per_s`` and ``down_bytes_per_s`` [N], the ports' own rates, at which their token
    buckets of ``burst_bytes`` fill; ``call_overhead_s``, paid once per call at the sender, and
    ``hop_overhead_s``, paid by each other message (hidden states and token ids between spans);
    messages below ``short_bytes`` wait for each other, but not for longer ones, nor those for them,
    because TCP shares a line. A long message under way delays a short one by at most the time of
    ``short_bytes``, as much as the kernel queues for the line at once; ``token_bytes``, a token's
    hidden state. Diagonals are zero. Arrays are read-only.
    """

    seconds_per_byte: Floats
    half_rtt_s: Floats
    up_bytes_per_s: Floats
    down_bytes_per_s: Floats
    call_overhead_s: float
    burst_bytes: float
    token_bytes: int
    short_bytes: float = 0.0
    hop_overhead_s: float = 0.0

    def __post_init__(self) -> None:
        for array in vars(self).values():
            if isinstance(array, np.ndarray):
                array.setflags(write=False)

    @classmethod
    def of(cls, cluster: Cluster, model: ModelSpec) -> Network:
        """The links of a cluster, for messages of a model.

        1 Mbit/s is 1e6 bits a second, 1 kb of ``burst_kb`` is 1000 bytes.

        Raises
        ------
        InputError
            A bandwidth is not above zero, or a time is negative or not finite.
        """
        link = cluster.link
        default = _positive(link.bandwidth_mbps, "link.bandwidth_mbps")
        up, down = np.empty(cluster.num_servers), np.empty(cluster.num_servers)
        for n, server in enumerate(cluster.servers):
            for ports, key in ((up, "uplink_mbps"), (down, "downlink_mbps")):
                own = getattr(server, key)
                ports[n] = default if own is None else _positive(own, f"server[{n}].{key}")
        cap = np.full((cluster.num_servers,) * 2, default)
        rtt_ms = np.full_like(cap, _not_negative(link.rtt_ms, "link.rtt_ms"))
        for index, pair in enumerate(cluster.pair_links):
            ends = ((pair.a, pair.b), (pair.b, pair.a))
            for a, b in ends:
                if pair.bandwidth_mbps is not None:
                    place = f"links[{index}].bandwidth_mbps"
                    cap[a, b] = _positive(pair.bandwidth_mbps, place)
                if pair.rtt_ms is not None:
                    rtt_ms[a, b] = _not_negative(pair.rtt_ms, f"links[{index}].rtt_ms")
        rate_mbps = np.minimum(np.minimum(up[:, None], down[None, :]), cap)
        seconds_per_byte = 8e-6 / rate_mbps
        half_rtt_s = rtt_ms * 0.5e-3
        np.fill_diagonal(seconds_per_byte, 0.0)
        np.fill_diagonal(half_rtt_s, 0.0)
        overhead_ms = _not_negative(link.call_overhead_ms, "link.call_overhead_ms")
        hop_overhead_ms = overhead_ms
        if link.hop_overhead_ms is not None:
            hop_overhead_ms = _not_negative(link.hop_overhead_ms, "link.hop_overhead_ms")
        return cls(
            seconds_per_byte=seconds_per_byte,
            half_rtt_s=half_rtt_s,
            up_bytes_per_s=up * 0.125e6,
            down_bytes_per_s=down * 0.125e6,
            call_overhead_s=overhead_ms * 1e-3,
            burst_bytes=_not_negative(link.burst_kb, "link.burst_kb") * 1e3,
            token_bytes=model.hidden_size * model.dtype_bytes,
            short_bytes=_not_negative(link.short_kb, "link.short_kb") * 1e3,
            hop_overhead_s=hop_overhead_ms * 1e-3,
        )

    def link_rank(self) -> npt.NDArray[np.int32]:
        """Rank of each receiver (column) for a sender by :meth:`call_cost_s`, int32 [N, N].

        Route ``nearest`` takes the least rank; of equal costs the lower index has the lower rank.
        """
        order = np.argsort(self.call_cost_s(), axis=1, kind="stable")
        return np.argsort(order, axis=1).astype(np.int32)

    def call_cost_s(self) -> Floats:
        """Seconds of a call of one token on idle links, without compute, [N, N]."""
        back = self.seconds_per_byte.T * self.token_bytes
        out = self.seconds_per_byte * (self.token_bytes + BYTES_PER_CALL)
        return self.half_rtt_s + self.half_rtt_s.T + out + back


def _positive(value: float, place: str) -> float:
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{value!r}", place=place, expected="Mbit/s above 0")
    return value


def _not_negative(value: float, place: str) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"{value!r}", place=place, expected="a number of at least 0")
    return value
