"""Creates, names and removes the network namespaces of a testbed, by iproute2.

Every namespace of a testbed is called ``prism-PID-START-COUNT-PART``: the process that made it,
when that process started (a process id is used again in time), a count within the process, and what
it is for. So two testbeds never clash, and the leftovers of a killed one are recognised.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from prism_plan.errors import PrismError

NETNS_FOLDER = Path("/var/run/netns")
TOOLS = ("ip", "tc", "bridge")

#: Messages of iproute2 when the kernel lacks a part, or the process the right to use it.
UNAVAILABLE = re.compile(
    r"not permitted|not supported|kind is unknown|unknown device type|no such file.*modules", re.I
)
TESTBED_NAMESPACE = re.compile(r"prism-(?P<pid>\d+)-(?P<start>\d+)-\d+-\w+")

_count = itertools.count()


class TestbedUnavailable(PrismError):
    """The machine, or the user on it, cannot make a testbed; the message says what is missing."""

    __test__ = False  # no test class, whatever its name begins with


def require_tools() -> None:
    """Check that the user is root and that iproute2 is installed.

    Raises
    ------
    TestbedUnavailable
        One of them is missing.
    """
    if os.geteuid() != 0:
        raise TestbedUnavailable("the testbed makes network namespaces and needs root; run as root")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise TestbedUnavailable(
            f"the testbed needs iproute2 and finds no {' and no '.join(missing)}; install iproute2"
        )


def configure(tool: str, namespace: str, lines: Iterable[str]) -> None:
    """Run a batch of commands of a tool of iproute2 in a namespace.

    Raises
    ------
    TestbedUnavailable
        The kernel lacks a part, or the process the right to use it.
    PrismError
        A line failed for another reason.
    """
    lines = list(lines)
    result = _run([tool, "-n", namespace, "-batch", "-"], "\n".join(lines) + "\n")
    if result.returncode != 0:
        failed = re.search(r"Command failed -:(\d+)", result.stderr)
        line = lines[int(failed[1]) - 1] if failed else lines[0]
        raise _failure(f"{tool} {line}", result.stderr)


def query(tool: str, namespace: str, *words: str) -> str:
    """Run a command of a tool of iproute2 in a namespace; returns its output.

    Raises
    ------
    PrismError
        The tool failed.
    """
    result = _run([tool, "-n", namespace, *words])
    if result.returncode != 0:
        raise _failure(" ".join((tool, *words)), result.stderr)
    return result.stdout


def names_for(parts: Iterable[str]) -> list[str]:
    """Create unique names of namespaces, one per part of the testbed."""
    prefix = f"prism-{os.getpid()}-{_start_ticks(os.getpid())}-{next(_count)}"
    return [f"{prefix}-{part}" for part in parts]


def create(name: str, settings: Mapping[str, str]) -> None:
    """Create a namespace; ``settings`` go below its ``/proc/sys/net`` where the kernel has them.

    Raises
    ------
    TestbedUnavailable
        The kernel has no network namespaces, or the process may not make them.
    """
    result = _run(["ip", "netns", "add", name])
    if result.returncode != 0:
        raise _failure(f"ip netns add {name}", result.stderr)
    # a kernel without IPv6 has no switch to turn it off, and one may lack an algorithm
    script = "cd /proc/sys/net\n" + "\n".join(
        f"[ ! -e {path} ] || echo {value} 2>/dev/null >{path}" for path, value in settings.items()
    )
    _run(["ip", "netns", "exec", name, "sh", "-c", script])


def processes_in(name: str) -> list[int]:
    """Ids of the processes inside a namespace; none if it does not exist."""
    result = _run(["ip", "netns", "pids", name])
    return [int(word) for word in result.stdout.split()]


def remove(name: str, timeout_s: float = 10.0) -> None:
    """Kill the processes of a namespace and remove it with its interfaces; no error if it is gone.

    Raises
    ------
    PrismError
        It is still there after ``timeout_s``.
    """
    end = time.monotonic() + timeout_s
    while (pids := processes_in(name)) and time.monotonic() < end:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    result = _run(["ip", "netns", "del", name])
    if (NETNS_FOLDER / name).exists():
        raise _failure(f"ip netns del {name}", result.stderr)


def orphaned() -> list[str]:
    """Namespaces of testbeds whose process has ended."""
    try:
        names = sorted(path.name for path in NETNS_FOLDER.iterdir())
    except FileNotFoundError:
        return []
    matches = [match for match in map(TESTBED_NAMESPACE.fullmatch, names) if match]
    return [m[0] for m in matches if _start_ticks(int(m["pid"])) != int(m["start"])]


def _start_ticks(pid: int) -> int:
    """When a process started, in the kernel's ticks since boot; -1 if it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return -1
    fields = text.rpartition(")")[2].split()  # a program's name may hold anything, ")" too
    return -1 if fields[0] in "ZX" else int(fields[19])


def _run(words: list[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a tool out of reach of the terminal's Ctrl-C, which must not cut a removal short."""
    return subprocess.run(
        words, input=stdin, capture_output=True, text=True, check=False, start_new_session=True
    )


def _failure(command: str, stderr: str) -> PrismError:
    lines = [line for line in stderr.splitlines() if not line.startswith("Command failed")]
    kind = TestbedUnavailable if UNAVAILABLE.search(stderr) else PrismError
    return kind(f"{command}: {' '.join(lines).removeprefix('Error: ') or 'failed'}")
