"""``prism-runtime status`` as a user runs it: what it shows, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runtime_adapter.control.store.client import StoreAddress, StoreClient
from runtime_adapter.transport.secrets import read_secret
from tests.limits import HANG_S
from tests.runtime_adapter.control.store.stores import listening, run_of, serving

COMMAND = Path(sys.executable).with_name("prism-runtime")


def status(address: StoreAddress, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command."""
    return subprocess.run(
        [COMMAND, "status", "--store", str(address), *options],
        capture_output=True, text=True, timeout=HANG_S, check=False,
    )  # fmt: skip


def shown(address: StoreAddress, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit code, and what is printed as JSON."""
    done = status(address, "--json", *options)
    assert not done.stderr
    return done.returncode, json.loads(done.stdout)


def test_the_exit_code_says_whether_all_is_well() -> None:
    """1 while a server is missing or down, 0 when all are up, or have left in order."""
    with listening() as listener, serving(listener, keep=True) as address:
        client = StoreClient(address, "worker 0")
        assert shown(address)[0] == 1
        assert "no run has been started" in status(address).stdout
        client.start_run(run_of(["a", "b"], timeout_s=1000))
        client.join(0, "127.0.0.1", 70, [[0, 5, 0]], 0)
        code, values = shown(address)
        assert (code, [member["state"] for member in values["members"]]) == (1, ["up", "absent"])
        client.join(1, "127.0.0.1", 71, [], 0)
        client.heartbeat(
            0,
            1,
            "driver",
            requests={"running": 1, "done": 20, "failed": 3},
            error="no route to 'b'",
        )
        done = status(address)
        assert done.returncode == 0
        row = next(line for line in done.stdout.splitlines() if line.split()[:2] == ["a", "up"])
        assert row.split()[3:8] == ["1", "1", "1", "20", "3"]
        assert row.rstrip().endswith("no route to 'b'")
        assert "scheduler: never heard; no move" in done.stdout
        client.leave(0, 1)
        assert shown(address)[0] == 0
        client.close()


def test_a_member_that_is_not_heard_is_not_well() -> None:
    """Although nobody else is there to agree that it is lost."""
    with listening() as listener, serving(listener) as address:
        client = StoreClient(address, "worker 0")
        client.start_run(run_of(["a"], timeout_s=0.01))
        client.join(0, "127.0.0.1", 70, [], 0)
        code, values = shown(address)
        assert (code, values["members"][0]["shown_state"]) == (1, "silent")
        client.close()


def test_no_store_is_a_failure_of_its_own() -> None:
    """Exit code 5 and one line, also where the store has another secret."""
    with listening() as listener:
        address = StoreAddress("127.0.0.1", listener.getsockname()[1])
    done = status(address, "--timeout", "0.2")
    assert (done.returncode, done.stdout) == (5, "")
    assert "does not answer within 0.2 s" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("given", [True, False])
def test_a_run_with_a_secret_shows_itself_to_those_who_know_it(tmp_path: Path, given: bool) -> None:
    """Others get exit code 5."""
    path = tmp_path / "secret"
    path.write_bytes(os.urandom(32).hex().encode())
    path.chmod(0o600)
    with listening() as listener, serving(listener, secret=read_secret(path)) as address:
        done = status(address, *(["--secret-file", str(path)] if given else []))
        assert done.returncode == (1 if given else 5)
        assert ("no run has been started" in done.stdout) == given
