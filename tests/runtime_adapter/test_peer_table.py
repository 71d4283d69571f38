"""What a server says of the others, and where it calls them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("torch")

from runtime_adapter.peer_table import PeerTable
from runtime_adapter.server_config import ServerConfig
from runtime_adapter.transport.rendezvous import Rendezvous
from runtime_adapter.weights.expert_map import ExpertMap


def test_comings_and_goings() -> None:
    """Each is told once, and the server is called where it joined last."""
    said: list[str] = []
    config: Any = SimpleNamespace(
        rendezvous=Rendezvous(3, 1),
        name="b",
        placement=SimpleNamespace(servers=("a", "b", "c")),
    )
    nobody: Any = SimpleNamespace(lost=lambda n: False)
    table = PeerTable(cast(ServerConfig, config), cast(ExpertMap, nobody), said.append)
    assert sorted(table.peers) == [0, 2]
    for server in range(3):
        table.joined(server, 1, ("127.0.0.1", 1000 + server))
    assert (table.incarnation, said, table.silent) == (1, [], [])
    for _ in range(2):  # as after a restart of the store
        table.down(0, 1, "gone")
    assert not table.peers[0].usable
    table.joined(0, 2, ("127.0.0.1", 2000))
    assert table.peers[0].usable
    table.joined(1, 4, ("127.0.0.1", 2001))
    assert table.incarnation == 4
    table.left(2)
    assert not table.peers[2].usable
    assert said == ["server 'a' is down: gone", "server 'a' has joined again"]
