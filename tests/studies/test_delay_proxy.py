"""The proxy that delays connections: bytes in order, and never early."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.limits import HANG_S
from tests.runtime_adapter.replays import free_port

ROOT = Path(__file__).resolve().parents[2]


def test_bytes_arrive_in_order_and_late() -> None:
    """An echo takes the round trip at least, both ways carry all bytes, and ends are passed on."""
    data = bytes(range(256)) * 2000
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def echo() -> None:
            with listener.accept()[0] as connection:
                while part := connection.recv(65536):
                    connection.sendall(part)

        threading.Thread(target=echo, daemon=True).start()
        port = free_port()
        words = [f"127.0.0.1:{port}", f"127.0.0.1:{listener.getsockname()[1]}", "20"]
        with subprocess.Popen(
            [sys.executable, "-m", "studies.delay_proxy", *words], cwd=ROOT
        ) as proxy:
            try:
                with connected(port) as client:
                    began_s = time.monotonic()
                    client.sendall(b"x")
                    assert client.recv(1) == b"x"
                    assert time.monotonic() - began_s >= 0.02
                    threading.Thread(target=client.sendall, args=(data,), daemon=True).start()
                    found = b""
                    while len(found) < len(data):
                        found += client.recv(65536)
                    assert found == data
                    client.shutdown(socket.SHUT_WR)
                    assert client.recv(1) == b""
            finally:
                proxy.kill()


def connected(port: int) -> socket.socket:
    """A connection to the proxy, once it listens."""
    deadline = time.monotonic() + HANG_S
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port), HANG_S)
        assert time.monotonic() < deadline
        time.sleep(0.02)
