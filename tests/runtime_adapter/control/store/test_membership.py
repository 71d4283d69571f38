"""Who is up and who is down, by a clock that the tests move."""

from __future__ import annotations

import pytest

from prism_plan.errors import InputError
from runtime_adapter.control.log_entries import StopRequested
from runtime_adapter.control.store.messages import NoRun, StoreRestartedError
from runtime_adapter.transport.rendezvous import NameTaken
from tests.runtime_adapter.control.store.stores import TIMEOUT_S, ManualStore


def test_members_join_and_are_up() -> None:
    """Members are absent, joining once their driver is heard, and up once their worker joined."""
    store = ManualStore()
    assert store.call("members") == []
    store.start()
    assert store.states() == ["absent"] * 3
    store.hear(1, "driver", 0)
    assert store.join(0) == 1
    assert store.states() == ["up", "joining", "absent"]
    member = store.call("members")[0]
    assert (member["address"], member["experts"]) == (["10.0.0.1", 1000], 1)
    assert store.hear(0, "worker", 1)["state"] == "up"
    assert store.hear(1, "worker", 0)["state"] == "down"


def test_the_run_begins_when_all_have_joined() -> None:
    """Nobody begins before the last one is there; then all begin at the same time."""
    store = ManualStore()
    store.start()
    store.join(0)
    store.join(1)
    assert store.call("begin", server=0) is None
    assert not store.start()["begun"]
    store.join(2)
    first = store.call("begin", server=0)
    assert first > 0
    store.pass_s(2.0)
    assert store.call("begin", server=2) == pytest.approx(first - 2.0)
    assert store.start()["begun"]


def test_a_loss_is_agreed_only_if_another_member_suspects_it() -> None:
    """Silence to the store alone is no loss, and neither is a suspicion of who is heard."""
    store = ManualStore()
    store.start_with_all()
    store.pass_s(10 * TIMEOUT_S, heard=[0, 1])
    assert store.states() == ["up"] * 3
    store.pass_s(1.0, heard=[0, 1, 2], suspects={0: [2], 1: [2]})
    assert store.states() == ["up"] * 3
    store.pass_s(TIMEOUT_S + 1, heard=[0, 1], suspects={0: [2]})
    assert store.states() == ["up", "up", "down"]
    entry = store.entries(after=2)[0]
    assert (entry["kind"], entry["server"], entry["incarnation"]) == ("server_down", 2, 1)
    assert "'a'" in entry["reason"]


def test_a_member_does_not_suspect_itself() -> None:
    """A server alone in its run, or one that names itself, is not down."""
    store = ManualStore(["a"])
    store.start_with_all()
    store.hear(0, "driver", suspects=[0])
    store.pass_s(3 * TIMEOUT_S)
    assert store.states() == ["up"]


def test_an_isolated_store_declares_nobody_down() -> None:
    """Whose last word was a suspicion is not believed once it is silent itself."""
    store = ManualStore()
    store.start_with_all()
    store.pass_s(1.0, heard=[0, 1, 2], suspects={0: [1, 2], 1: [0, 2], 2: [0, 1]})
    store.pass_s(20 * TIMEOUT_S)
    assert store.states() == ["up"] * 3


def test_a_pause_of_the_store_is_no_silence() -> None:
    """A store that was stopped for long hears its members before it counts their silence."""
    store = ManualStore()
    store.start_with_all()
    store.pass_s(1.0, heard=[0, 1, 2], suspects={0: [2]})
    store.now_s += 100 * TIMEOUT_S
    store.store.tick()
    assert store.states() == ["up"] * 3
    store.pass_s(TIMEOUT_S, heard=[0, 1, 2], suspects={0: [2]})
    assert store.states() == ["up"] * 3


def test_who_was_down_returns_with_the_next_incarnation() -> None:
    """A server joins again after a loss; heartbeats of the lost incarnation say that it has to."""
    store = ManualStore()
    store.start_with_all()
    store.pass_s(TIMEOUT_S + 1, heard=[0, 1], suspects={0: [2]})
    assert store.hear(2, "worker", 1)["state"] == "down"
    assert store.join(2, after=1) == 2
    assert store.states() == ["up"] * 3
    assert store.hear(2, "worker", 2)["state"] == "up"
    store.pass_s(1.0, heard=[0, 1], suspects={0: [2]})
    assert store.states() == ["up"] * 3


def test_incarnations_grow_after_a_restart_of_the_store() -> None:
    """A new store knows nothing; who was up before says so, and the run has begun already."""
    before, after = ManualStore(), ManualStore(epoch="f")
    before.start_with_all()
    assert before.join(1, after=1) == 2
    with pytest.raises(NoRun):
        after.join(1, after=2)
    after.start()
    assert after.join(1, after=2) == 3
    assert after.call("begin", server=0) == 0
    assert after.states() == ["absent", "up", "absent"]
    with pytest.raises(StoreRestartedError):
        after.call("append", entry="{}", epoch=before.store.epoch)


