"""An ``--interface`` that cannot carry links is refused before a server joins."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytest.importorskip("torch")

from prism_plan.errors import InputError
from runtime_adapter.cli.options import RendezvousOptions
from runtime_adapter.transport import interfaces
from runtime_adapter.transport.interfaces import require_interface
from tests.runtime_adapter.replays import (
    PATIENCE_S,
    Material,
    cluster_text,
    environment,
    striped,
)

NAMES = [name for _, name in socket.if_nameindex()]


def usable(name: str) -> bool:
    """Whether an interface is accepted."""
    try:
        require_interface(name)
    except InputError:
        return False
    return True


@pytest.mark.parametrize("name", NAMES)
def test_interfaces_are_accepted_that_are_up_with_an_address(name: str) -> None:
    """For each interface of this machine the verdict follows from what psutil says of it."""
    addresses = psutil.net_if_addrs().get(name, [])
    has_ipv4 = any(address.family == socket.AF_INET for address in addresses)
    assert usable(name) == (psutil.net_if_stats()[name].isup and has_ipv4)


def test_one_that_does_not_exist() -> None:
    """The message lists those that there are."""
    with pytest.raises(InputError) as error:
        require_interface("eth99x")
    assert "interface: no interface 'eth99x'" in str(error.value)
    assert f"expected one of {', '.join(NAMES)}" in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("flags", "address", "message"),
    [
        (0, b"x", "'lo' is down"),
        (1, None, "'lo' has no IPv4 address"),
    ],
)
def test_one_that_carries_nothing(
    flags: int, address: bytes | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is down or has no address of IPv4, which counts only where the store has one."""

    def request(name: str, what: int) -> bytes | None:
        return struct.pack("=16sH", b"", flags) if what == interfaces._SIOCGIFFLAGS else address

    monkeypatch.setattr(interfaces, "_request", request)
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    with pytest.raises(InputError) as error:
        require_interface("lo")
    assert message in str(error.value)
    assert "expected one of lo, eth0" in str(error.value)
    if flags:
        require_interface("lo", ipv4=False)


def test_the_system_is_asked_rightly() -> None:
    """In a network namespace of its own the loopback interface is down, and so told."""
    module = "runtime_adapter.transport.interfaces"
    code = f"from {module} import require_interface; require_interface('lo')"
    words = ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", code]
    try:
        subprocess.run([*words[:4], "true"], check=True, capture_output=True, timeout=PATIENCE_S)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("no network namespaces here")
    found = subprocess.run(
        words, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert found.stderr.splitlines()[-1].endswith(
        "interface: 'lo' is down; expected one of lo; ip link set lo up, or choose another one"
    )


def test_every_command_that_meets_others_asks() -> None:
    """They read their options in one place, before the store is joined."""
    options = RendezvousOptions(
        explicit_names=frozenset(), server="s0", store="127.0.0.1:29400", interface="eth99x",
        timeout_s=10.0, rendezvous_timeout_s=60.0, request_timeout_s=600.0, rtt_ms=0.0,
        listen_port=0, secret_file=None, insecure=False, log_level="info", log_format="text",
    )  # fmt: skip
    with pytest.raises(InputError, match="interface: no interface 'eth99x'"):
        options.rendezvous(("s0", "s1"))


@pytest.mark.parametrize("program", ["replay", "calibrate"])
def test_programs_refuse_it(program: str, tmp_path: Path) -> None:
    """Exit code 2 and one line; nobody had to be there."""
    material = Material(tmp_path, cluster_text(2, slots=24))
    material.placement("p.json", striped(3, 0))
    words = {
        "replay": ["--placement", "p.json", "--trace", "trace.parquet"],
        "calibrate": ["--model", "mixtral-8x7b", "-o", "out.json"],
    }[program]
    found = subprocess.run(
        [
            *(sys.executable, "-m", "runtime_adapter", program, "--cluster", "cluster.toml"),
            *("--server", "s0", "--interface", "eth99x", *words),
        ],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert found.returncode == 2, found.stderr
    assert found.stderr.startswith("prism-runtime: --interface: no interface 'eth99x'")
    assert len(found.stderr.splitlines()) == 1
