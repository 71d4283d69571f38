"""Experts that come from the memory of other servers, whatever happens to the connections."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from prism_plan.model_spec import ModelShape  # noqa: E402
from prism_plan.placement import Placement, SolveReport  # noqa: E402
from runtime_adapter.transport.listener import Listener  # noqa: E402
from runtime_adapter.transport.peer import Peer  # noqa: E402
from runtime_adapter.transport.rendezvous import Rendezvous  # noqa: E402
from runtime_adapter.transport.secrets import RunSecret  # noqa: E402
from runtime_adapter.weights import peer_loader  # noqa: E402
from runtime_adapter.weights.checkpoint_loader import CheckpointLoader  # noqa: E402
from runtime_adapter.weights.expert_map import ExpertMap  # noqa: E402
from runtime_adapter.weights.expert_store import ExpertStore  # noqa: E402
from runtime_adapter.weights.peer_loader import (  # noqa: E402
    PeerLoader,
    answer_weight_requests,
)
from tests.limits import HANG_S  # noqa: E402
from tests.runtime_adapter.checkpoints import CPU, committed, filled  # noqa: E402

SECRET = RunSecret(b"a secret of this test", given=True)
DTYPE = torch.float32


class Unread(CheckpointLoader):
    """A loader of the checkpoint that is not to be asked."""

    def load(self, pair: int, gpu: int) -> Any:
        """Fail."""
        raise AssertionError(pair)


@contextlib.contextmanager
def holder(store: ExpertStore, port: int = 0) -> Iterator[tuple[str, int]]:
    """A server that gives what its store holds."""
    listener = Listener(
        "127.0.0.1", port, SECRET,
        {"weights": lambda connection, _: answer_weight_requests(store, connection)},
        max_connections=8, report=print,
    )  # fmt: skip
    listener.start()
    try:
        yield listener.address
    finally:
        listener.close()


class Asking:
    """The first of three servers, with an empty store; the others hold every expert."""

    def __init__(self, *addresses: Any, from_checkpoint: bool = False) -> None:
        checkpoint = committed("mixtral")
        spec = checkpoint.spec
        self.store = ExpertStore.create(checkpoint.experts, [8], [CPU], DTYPE)
        held = np.ones((3, spec.num_layers, spec.num_experts), bool)
        held[0] = False
        shape = ModelShape(
            spec.name, spec.moe_layers, spec.num_experts, spec.top_k, spec.expert_bytes
        )
        slots = (spec.num_pairs,)
        placement = Placement(shape, ("s0", "s1", "s2"), (slots,) * 3, held, SolveReport("hand"))
        kind = CheckpointLoader if from_checkpoint else Unread
        loader = kind(Path(checkpoint.folder), self.store)
        self.loader = PeerLoader(loader, placement)
        self.peers = {n: Peer("s0", f"s{n}", SECRET, 1.0) for n in (1, 2)}
        for n, address in enumerate(addresses, start=1):
            self.peers[n].set_address(address, 1)
        rendezvous = dataclasses.replace(Rendezvous(3, 0), timeout_s=HANG_S)
        self.expert_map = ExpertMap(placement)
        self.loader.connect(rendezvous, self.expert_map, self.peers)

    def loads(self, store: ExpertStore, *pairs: int) -> None:
        """Load experts and compare them with those of a store."""
        x = torch.arange(64.0 * 2).reshape(2, 64) / 64
        for pair in pairs:
            self.loader.load(pair, 0)
            layer, expert = divmod(pair, 8)
            assert torch.equal(
                self.store.compute(layer, expert, x), store.compute(layer, expert, x)
            )

    def held(self) -> set[int]:
        """The experts that are there, and called from now on."""
        return {pair for _, pair, _ in self.loader.held()}

    def close(self) -> None:
        """End the connections."""
        self.loader.close()


def test_experts_come_from_their_holders() -> None:
    """Each is the holder's to the bit; the checkpoint is not read."""
    store = filled(committed("mixtral"), DTYPE)
    with holder(store) as one, holder(store) as other, contextlib.closing(Asking(one, other)) as us:
        us.loads(store, 0, 1, 2, 7)
        with holder(store, 0) as moved:  # the first holder has come back elsewhere
            us.peers[1].set_address(moved, 2)
            us.loads(store, 3, 4)
        assert us.held() == {0, 1, 2, 3, 4, 7}


def test_a_holder_that_was_started_again() -> None:
    """A connection that was kept is closed meanwhile; the holder is asked over a new one."""
    store = filled(committed("mixtral"), DTYPE)
    with holder(store) as one:
        us = Asking(one, None)
        us.loads(store, 0)
    with contextlib.closing(us), holder(store, one[1]):
        us.loads(store, 2)
        assert us.held() == {0, 2}


@pytest.mark.parametrize("lacks", ["nobody there", "dropped"])
def test_the_next_holder_is_asked(lacks: str) -> None:
    """One that is gone, or has dropped the expert since, is passed over."""
    store = filled(committed("mixtral"), DTYPE)
    bare = ExpertStore.create(committed("mixtral").experts, [1], [CPU], DTYPE)
    with contextlib.ExitStack() as stack:
        good = stack.enter_context(holder(store))
        bad = stack.enter_context(holder(bare)) if lacks == "dropped" else ("127.0.0.1", 1)
        us = stack.enter_context(contextlib.closing(Asking(bad, good)))
        us.loads(store, 0, 1, 2)
        assert us.held() == {0, 1, 2}


def test_a_holder_that_is_busy_is_asked_again() -> None:
    """It answers a moment later, and the checkpoint is not read."""
    store = filled(committed("mixtral"), DTYPE)
    with holder(store) as one, contextlib.closing(Asking(one, None)) as us:
        dial, times = us.peers[1].dial, iter(range(3))

        def busy(*arguments: Any, **options: Any) -> Any:
            if next(times) < 2:
                raise TimeoutError
            return dial(*arguments, **options)

        us.peers[1].dial = busy  # type: ignore[method-assign]
        us.loads(store, 0)
        assert us.held() == {0}


def test_the_checkpoint_comes_last(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When no server gives an expert it is read, which is said."""
    monkeypatch.setattr(peer_loader, "ASK_S", 0.2)
    store = filled(committed("mixtral"), DTYPE)
    us = Asking(None, ("127.0.0.1", 1), from_checkpoint=True)
    with contextlib.closing(us):
        us.loads(store, 5)
    assert "no server gives" in caplog.text
