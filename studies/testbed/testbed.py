"""Servers on shaped links, all on one machine: a network namespace each, joined by a bridge.

::

    server 0                 switch                 server 1
    prism0 ===== port0 ==== bridge ==== port1 ===== prism0        (veth pairs)
      tbf up       tbf down              tbf down     tbf up

The bridge has a namespace of its own, so nothing is added to the host's network, and neither its
firewall nor its addresses play a part. There is no way out of these namespaces. Addresses of
neighbours are static and IPv6 is off, so that counters see the servers' traffic only.

As a command: ``python -m studies.testbed --servers 3 --mbps 500 -- COMMAND...``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

from prism_plan.errors import InputError, PrismError
from studies.testbed import namespaces as netns
from studies.testbed.namespaces import TestbedUnavailable
from studies.testbed.shaping import TokenBucket, Traffic, interface_traffic, line_traffic

__all__ = ["INTERFACE", "Testbed", "TestbedUnavailable", "TokenBucket", "Traffic"]

#: The name of a server's interface, inside its namespace.
INTERFACE = "prism0"
MAX_SERVERS = 200
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")

#: Settings below /proc/sys/net in a server's namespace. The congestion control is Linux's default,
#: whatever this machine's is; memory of earlier connections is off so that runs compare; and the
#: kernel queues no more for the line than a network card's short ring would take.
SETTINGS = {
    "ipv6/conf/all/disable_ipv6": "1",
    "ipv6/conf/default/disable_ipv6": "1",
    "ipv4/tcp_congestion_control": "cubic",
    "ipv4/tcp_no_metrics_save": "1",
    "ipv4/tcp_limit_output_bytes": "131072",
}


class Testbed:
    """Namespaces, lines and processes of ``servers`` servers; a context manager.

    Parameters
    ----------
    servers : int
        How many.
    mbps : float
        Rate of every uplink and every downlink, in 1e6 bits a second.
    names : sequence of str, optional
        The servers' names; ``server-0`` and so on if not given.
    rtt_ms : float
        Passed to the processes, which add it themselves: not every kernel can delay packets.
    burst_kb : float
        What may pass a line unshaped after a pause, in 1000 bytes.
    queue_kb : float
        What may wait for a line, in 1000 bytes; more is lost.

    Raises
    ------
    InputError
        A parameter is out of range.
    TestbedUnavailable
        No root, no iproute2, or a kernel without namespaces, bridges, veth pairs or token buckets.
    """

    __test__ = False  # no test class, whatever its name begins with

    def __init__(
        self,
        servers: int = 3,
        mbps: float = 500.0,
        *,
        names: Sequence[str] | None = None,
        rtt_ms: float = 0.0,
        burst_kb: float = 64.0,
        queue_kb: float = 16_000.0,
    ) -> None:
        if not 1 <= servers <= MAX_SERVERS:
            raise InputError(f"{servers}", parameter="servers", expected=f"1 to {MAX_SERVERS}")
        if not 0 <= rtt_ms <= 60_000:
            raise InputError(f"{rtt_ms:g}", parameter="rtt_ms", expected="0 to 60000")
        self.bucket = TokenBucket(mbps, burst_kb, queue_kb)
        self.names = _server_names(names, servers)
        self.rtt_ms = rtt_ms
        self.interface = INTERFACE
        netns.require_tools()
        for name in netns.orphaned():
            netns.remove(name)
        self.network = _free_network()
        self.addresses = tuple(str(self.network[n + 1]) for n in range(servers))
        self._switch, *self._namespaces = netns.names_for(
            ("switch", *(f"s{n}" for n in range(servers)))
        )
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            self._create()
        except BaseException:  # Ctrl-C too must leave nothing behind
            self.close()
            raise

    def __enter__(self) -> Testbed:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def address(self, index: int) -> str:
        """The address of a server, which only servers of this testbed can reach."""
        return self.addresses[index]

    def namespace(self, index: int) -> str:
        """The name of a server's network namespace, for as long as the testbed is open."""
        return self._namespaces[index]

    def environment(self, index: int) -> dict[str, str]:
        """The environment variables that describe a server to its processes."""
        return {
            "PRISM_SERVER_INDEX": str(index),
            "PRISM_SERVER_NAME": self.names[index],
            "PRISM_SERVERS": str(len(self.names)),
            "PRISM_NAMES": ",".join(self.names),
            "PRISM_INTERFACE": self.interface,
            "PRISM_ADDRESS": self.addresses[index],
            "PRISM_ADDRESSES": ",".join(self.addresses),
            "PRISM_RTT_MS": f"{self.rtt_ms:g}",
        }

    def run(
        self, index: int, argv: Sequence[str], env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start a command on a server, as the leader of a process group of its own.

        ``{index}``, ``{name}`` and ``{address}`` in its words are replaced. ``env`` is added to the
        environment, after the variables of `environment`; ``options`` go to `subprocess.Popen`.
        `close` kills it and all its children.

        Raises
        ------
        InputError
            There is no such command.
        """
        check_command(argv)
        fields = {
            "{index}": str(index),
            "{name}": self.names[index],
            "{address}": self.addresses[index],
        }
        words = [re.sub("|".join(fields), lambda found: fields[found[0]], word) for word in argv]
        process: subprocess.Popen[bytes] = subprocess.Popen(
            ["ip", "netns", "exec", self._namespaces[index], *words],
            env={**os.environ, **self.environment(index), **(env or {})},
            start_new_session=True,
            **options,
        )
        self._processes.append(process)
        return process

    def cut(self, index: int) -> None:
        """Take the cable of a server out of the switch: it loses its carrier, and all is lost."""
        netns.configure("ip", self._switch, [f"link set port{index} down"])

    def mend(self, index: int) -> None:
        """Put the cable of a server back."""
        netns.configure("ip", self._switch, [f"link set port{index} up"])

    def slow_down(self, index: int, factor: float) -> None:
        """Divide the rate of a server's uplink and downlink by a factor; 1 is as it was made.

        Raises
        ------
        InputError
            The rate is out of range then.
        """
        bucket = dataclasses.replace(self.bucket, mbps=self.bucket.mbps / factor)
        netns.configure("tc", self._switch, [bucket.qdisc(f"port{index}")])
        netns.configure("tc", self._namespaces[index], [bucket.qdisc(self.interface)])

    def counters(self, index: int) -> Traffic:
        """The counters of a server's interface: packets of the kernel, each up to 64 KB."""
        return interface_traffic(self._namespaces[index], self.interface)

    def line(self, index: int) -> Traffic:
        """The counters of a server's line: frames with their headers, as the rate counts them."""
        return line_traffic(
            (self._namespaces[index], self.interface), (self._switch, f"port{index}")
        )

    def signal(self, signum: signal.Signals) -> None:
        """Send a signal to the process group of every command that still runs."""
        for process in self._processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signum)

    def wait(self, timeout_s: float) -> bool:
        """Wait until every command has ended; false if some have not in time."""
        end = time.monotonic() + timeout_s
        while any(process.poll() is None for process in self._processes):
            if time.monotonic() >= end:
                return False
            time.sleep(0.02)
        return True

    def close(self) -> None:
        """Kill all processes of the servers and remove all namespaces; may be called again.

        Raises
        ------
        PrismError
            Something could not be removed.
        """
        failure = None
        self.signal(signal.SIGKILL)  # one that was started a moment ago may not be inside yet
        for name in (*self._namespaces, self._switch):
            try:
                netns.remove(name)
            except PrismError as error:  # after the others are removed
                failure = error
        for process in self._processes:
            process.wait()
        if failure is not None:
            raise failure

    def _create(self) -> None:
        servers = range(len(self.names))
        netns.create(self._switch, SETTINGS)
        netns.configure(
            "ip",
            self._switch,
            ["link add bridge type bridge stp_state 0 mcast_snooping 0", "link set bridge up"],
        )
        for n in servers:
            self._create_server(n)
        netns.configure("tc", self._switch, [self.bucket.qdisc(f"port{n}") for n in servers])
        netns.configure(
            "bridge",
            self._switch,
            [
                line
                for n in servers
                for line in (
                    f"link set dev port{n} learning off flood off",
                    f"fdb replace {_mac(n)} dev port{n} master static",
                )
            ],
        )

    def _create_server(self, n: int) -> None:
        own = self._namespaces[n]
        netns.create(own, SETTINGS)
        netns.configure(
            "ip",
            self._switch,
            [
                f"link add port{n} type veth"
                f" peer name {self.interface} address {_mac(n)} netns {own}",
                f"link set port{n} master bridge",
                f"link set port{n} up",
            ],
        )
        others = [m for m in range(len(self.names)) if m != n]
        netns.configure("tc", own, [self.bucket.qdisc(self.interface)])
        netns.configure(
            "ip",
            own,
            [
                "link set lo up",
                f"address add {self.addresses[n]}/{self.network.prefixlen} dev {self.interface}",
                f"link set {self.interface} up gso_max_size {self.bucket.largest_packet_bytes}",
                *(
                    f"neighbour replace {self.addresses[m]} lladdr {_mac(m)}"
                    f" dev {self.interface} nud permanent"
                    for m in others
                ),
            ],
        )


