"""The store of a run where no other process is there to keep it: a child of the first server."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from runtime_adapter.control.store.client import StoreAddress, StoreClient, StoreUnavailable
from runtime_adapter.transport.dialing import dial
from runtime_adapter.transport.handshake import Claim, HandshakeFailed
from runtime_adapter.transport.rendezvous import RuntimeFailure

if TYPE_CHECKING:
    from runtime_adapter.server_config import ServerConfig

POLL_INTERVAL_S = 0.05
#: Of the question whether somebody listens already.
CONNECT_TIMEOUT_S = 2.0
#: Starting Python takes seconds on a machine that does other work.
START_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 1.0
#: How long a store that is no longer needed may take to end.
END_TIMEOUT_S = 5.0


class OwnStore:
    """A launch of ``prism-runtime store`` that ends with this process."""

    def __init__(self, config: ServerConfig) -> None:
        self._address = config.store_address
        self._host, self._port = config.rendezvous.host, config.rendezvous.port
        host = f"[{self._host}]" if ":" in self._host else self._host
        options = {
            "listen": f"{host}:{self._port}",
            "with_parent": str(os.getpid()),
            "log_level": config.log_level,
            "log_format": config.log_format,
            "secret_file": config.store.secret_file,
            "placements_dir": config.store.placements_dir,
            "trace": config.store.trace,
        }
        words = [sys.executable, "-m", "runtime_adapter", "store"]
        for name, value in options.items():
            if value is not None:
                words += [_option(name), value]
        if config.store.insecure:
            words.append(_option("insecure"))
        # it says by its own lines what goes wrong; its standard output is not this command's
        self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def wait_until_listening(self) -> None:
        """Wait until the store can be asked.

        Raises
        ------
        RuntimeFailure
            It has ended, or does not listen in time.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            code = self._process.poll()
            if code is not None:
                raise RuntimeFailure(
                    f"``store`` {self._host}:{self._port}: the store has ended (exit code {code}); "
                    "see its message"
                )
            if time.monotonic() > deadline:
                raise RuntimeFailure(
                    f"``store`` {self._host}:{self._port}: the store does not listen within "
                    f"{START_TIMEOUT_S:g} s"
                )
            time.sleep(POLL_INTERVAL_S)

    def _answers(self) -> bool:
        client = StoreClient(self._address, "status")
        try:
            client.run(ANSWER_TIMEOUT_S)
        except StoreUnavailable:
            return False
        else:
            return True
        finally:
            client.close()

    @property
    def ended(self) -> bool:
        """Whether the store has ended."""
        return self._process.poll() is not None

    def close(self, wait_s: float = 0.0) -> None:
        """End the store; it gets ``wait_s`` to end by itself, because all have left."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(wait_s)
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def _option(parameter: str) -> str:
    """The command line's name of a parameter."""
    return "--" + parameter.replace("_", "-")


def somebody_listens(address: StoreAddress) -> bool:
    """Whether a process listens there, or may do so behind a link that is slow."""
    claim = Claim("control", server="status")
    try:
        dial((address.host, address.port), claim, address.secret, CONNECT_TIMEOUT_S)[0].close()
    except ConnectionRefusedError:
        return False
    except TimeoutError:
        return True
    except HandshakeFailed:
        return True  # whoever asks it will say so
    except OSError as error:
        return isinstance(error, ConnectionError)
    return True
