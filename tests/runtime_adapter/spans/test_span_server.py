"""Requests over paths of several servers: right tokens on every table, whatever breaks."""

from __future__ import annotations

import contextlib
import functools
import itertools
import socket
import threading
import time
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from prism_plan.errors import InputError  # noqa: E402
from prism_plan.execution_table import spans  # noqa: E402
from runtime_adapter.driver import greedy_config  # noqa: E402
from runtime_adapter.request_repeats import StepFailed  # noqa: E402
from runtime_adapter.spans.messages import (  # noqa: E402
    LAST,
    START,
    Attempt,
    RequestSetup,
    SpanMessage,
    ids_payload,
)
from runtime_adapter.transport.rendezvous import ServerLost  # noqa: E402
from runtime_adapter.weights.checkpoint_families import FAMILIES  # noqa: E402
from tests.limits import HANG_S  # noqa: E402
from tests.profiling.recording.families import VOCABULARY, family_model, tiny_model  # noqa: E402
from tests.runtime_adapter.checkpoints import TINY, reference  # noqa: E402
from tests.runtime_adapter.spans.span_cluster import SpanCluster, run_at_once  # noqa: E402

torch.set_num_threads(1)
#: Families beside those of the committed checkpoints.
OTHERS = (*(f for f in FAMILIES if f not in ("mixtral", "deepseek_v2")), "granitemoe")
NEW_TOKENS = 6


@functools.cache
def model_of(name: str) -> Any:
    """A committed checkpoint, or a tiny random model of a family."""
    if name in TINY:
        return reference(name, torch.float32)
    return tiny_model(name) if name in FAMILIES else family_model(name)


def moe_layers(model: Any) -> list[int]:
    """Which decoder layers have experts."""
    layers = model.get_decoder().layers
    return [i for i, layer in enumerate(layers) if any(
        name.endswith("experts") for name, _ in layer.named_modules()
    )]  # fmt: skip


def generated(model: Any, ids: list[int], new_tokens: int) -> list[int]:
    """What the whole model adds to a prompt."""
    given = torch.tensor([ids])
    config = greedy_config(model)
    config.max_new_tokens = new_tokens
    found = model.generate(given, attention_mask=torch.ones_like(given), generation_config=config)
    tokens: list[int] = found[0, len(ids) :].tolist()
    return tokens