def check_command(argv: Sequence[str]) -> None:
    """Check that a command can be started.

    Raises
    ------
    InputError
        It is empty, or no program of this name is found.
    """
    if not argv:
        raise InputError("no command", remedy="give one after --")
    if "{" not in argv[0] and shutil.which(argv[0]) is None:
        raise InputError(f"no such command: {argv[0]}")


def _server_names(names: Sequence[str] | None, servers: int) -> tuple[str, ...]:
    if names is None:
        return tuple(f"server-{n}" for n in range(servers))
    if len(names) != servers:
        raise InputError(f"{len(names)} names for {servers} servers", parameter="names")
    for name in names:
        if NAME.fullmatch(name) is None:
            raise InputError(
                f"{name!r}",
                parameter="names",
                expected="letters, digits, '.', '_', '-', at most 63",
            )
    if len(set(names)) < len(names):
        raise InputError("the same name twice", parameter="names")
    return tuple(names)


def _free_network() -> ipaddress.IPv4Network:
    """A private /24 that no interface of the host uses: not needed, but less confusing in logs."""
    command = ["ip", "-4", "-j", "address"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    used = [
        ipaddress.ip_network(f"{entry['local']}/{entry['prefixlen']}", strict=False)
        for link in json.loads(listed or "[]")
        for entry in link.get("addr_info", [])
        if "local" in entry
    ]
    for third in range(256):
        network = ipaddress.IPv4Network((f"10.87.{third}.0", 24))
        if not any(network.overlaps(other) for other in used):
            return network
    raise PrismError("every network from 10.87.0.0 to 10.87.255.0 is in use on this machine")


def _mac(n: int) -> str:
    """The Ethernet address of a server: one of those that are left to local use."""
    return f"02:70:72:69:00:{n:02x}"
