"""The processes of a store: each is started again, and all end together."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from runtime_adapter.control.store.client import StoreAddress, StoreClient
from runtime_adapter.control.store.supervisor import MAX_DEATHS
from tests.limits import HANG_S
from tests.runtime_adapter.control.store.stores import run_of, wait_until

ROOT = Path(__file__).parents[4]
MODULE = "tests.runtime_adapter.control.store.store_process"


@contextlib.contextmanager
def store_process(
    arguments: Sequence[str] = (),
) -> Iterator[tuple[subprocess.Popen[str], StoreAddress]]:
    """A supervisor, and the address at which its store listens."""
    command = [sys.executable, "-m", MODULE, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"listens on 127\.0\.0\.1:(\d+)", line)
        assert found, line
        yield process, StoreAddress("127.0.0.1", int(found[1]))
    finally:
        parts = children(process)
        process.kill()
        process.communicate(timeout=HANG_S)
        # they end with their supervisor, even if that cannot tell them
        wait_until(lambda: not any(part.is_running() and not is_zombie(part) for part in parts))


def is_zombie(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    return True


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Service and scheduler."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if any("spawn_main" in argument for argument in child.cmdline()):
                    found.append(child)
    return found


def is_service(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(
            connection.status == psutil.CONN_LISTEN for connection in process.net_connections()
        )
    return False


def service_of(process: subprocess.Popen[str]) -> psutil.Process:
    return wait_until(  # type: ignore[no-any-return]
        lambda: next(filter(is_service, children(process)), None), "the service"
    )


def test_a_service_that_is_killed_is_started_again_and_clients_go_on() -> None:
    """Members join again in a new epoch, with a greater incarnation, at the same address."""
    with store_process() as (process, address):
        client = StoreClient(address, "worker 1")
        epoch = client.start_run(run_of(), HANG_S)["epoch"]
        assert client.join(1, "127.0.0.1", 77, [], 0, HANG_S) == 1
        service_of(process).send_signal(signal.SIGKILL)
        wait_until(lambda: client.run(HANG_S)["epoch"] != epoch)
        assert client.join(1, "127.0.0.1", 77, [], 1, HANG_S) == 2
        assert client.members(HANG_S)[1]["state"] == "up"
        client.close()


def test_a_scheduler_that_is_killed_is_started_again() -> None:
    """The service does not notice but for the silence."""
    with store_process() as (process, address):
        client = StoreClient(address, "status")
        epoch = client.run(HANG_S)["epoch"]
        wait_until(lambda: client.status(HANG_S)["scheduler"]["silent_s"] is not None)
        service = service_of(process)
        [scheduler] = [part for part in children(process) if part.pid != service.pid]
        scheduler.kill()
        wait_until(lambda: scheduler.pid not in {part.pid for part in children(process)})
        wait_until(lambda: len(children(process)) == 2, "another scheduler")
        wait_until(lambda: client.status(HANG_S)["scheduler"]["silent_s"] < 1.0)
        assert client.run(HANG_S)["epoch"] == epoch
        assert client.status(HANG_S)["scheduler"]["migration"] == "none so far"
        client.close()


def test_a_store_whose_parts_die_again_and_again_gives_up() -> None:
    """It says which part, and how that ended."""
    with store_process() as (process, _):

        def kill() -> bool:
            for part in filter(is_service, children(process)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    part.kill()
            return process.poll() is not None

        wait_until(kill, "the end of the store")
        _, errors = process.communicate(timeout=HANG_S)
        assert process.returncode != 0
        assert "the store's service has ended (signal 9); it is started again" in errors
        assert f"{MAX_DEATHS} times within 60 s" in errors


def test_the_store_ends_when_all_have_left() -> None:
    """With exit code 0, and its scheduler with it."""
    with store_process() as (process, address):
        client = StoreClient(address, "worker 0")
        client.start_run(run_of(["a"]), HANG_S)
        client.join(0, "127.0.0.1", 77, [], 0, HANG_S)
        client.leave(0, 1, HANG_S)
        assert process.wait(HANG_S) == 0
        client.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_parts_end_with_their_supervisor(number: signal.Signals) -> None:
    """However that ends; the port is free then."""
    with store_process() as (process, _):
        service = service_of(process)
        parts = children(process)
        process.send_signal(number)
        process.wait(HANG_S)
        wait_until(lambda: all(is_zombie(part) for part in (service, *parts)))
        assert len(parts) >= 2  # service and scheduler: there was something to end
        assert process.returncode is not None


def test_the_store_ends_with_its_parent() -> None:
    """A server that has started it, and is gone, leaves nothing behind."""
    with store_process(["1"]) as (process, _):  # the parent that it looks for is another one
        assert process.wait(HANG_S) == 0
