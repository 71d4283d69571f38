"""A store whose scheduler only shows that it lives, as a program: the tests kill its parts."""

from __future__ import annotations

import sys
import time

from runtime_adapter.control.store.client import StoreAddress, StoreClient
from runtime_adapter.control.store.supervisor import StoreConfig, run_store


def idle(address: StoreAddress, placements_dir: str | None, trace: str | None) -> None:
    """Send heartbeats."""
    client = StoreClient(address, "scheduler")
    while True:
        client.heartbeat(0, 0, "scheduler", timeout_s=600.0, migration="none so far")
        time.sleep(0.05)


if __name__ == "__main__":
    parent_pid = int(sys.argv[1]) if len(sys.argv) > 1 else None
    run_store(StoreConfig("127.0.0.1", 0, parent_pid=parent_pid), idle)
