"""Room for the caches of a home's requests: bounded, and first come, first served."""

from __future__ import annotations

import threading

from runtime_adapter.spans.kv_room import KvRoom
from tests.limits import HANG_S
from tests.runtime_adapter.control.store.stores import wait_until


def test_first_come_first_served() -> None:
    """A long request that waits is not passed by a short one for which there is room."""
    room = KvRoom(10)
    assert room.take("running", 6)
    served: list[str] = []

    def serve(name: str, tokens: int) -> None:
        assert room.take(name, tokens)
        served.append(name)
        room.give_back(name)

    threads = [threading.Thread(target=serve, args=("long", 10), daemon=True)]
    threads[0].start()
    wait_until(lambda: len(room._waiting) == 1)
    threads.append(threading.Thread(target=serve, args=("short", 2), daemon=True))
    threads[1].start()
    wait_until(lambda: len(room._waiting) == 2)
    assert served == []
    room.give_back("running")
    for thread in threads:
        thread.join(HANG_S)
    assert served == ["long", "short"]


def test_who_gives_up_holds_nobody_up() -> None:
    """A request whose time is over leaves its turn, and nothing is taken for it."""
    room = KvRoom(10)
    assert room.take("running", 6)
    assert not room.take("late", 8, timeout_s=0.0)
    assert room.take("short", 4, timeout_s=0.0)
    assert not room.take("too long for the home", 11)
    room.give_back("running")
    room.give_back("short")
    assert room.take("late", 10, timeout_s=0.0)


def test_an_owner_has_room_once() -> None:
    """Who takes room again gets it instead of what it had; without a limit all is given."""
    room = KvRoom(10)
    assert room.take("a", 8)
    assert room.take("a", 9, timeout_s=0.0)
    assert not room.take("b", 2, timeout_s=0.0)
    assert room.take("b", 1, timeout_s=0.0)
    assert KvRoom(0).take("a", 1 << 40)