def test_who_does_not_come_back_after_a_restart_of_the_store_is_down() -> None:
    """Also where nobody has joined, if the run has begun and a member gets no answer."""
    store = ManualStore()
    store.start()
    store.join(0, after=4)
    store.join(1, after=2)
    store.pass_s(3 * TIMEOUT_S, heard=[0], incarnation=5)
    assert store.states() == ["up", "up", "absent"]
    store.pass_s(1.0, heard=[0], suspects={0: [2]}, incarnation=5)
    assert store.states() == ["up", "up", "down"]
    assert store.join(2) == 1


def test_before_the_run_begins_nobody_who_is_absent_is_down() -> None:
    """At the first start, servers are waited for."""
    store = ManualStore()
    store.start()
    store.join(0)
    store.pass_s(10 * TIMEOUT_S, heard=[0], suspects={0: [1, 2]})
    assert store.states() == ["up", "absent", "absent"]


def test_a_name_that_is_taken_is_refused() -> None:
    """Another process cannot be a server that lives; one that was killed is replaced soon."""
    store = ManualStore()
    store.start_with_all()
    with pytest.raises(NameTaken, match="'b' is there already"):
        store.join(1, port=7)
    assert store.hear(1, "worker", 1)["state"] == "up"
    store.pass_s(2.5, heard=[0, 2])
    assert store.join(1, port=7) == 2
    kinds = [entry["kind"] for entry in store.entries(after=2)]
    assert kinds == ["server_down", "server_joined"]
    assert store.hear(1, "worker", 1)["state"] == "replaced"


def test_a_process_that_joins_again_lives_meanwhile() -> None:
    """Its heartbeats with the incarnation before count, until it has read its own entry."""
    store = ManualStore()
    store.start_with_all()
    assert store.join(1, after=1) == 2
    assert store.hear(1, "worker", 1)["state"] == "up"


def test_a_join_that_is_repeated_is_the_same() -> None:
    """The answer was lost, not the request."""
    store = ManualStore()
    store.start()
    assert store.join(0, token="t") == store.join(0, token="t") == 1
    assert len(store.entries()) == 1


def test_the_run_is_over_when_all_have_left() -> None:
    """Leaving is final, repeated or not; the next run has another epoch."""
    store = ManualStore()
    store.start_with_all()
    epoch = store.store.epoch
    for server in (0, 1, 1):
        store.call("leave", server=server, incarnation=1)
    assert store.states() == ["left", "left", "up"]
    assert not store.store.is_over
    store.call("leave", server=2, incarnation=0)  # of an earlier time
    assert store.states()[2] == "up"
    store.call("leave", server=2, incarnation=1)
    assert store.store.is_over
    assert store.hear(2, "worker", 1)["state"] == "left"
    assert store.start()["epoch"] != epoch
    assert store.states() == ["absent"] * 3


def test_the_run_is_over_when_who_has_not_left_is_gone() -> None:
    """A server that was killed is waited for, but not for ever once the others have left."""
    store = ManualStore()
    store.start_with_all()
    store.call("leave", server=0, incarnation=1)
    store.call("leave", server=1, incarnation=1)
    store.pass_s(2 * TIMEOUT_S)
    assert not store.store.is_over
    store.pass_s(2 * TIMEOUT_S)
    assert store.store.is_over


def test_a_run_whose_servers_were_all_killed_is_replaced() -> None:
    """Servers that are started anew get a new run, with what they say; while one lives, not."""
    store = ManualStore()
    store.start_with_all()
    store.append(StopRequested(0, "why"))
    store.pass_s(3 * TIMEOUT_S, heard=[1])
    assert store.start(facts={"model": "other"})["run"]["facts"] == {"model": "tiny"}
    store.pass_s(3 * TIMEOUT_S)
    assert store.start(facts={"model": "other"})["run"]["facts"] == {"model": "other"}
    assert store.entries() == []


def test_a_server_cannot_hold_experts_on_gpus_of_others() -> None:
    """Nor can a slot be given to a GPU that the run does not have."""
    store = ManualStore()
    store.start()
    for held in (
        [[1, 0, 0]],
        [[3, 0, 0]],
        [[0, 12, 0]],
        [[0, 0]],
        [[0, 0, -1]],
        "x",
        [[True, 0, 0]],
    ):
        with pytest.raises(InputError):
            store.join(0, held=held)
    assert store.states() == ["absent"] * 3
