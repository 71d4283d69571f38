"""Shapes the line between a server and the switch by a token bucket, and counts its traffic."""

from __future__ import annotations

import json
from dataclasses import dataclass

from prism_plan.errors import InputError
from studies.testbed import namespaces as netns


@dataclass(frozen=True)
class TokenBucket:
    """The rate and depth of a token bucket, and how much may wait for it.

    1 Mbit/s is 1e6 bits a second and 1 kb is 1000 bytes, as in a cluster file. Rate and bucket
    count whole Ethernet frames. ``queue_kb`` is deep, because a packet that finds it full is lost,
    and the sender waits for 200 ms before it tries again if nothing follows.

    Raises
    ------
    InputError
        A figure is out of range.
    """

    mbps: float
    burst_kb: float = 64.0
    queue_kb: float = 16_000.0

    def __post_init__(self) -> None:
        for name, minimum, maximum in (
            ("mbps", 0.1, 100_000.0),
            ("burst_kb", 2.0, 100_000.0),
            ("queue_kb", 2.0, 1_000_000.0),
        ):
            value = getattr(self, name)
            if not minimum <= value <= maximum:
                raise InputError(
                    f"{value:g}", parameter=name, expected=f"{minimum:g} to {maximum:g}"
                )

    @property
    def largest_packet_bytes(self) -> int:
        """The largest packet that TCP may pass to the line, to be cut into frames behind it.

        Half a bucket. One that exceeds the bucket is cut before it, at several times the work; and
        one that takes a whole bucket loses tokens whenever the timer that releases it is late.
        """
        return max(1_500, min(65_536, int(self.burst_kb * 500)))

    def qdisc(self, interface: str) -> str:
        """The line for ``tc`` that shapes what leaves through an interface."""
        return (
            f"qdisc replace dev {interface} root tbf rate {self.mbps * 1e6:.0f}bit"
            f" burst {self.burst_kb * 1e3:.0f}b limit {self.queue_kb * 1e3:.0f}b"
        )


@dataclass(frozen=True)
class Traffic:
    """Bytes and packets that a server has sent and received since its start, or in a period."""

    sent_bytes: int
    sent_packets: int
    received_bytes: int
    received_packets: int
    dropped_packets: int

    def __sub__(self, earlier: Traffic) -> Traffic:
        """The traffic of the period since then."""
        return Traffic(**{name: now - vars(earlier)[name] for name, now in vars(self).items()})


def interface_traffic(namespace: str, interface: str) -> Traffic:
    """The counters of an interface: the kernel's packets, up to 64 KB of one connection in each.

    Such a packet counts its headers once, though on the line every frame has its own; see
    `line_traffic`.
    """
    (link,) = json.loads(netns.query("ip", namespace, "-s", "-j", "link", "show", "dev", interface))
    tx, rx = link["stats64"]["tx"], link["stats64"]["rx"]
    return Traffic(
        tx["bytes"], tx["packets"], rx["bytes"], rx["packets"], tx["dropped"] + rx["dropped"]
    )


def line_traffic(up: tuple[str, str], down: tuple[str, str]) -> Traffic:
    """The counters of the token buckets: Ethernet frames as a real line would carry them.

    ``up`` and ``down`` are the (namespace, interface) whose qdisc shapes each direction.
    """
    sent, received = _qdisc(*up), _qdisc(*down)
    return Traffic(
        sent["bytes"],
        sent["packets"],
        received["bytes"],
        received["packets"],
        sent["drops"] + received["drops"],
    )


def _qdisc(namespace: str, interface: str) -> dict[str, int]:
    (found,) = json.loads(
        netns.query("tc", namespace, "-s", "-j", "qdisc", "show", "dev", interface)
    )
    return {key: int(found[key]) for key in ("bytes", "packets", "drops")}
