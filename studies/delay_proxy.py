"""Passes TCP connections on, each direction later by half a round trip.

    python -m studies.delay_proxy LISTEN_HOST:PORT TARGET_HOST:PORT RTT_MS

For programs that cannot delay their messages themselves, on kernels that cannot delay packets.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import sys
import threading
import time

CHUNK = 1 << 16


def pass_on(source: socket.socket, target: socket.socket, delay_s: float) -> None:
    """Pass on what arrives until the source ends, in order, each part after the delay."""
    parts: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

    def send() -> None:
        with contextlib.suppress(OSError):
            while True:
                due_s, data = parts.get()
                if not data:
                    target.shutdown(socket.SHUT_WR)
                    return
                while (left_s := due_s - time.monotonic()) > 0:
                    if left_s > 2e-4:
                        time.sleep(left_s - 1e-4)
                target.sendall(data)

    threading.Thread(target=send, daemon=True).start()
    with contextlib.suppress(OSError):
        while data := source.recv(CHUNK):
            parts.put((time.monotonic() + delay_s, data))
    parts.put((0.0, b""))


def main() -> None:
    """Pass on connections until the process is ended."""
    (host, _, port), (to_host, _, to_port) = (text.rpartition(":") for text in sys.argv[1:3])
    delay_s = float(sys.argv[3]) / 2000
    with socket.create_server((host, int(port))) as listener:
        while True:
            near = listener.accept()[0]
            far = socket.create_connection((to_host, int(to_port)))
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, target in ((near, far), (far, near)):
                threading.Thread(
                    target=pass_on, args=(source, target, delay_s), daemon=True
                ).start()


if __name__ == "__main__":
    main()
