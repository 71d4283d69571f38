"""The worker process of a server: answers all other servers, and is the server's member of the run.

It listens on one port, where drivers call experts and other workers ask for weights; it joins the
run with what its GPUs hold, and does this server's part of migrations. Its driver starts another
one if it dies.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from dataclasses import dataclass
from typing import Any

import torch

from prism_plan.errors import PrismError
from runtime_adapter import log_output
from runtime_adapter.control.event_log import EventLog
from runtime_adapter.control.migration_executor import MigrationExecutor
from runtime_adapter.peer_table import PeerTable
from runtime_adapter.server_config import ServerConfig
from runtime_adapter.shared_status import SharedStatus
from runtime_adapter.transport.call_threads import exit_with_parent
from runtime_adapter.transport.interfaces import address_of
from runtime_adapter.transport.listener import Listener
from runtime_adapter.transport.wire_kernels import compile_unpacking
from runtime_adapter.weights.expert_map import ExpertMap
from runtime_adapter.worker_lanes import WorkerLanes

#: Connections that a worker accepts of each server beside those of its lanes: pings, weights.
CONNECTIONS_OF_SERVER = 32


@dataclass(frozen=True, eq=False)
class WorkerConfig:
    """What a worker needs to know; pickled to it when it is started.

    Together with the server's configuration go its experts, as its driver knows them then, and the
    server's last ``incarnation``, 0 if it has not joined yet.
    """

    server: ServerConfig
    status: SharedStatus
    max_lanes: int
    incarnation: int


def run_worker(config: WorkerConfig, ready: Any, to_driver: socket.socket) -> None:
    """Serve until the process is ended; sends "", or what went wrong, to the pipe ``ready``.

    Connections that are for the driver go to it by ``to_driver``.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver ends it
    exit_with_parent()
    server = config.server
    log_output.configure(server.log_level, server.log_format, server.name)
    torch.set_num_threads(server.threads)
    try:
        _start(config, to_driver)
    except PrismError as error:
        ready.send(error.message)
        os._exit(1)  # not by returning, which waits for threads
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        ready.send(f"its worker failed: {text:.300}; please report it")
        os._exit(1)
    ready.send("")
    threading.Event().wait()


def _start(config: WorkerConfig, to_driver: socket.socket) -> None:
    """Listen, and then join the run; threads do the rest."""
    server, rendezvous = config.server, config.server.rendezvous
    loader = server.migration.loader
    compile_unpacking()
    expert_map = ExpertMap(server.placement)
    first_gpu = int(server.placement.gpus_of(rendezvous.rank)[0])
    expert_map.set_up(rendezvous.rank, [(first_gpu + gpu, pair) for gpu, pair, _ in loader.held()])
    server.compute.use(expert_map)
    peers = PeerTable(server, expert_map)
    loader.connect(rendezvous, expert_map, peers.peers)
    lanes = WorkerLanes(
        server, expert_map, to_driver, finished=lambda: bool(config.status.finished[0])
    )
    listener = Listener(
        address_of(rendezvous.interface),
        rendezvous.listen_port,
        rendezvous.secret,
        lanes.handlers(),
        max_connections=max_connections(rendezvous.world_size, config.max_lanes),
        report=log_output.log_warning,
    )
    listener.start()
    MigrationExecutor(
        rendezvous.rank,
        server.placement,
        EventLog(server.store_address, f"worker {rendezvous.rank}"),
        loader,
        expert_map,
        lambda: listener.address,
        rendezvous.timeout_s,
        peers,
        log_output.log_info,
        lambda: log_output.log_error(
            "another process has joined as this server: nobody calls this one any more"
        ),
        config.incarnation,
        config.status.note_join,
    ).start()


def max_connections(world_size: int, max_lanes: int) -> int:
    """How many connections a worker may have: of each server's lanes, its own and other homes'."""
    lanes = max_lanes * (1 + world_size)
    return world_size * (2 * lanes + CONNECTIONS_OF_SERVER)