def until(condition: Any) -> None:
    """Wait for something to happen."""
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("name", "tables"), [*((name, 25) for name in TINY), *((name, 8) for name in OTHERS)]
)
def test_random_tables(name: str, tables: int) -> None:
    """On random tables of 2 to 4 servers every home's tokens are the whole model's.

    Tables are switched while requests of the one before run; two requests of each home run at
    once; prompts go in one piece or in chunks. In the end no cache is left.
    """
    model = model_of(name)
    layers = moe_layers(model)
    generator = np.random.default_rng(5)
    for num_servers, chunk in ((2, 0), (3, 5), (4, 3)):
        with SpanCluster(model, layers, num_servers, chunk_tokens=chunk) as cluster:
            jobs, expected = [], []
            for lane in range(2):
                for home in range(num_servers):
                    work = []
                    for _ in range(tables // 5 + 1):
                        row = generator.integers(0, num_servers, len(layers))
                        length = int(generator.integers(1, 14))
                        ids = generator.integers(3, VOCABULARY, length).tolist()
                        work.append((ids, row))
                        expected.append(generated(model, ids, NEW_TOKENS))
                    jobs.append(
                        lambda home=home, lane=lane, work=work: [
                            cluster.run(home, ids, NEW_TOKENS, lane, row) for ids, row in work
                        ]
                    )
            found = run_at_once(jobs)
            assert [tokens for one in found for tokens in one] == expected
            until(lambda cluster=cluster: not cluster.cached())
            assert not cluster.said


def test_connections_that_break() -> None:
    """Connections are cut again and again: no token is wrong, missing or twice, and none fails."""
    model = model_of("mixtral")
    layers = moe_layers(model)
    generator = np.random.default_rng(2)
    ids = generator.integers(3, 90, 9).tolist()
    expected = generated(model, ids, 24)
    with SpanCluster(model, layers, 3, chunk_tokens=4) as cluster:
        cluster.table = generator.integers(0, 3, cluster.table.shape)
        cluster.table[:, 0], cluster.table[:, 1] = [1, 2, 0], [2, 0, 1]
        ended, cuts = threading.Event(), 0

        def cut() -> None:
            nonlocal cuts
            while not ended.wait(0.02):
                for server in cluster.servers:
                    for connection in list(server._incoming)[:1]:
                        with contextlib.suppress(OSError):
                            connection.shutdown(socket.SHUT_RDWR)
                            cuts += 1

        cutting = threading.Thread(target=cut)
        cutting.start()
        found = run_at_once(
            [
                lambda home=home, lane=lane: [cluster.run(home, ids, 24, lane) for _ in range(4)]
                for home in range(3)
                for lane in range(2)
            ]
        )
        ended.set()
        cutting.join()
        assert found == [[expected] * 4] * 6
        assert cuts > 10


def test_a_server_of_the_path_is_lost() -> None:
    """Its requests fail for a reason that may pass, and run on another path; caches are freed.

    When the server is back, empty, requests execute there again; what another attempt has left is
    not taken for theirs.
    """
    model = model_of("deepseek-v2")
    layers = moe_layers(model)
    ids = list(range(5, 14))
    expected = generated(model, ids, 12)
    with SpanCluster(model, layers, 3) as cluster:
        through = [1, *[2] * (len(layers) - 1)]
        assert cluster.run(0, ids, 12, row=through) == expected
        cluster.set_address(2, None)
        for peers in cluster.peers:
            peers.down.add(2)
        with pytest.raises((StepFailed, ServerLost)):
            cluster.run(0, ids, 12, row=through)
        assert cluster.run(0, ids, 12, row=[1] * len(layers)) == expected
        cluster.listeners[2].close()
        cluster.forget(2)
        cluster.listeners[2] = cluster.listen(2)
        cluster.set_address(2, cluster.listeners[2].address, 2)
        assert cluster.run(0, ids, 12, row=through) == expected
        until(lambda: not cluster.cached())


def test_a_home_whose_clock_was_set_back() -> None:
    """It is told that its attempts are old, and its next one is not."""
    model = model_of("mixtral")
    ids, row = [5, 6, 7], [1] * len(moe_layers(model))
    expected = generated(model, ids, 4)
    with SpanCluster(model, moe_layers(model), 2) as cluster:
        assert cluster.run(0, ids, 4, row=row) == expected
        cluster.homes[0]._numbers = itertools.count(1)
        with pytest.raises(StepFailed, match="later attempt") as failed:
            cluster.run(0, ids, 4, row=row)
        assert failed.value.may_pass
        assert cluster.run(0, ids, 4, row=row) == expected


def test_caches_of_a_home_that_is_down_are_freed() -> None:
    """A server frees what it has for requests of a home that the log says is down."""
    model = model_of("mixtral")
    layers = moe_layers(model)
    with SpanCluster(model, layers, 2) as cluster:
        held = threading.Event()
        real = cluster.homes[0].deliver
        cluster.servers[0]._deliver = lambda message: (held.wait(HANG_S), real(message))
        found: list[Any] = []
        thread = threading.Thread(
            target=lambda: found.extend(
                run_at_once([lambda: cluster.run(0, [5, 6, 7], 10_000, row=[1] * len(layers))])
            ),
            daemon=True,
        )
        thread.start()
        until(cluster.servers[1].cached_tokens)
        cluster.peers[1].down.add(0)
        until(lambda: not cluster.servers[1].cached_tokens())
        cluster.set_address(1, None)
        held.set()
        thread.join(HANG_S)
        assert isinstance(found[0], (StepFailed, ServerLost))


def test_a_home_that_does_not_answer_for_a_while() -> None:
    """A home that a server of the path could not reach is told so later, and does not wait on."""
    model = model_of("mixtral")
    ids, row = [5, 6, 7], [1] * len(moe_layers(model))
    with SpanCluster(model, moe_layers(model), 2) as cluster:
        address = cluster.listeners[0].address
        tokens: list[int] = []

        def cut_off(token: int) -> None:
            tokens.append(token)
            if len(tokens) == 3:
                cluster.peers[1].peers[0].set_address(None, 1)

        setup = RequestSetup(0, tuple(spans(np.array(row))), 10_000, 10_003)
        found: list[Any] = []
        thread = threading.Thread(
            target=lambda: found.extend(
                run_at_once([lambda: cluster.homes[0].run(0, setup, ids, cut_off)])
            ),
            daemon=True,
        )
        thread.start()
        until(lambda: any(lane.unsaid is not None for lane in cluster.servers[1]._lanes.values()))
        assert thread.is_alive()
        cluster.peers[1].peers[0].set_address(address, 2)
        thread.join(HANG_S)
        assert isinstance(found[0], StepFailed)
        assert found[0].may_pass
        assert tokens == generated(model, ids, len(tokens))


def test_a_server_that_another_one_does_not_reach() -> None:
    """Home, which reaches it, asks for a path without it as long as the timeout."""
    model = model_of("mixtral")
    layers = len(moe_layers(model))
    with SpanCluster(model, moe_layers(model), 3) as cluster:
        cluster.peers[1].peers[2].set_address(None, 1)
        cluster.peers[1].peers[2].suspect = True
        cluster.table[0] = [1] * (layers - 1) + [2]
        home = cluster.homes[0]
        home._table = cluster.table
        assert {span.server for span in home.path()} == {1, 2}
        with pytest.raises(StepFailed, match="'s2' does not answer") as failed:
            cluster.run(0, [5, 6, 7], 4)
        assert failed.value.may_pass
        assert 2 not in {span.server for span in home.path()}


def test_a_server_that_missed_the_end_of_a_request() -> None:
    """It is told to free the caches when it answers again, although home has no request for it."""
    model = model_of("mixtral")
    ids, row = [5, 6, 7], [1] * len(moe_layers(model))
    with SpanCluster(model, moe_layers(model), 2) as cluster:
        address = cluster.listeners[1].address
        tokens: list[int] = []

        def cut_off(token: int) -> None:
            tokens.append(token)
            if len(tokens) == 3:
                cluster.peers[0].peers[1].set_address(None, 1)
                raise StepFailed("given up", may_pass=True)

        setup = RequestSetup(0, tuple(spans(np.array(row))), 10_000, 10_003)
        with pytest.raises(StepFailed, match="given up"):
            cluster.homes[0].run(0, setup, ids, cut_off)
        assert cluster.servers[1].cached_tokens()
        cluster.peers[0].peers[1].set_address(address, 2)
        until(lambda: not cluster.servers[1].cached_tokens())


def test_an_end_while_one_server_does_all_steps() -> None:
    """A request whose path is one other server ends there when its home says so."""
    model = model_of("mixtral")
    ids, row = [5, 6, 7], [1] * len(moe_layers(model))
    with SpanCluster(model, moe_layers(model), 2) as cluster:
        server = cluster.servers[1]
        token, made = server._work.token, itertools.count(1)

        def wait_for_the_end(outputs: Any) -> int:
            if next(made) > 3:
                until(lambda: all(lane.freed >= lane.number for lane in server._lanes.values()))
            return token(outputs)

        server._work.token = wait_for_the_end  # type: ignore[method-assign]

        def give_up(token: int) -> None:
            raise StepFailed("given up", may_pass=True)

        setup = RequestSetup(0, tuple(spans(np.array(row))), 10_000, 10_003)
        with pytest.raises(StepFailed, match="given up"):
            cluster.homes[0].run(0, setup, ids, give_up)
        until(lambda: not server.cached_tokens())
        assert next(made) < 100


def test_an_end_that_overtakes_the_beginning() -> None:
    """Caches of an attempt that is over before its first step arrives are not made."""
    model = model_of("mixtral")
    layers = len(moe_layers(model))
    with SpanCluster(model, moe_layers(model), 2) as cluster:
        attempt = Attempt(0, 0, 7)
        setup = RequestSetup(0, tuple(spans(np.array([1] * layers))), 4, 7)
        cluster.servers[1].free(attempt)
        start = SpanMessage(
            START, attempt, 0, 0, 3, LAST, 0, ids_payload([5, 6, 7]), setup.to_json()
        )
        cluster.servers[1].handle(start)
        assert not cluster.servers[1].cached_tokens()


def test_a_server_without_an_address() -> None:
    """Requests go around one that has not joined yet, though nobody suspects it."""
    model = model_of("mixtral")
    layers = len(moe_layers(model))
    with SpanCluster(model, moe_layers(model), 3) as cluster:
        home = cluster.homes[0]
        home._table = np.array([[1] * (layers - 1) + [2]] * 3)
        assert {span.server for span in home.path()} == {1, 2}
        cluster.peers[0].peers[2].set_address(None, 1)
        assert not cluster.peers[0].peers[2].suspect
        assert 2 not in {span.server for span in home.path()}


def test_values_that_no_server_sends() -> None:
    """A token below zero, and a step beyond the tokens that a request may have, end the request."""
    model = model_of("mixtral")
    row = [1] * len(moe_layers(model))
    with SpanCluster(model, moe_layers(model), 2) as cluster:
        setup = RequestSetup(0, tuple(spans(np.array(row))), 4, 5)
        with pytest.raises(StepFailed, match="beyond the request's own tokens"):
            cluster.homes[0].run(0, setup, [5] * 9, lambda token: None)
        cluster.servers[1]._work.token = lambda outputs: -1  # type: ignore[method-assign]
        with pytest.raises(StepFailed, match="a token that is none"):
            cluster.run(0, [5, 6, 7], 4, row=row)


def test_kv_tokens_bound_what_is_in_flight() -> None:
    """A request that can never fit is refused with the number; others wait for each other."""
    model = model_of("mixtral")
    layers = moe_layers(model)
    with SpanCluster(model, layers, 2, kv_tokens=20) as cluster:
        home = cluster.homes[0]
        with pytest.raises(InputError, match=r"21 tokens.* at most 20"), home.room(0, 21):
            pass
        inside: list[int] = []

        def take(lane: int) -> int:
            with home.room(lane, 15):
                inside.append(lane)
                assert len(inside) == 1
                time.sleep(0.05)
                inside.remove(lane)
            return lane

        assert run_at_once([lambda: take(0), lambda: take(1)]) == [0, 1]
        # a home that asks for more all the same is refused by the server
        with pytest.raises(StepFailed, match="may have 20 in flight"):
            cluster.run(0, [5] * 10, 11, row=[1] * len(layers))
        assert cluster.run(0, [5] * 10, 10, row=[1] * len(layers)) == generated(model, [5] * 10, 10)
