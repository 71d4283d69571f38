"""Which servers are lost when: texts, values out of range, order of events, what is not served."""

from __future__ import annotations

import math

import pytest

from prism_plan.errors import InputError
from prism_plan.simulate.losses import Loss, LossPlan, parse_loss
from prism_plan.simulate.requests import Requests
from tests.simulate.builders import Ask, make_cluster, make_requests


def asked(*arrivals: tuple[int, float]) -> Requests:
    """Requests of three servers by home and time of arrival."""
    asks = [Ask(home, at_s, [[[0]]]) for home, at_s in arrivals]
    return make_requests(make_cluster([1, 1, 1]), asks, 1, 1)


@pytest.mark.parametrize(
    ("text", "loss"),
    [
        ("edge-0@12", Loss("edge-0", 12.0)),
        ("edge-0@12.5:1e2", Loss("edge-0", 12.5, 100.0)),
        ("a@b:c@0:3", Loss("a@b:c", 0.0, 3.0)),
    ],
)
def test_texts_of_losses(text: str, loss: Loss) -> None:
    """The last @ ends the name, so that a name may have any characters."""
    assert parse_loss(text) == loss


@pytest.mark.parametrize(
    "text",
    [
        *("", "edge-0", "@5", "edge-0@", "edge-0@5:", "edge-0@:7", "edge-0@5:6:7", "edge-0@x"),
        *("edge-0@-1", "edge-0@nan", "edge-0@inf", "edge-0@1_0", "edge-0@ 5", "edge-0@5 :6"),
    ],
)
def test_texts_that_are_no_losses(text: str) -> None:
    """Strict: no sign, infinity, underscore or space, and nothing is left out."""
    with pytest.raises(InputError, match=r"expected NAME@SECONDS or NAME@SECONDS:RETURN") as error:
        parse_loss(text)
    assert error.value.parameter == "lose"


@pytest.mark.parametrize("times", [(5.0, 5.0), (5.0, 4.0), (-1.0, None), (math.nan, None)])
def test_times_out_of_range(times: tuple[float, float | None]) -> None:
    """A return is after its loss, both in seconds from the start; else the times are told."""
    with pytest.raises(InputError, match=r"^lose: a: "):
        Loss("a", *times)


def test_a_server_is_not_lost_while_it_is_away() -> None:
    """The second loss of a server comes after its return from the first."""
    for first in (Loss("a", 1.0), Loss("a", 1.0, 5.0)):
        with pytest.raises(InputError, match=r"^lose: a at 5 s, while it is away since 1 s"):
            LossPlan((Loss("a", 5.0), first))
    assert len(LossPlan((Loss("a", 5.5), Loss("a", 1.0, 5.0))).losses) == 2


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ((Loss("s4", 1.0),), "'s4', did you mean 's2'?|expected a server of the cluster: s0, s1"),
        ((Loss("s1", 9.5),), "s1 at 9.5 s; expected a time up to the last arrival, at 9 s"),
        (
            (Loss("s0", 1.0), Loss("s1", 2.0, 3.0), Loss("s2", 3.0)),
            "no server is left at 3 s; expected one that is not lost",
        ),
    ],
)
def test_losses_that_do_not_fit_the_run(losses: tuple[Loss, ...], message: str) -> None:
    """Unknown servers, losses that no request sees, and a cluster that is away as a whole."""
    with pytest.raises(InputError, match=message):
        LossPlan(losses).check(asked((0, 1.0), (1, 9.0)))


def test_another_server_may_be_lost_after_a_return() -> None:
    """One server at a time may be away, also where the cluster has two."""
    plan = LossPlan((Loss("s0", 1.0, 2.0), Loss("s1", 3.0), Loss("s2", 2.5)))
    plan.check(asked((0, 9.0)))
    assert [loss.server for loss in plan.losses] == ["s0", "s2", "s1"]


def test_order_of_events() -> None:
    """A notice is the timeout after its loss, or at an earlier return, and then before it."""
    plan = LossPlan((Loss("b", 2.0, 3.0), Loss("a", 1.0), Loss("c", 12.0, 99.0)), timeout_s=10.0)
    events = [(e.at_s, e.kind, e.server) for e in plan.events(("a", "b", "c"))]
    assert events == [
        (1.0, "loss", 0),
        (2.0, "loss", 1),
        (3.0, "notice", 1),
        (3.0, "return", 1),
        (11.0, "notice", 0),
        (12.0, "loss", 2),
        (22.0, "notice", 2),
        (99.0, "return", 2),
    ]
    at_once = LossPlan((Loss("a", 1.0),), timeout_s=0.0).events(("a",))
    assert [e.kind for e in at_once] == ["loss", "notice"]


def test_arrivals_at_an_absent_home_are_not_served() -> None:
    """From after the loss up to the return; those of other homes all stay, in their order."""
    requests = asked((0, 1.0), (1, 2.0), (0, 2.5), (0, 3.0), (0, 3.5), (1, 3.5))
    served = LossPlan((Loss("s0", 1.0, 3.0),)).served(requests)
    assert served.home.tolist() == [0, 1, 0, 1]
    assert served.arrival_s.tolist() == [1.0, 2.0, 3.5, 3.5]
    assert served.prompt.tolist() == [0, 1, 4, 5]
    assert LossPlan((Loss("s0", 2.5),)).served(requests).arrival_s.tolist() == [1, 2, 2.5, 3.5]
    assert LossPlan(()).served(requests) is requests
