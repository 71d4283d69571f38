"""The choice between plans: by formula, by simulation, by fairness, and by the price of loads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from prism_plan.latency.expected_latency import PARTS, PlanLatency
from prism_plan.simulate.requests import Requests
from prism_plan.solvers.latency.problem import TRUSTED_SHARE
from prism_plan.solvers.latency.selection import PlanSelection


def latency(
    of_home: list[float], share: float = 0.1, weights: Any = None, waiting_s: float = 0.0
) -> PlanLatency:
    """Seconds of each home, compute but for what is waiting, and the busiest share of time."""
    parts = np.zeros((len(of_home), len(PARTS)))
    parts[:, PARTS.index("compute")] = np.array(of_home) - waiting_s
    parts[:, PARTS.index("gpus")] = waiting_s
    homes = np.zeros(len(of_home))
    even = np.full(len(of_home), 1 / len(of_home))
    return PlanLatency(
        parts=parts,
        weights=even if weights is None else np.array(weights),
        gpu_share=np.full(1, share),
        up_share=homes,
        down_share=homes,
        place_share=homes,
    )


class Rehearsed(PlanSelection):
    """A selection whose plans are their formula's figures, and whose simulations are written down.

    ``runs`` are the seconds of 100 requests of two homes, in turns, by name; the same each time.
    """

    rates: np.ndarray | None = None
    bursts = False

    def __init__(self, runs: dict[str, np.ndarray] | None, gib: Any = None, **price: float) -> None:
        problem: Any = SimpleNamespace(
            cluster=SimpleNamespace(servers=[SimpleNamespace(has_users=True)] * 2),
            loaded=runs is not None,
            expected=lambda plan: plan,
            loaded_gib=gib,
            bursts=self.bursts,
            trusts=lambda expected: expected.busiest <= TRUSTED_SHARE and not self.bursts,
        )
        super().__init__(problem, **price)
        self.runs = runs or {}
        self.asked: list[tuple[str, int]] = []

    def _run(self, name: str, plan: Any, sample: int) -> np.ndarray:
        self.asked.append((name, sample))
        return self.runs[name]

    def _requests(self, sample: int) -> Any:
        home = np.arange(100, dtype=np.int32) % 2
        nothing = np.zeros(100)
        prompts: Any = None
        return Requests(("a", "b"), prompts, home, nothing, nothing.astype(np.int32), self.rates)


def steady(first: float, second: float) -> np.ndarray:
    """100 requests of two homes, each with the same seconds always."""
    return np.where(np.arange(100) % 2 == 0, first, second)


def plans_of(**seconds: PlanLatency) -> Any:
    return seconds


def test_idle_clusters_go_by_the_formula() -> None:
    """The least mean, unless its slowest home is 3 % behind that of the best other solver's plan.

    Then the next best that is fair; homes without requests do not count.
    """
    plans = plans_of(
        other=latency([1.0, 1.0]),
        unfair=latency([0.5, 1.04]),
        fair=latency([0.7, 1.02]),
        worse=latency([2.0, 2.0]),
    )
    assert Rehearsed(None).best(plans, {"other"}) == "fair"
    assert Rehearsed(None).best(plans, set()) == "unfair"
    assert Rehearsed(None).best(plans, {"other", "unfair"}) == "unfair"
    weights = [1.0, 0.0]
    nobody = plans_of(
        other=latency([1.0, 1.0], 0.1, weights), own=latency([0.9, 9.0], 0.1, weights)
    )
    assert Rehearsed(None).best(nobody, {"other"}) == "own"


def test_busy_clusters_go_by_simulation() -> None:
    """Of plans close to the best by formula the one of the least simulated mean.

    A plan that is far behind is not simulated where its work alone takes longer than the best.
    """
    plans = plans_of(a=latency([1.0, 1.0]), b=latency([1.1, 1.1]), far=latency([1.4, 1.4]))
    selection = Rehearsed({"a": steady(1.5, 1.5), "b": steady(1.3, 1.3)})
    assert selection.best(plans, set()) == "b"
    assert selection.simulated == pytest.approx({"a": 1.5, "b": 1.3})
    assert {name for name, _ in selection.asked} == {"a", "b"}


def test_homes_count_by_their_rates() -> None:
    """A plan that is faster for the home of most users is chosen, though plain means are slower.

    With 99 of 100 requests at the first home, 1 s and 5 s are 1.04 s a request and not 3 s, and of
    the requests that are the first's 99 % take 1 s at most.
    """
    plans = plans_of(often=latency([1.0, 5.0], 0.5), seldom=latency([2.0, 1.0], 0.5))
    runs = {"often": steady(1.0, 5.0), "seldom": steady(2.0, 1.0)}
    selection = Rehearsed(runs)
    assert selection.best(plans, set()) == "seldom"
    selection = Rehearsed(runs)
    selection.rates = np.array([9.9, 0.1])
    assert selection.best(plans, set()) == "often"
    assert selection.simulated == pytest.approx({"often": 1.04, "seldom": 1.99})
    figures = selection._simulated_figures("often", plans["often"], 3)
    assert (figures.mean_s, figures.p99_s) == pytest.approx((1.04, 1.0))
    assert figures.slowest_home_s == pytest.approx(5.0)


def test_an_untrusted_formula_has_more_plans_simulated() -> None:
    """Where something is busy for more than 30 % of the time: those below three times the best."""
    plans = plans_of(a=latency([1.0, 1.0], 0.5), b=latency([2.9, 2.9], 0.5), c=latency([3.1, 3.1]))
    selection = Rehearsed({"a": steady(3.0, 3.0), "b": steady(2.5, 2.5)})
    assert selection.best(plans, set()) == "b"
    assert "c" not in selection.simulated


def test_bursts_have_every_kind_simulated() -> None:
    """The formula leaves bursts out: whatever it says, one plan of each kind is simulated."""

    class Bursts(Rehearsed):
        bursts = True

    plans = plans_of(a=latency([1.0, 1.0]), b=latency([2.5, 2.5]), far=latency([90.0, 90.0]))
    runs = {"a": steady(1.5, 1.5), "b": steady(1.4, 1.4), "far": steady(0.1, 0.1)}
    assert Bursts(runs).best(plans, set()) == "far"
    assert Rehearsed(runs).best(plans, set()) == "a"


def test_of_each_kind_of_plan_one_is_simulated() -> None:
    """Whatever the formula says of its waiting: the one of least work, where that can be the best.

    Plans of one kind differ by what follows a comma or a number. Those of a kind that was simulated
    are left out, and those whose work alone takes longer than the best simulated mean.
    """
    plans = {
        "a": latency([1.0, 1.0]),
        "b": latency([1.1, 1.1]),
        "b #2": latency([9.0, 9.0], waiting_s=8.5),  # its kind takes part
        "own, 1 group": latency([5.0, 5.0], waiting_s=4.3),
        "own, 2 groups": latency([8.0, 8.0], waiting_s=7.5),  # least work of its kind
        "own, 2 groups #2": latency([4.0, 4.0], waiting_s=3.4),
        "work": latency([3.0, 3.0], waiting_s=1.0),  # works longer than the best takes
    }
    runs = {"a": 2.0, "b": 1.5, "own, 2 groups": 1.2}
    selection = Rehearsed({name: steady(mean_s, mean_s) for name, mean_s in runs.items()})
    assert selection.best(plans, set()) == "own, 2 groups"
    assert selection.simulated == pytest.approx(runs)
    runs["own, 2 groups"] = 1.6
    selection = Rehearsed({name: steady(mean_s, mean_s) for name, mean_s in runs.items()})
    assert selection.best(plans, set()) == "b"


@pytest.mark.parametrize(
    ("own", "chosen"),
    [
        (steady(0.5, 1.02), "own"),
        (steady(0.5, 1.04), "other"),  # the slowest home
        (np.where(np.arange(100) < 2, 3.0, 0.5), "other"),  # the 99th percentile
        (np.where(np.arange(100) < 2, 1.05, 0.5), "own"),
    ],
)
def test_what_is_gained_on_average_is_no_homes_loss(own: np.ndarray, chosen: str) -> None:
    """Beside the best plan of another solver, though that is far behind by the formula."""
    plans = plans_of(other=latency([9.0, 9.0]), own=latency([1.0, 1.0]))
    selection = Rehearsed({"own": own, "other": steady(1.0, 1.0)})
    assert selection.best(plans, {"other"}) == chosen


def test_only_samples_of_the_same_number_are_compared() -> None:
    """Of 20 plans the last 3 have all six samples, and only these are told."""
    plans = {f"p #{n}": latency([1 + n / 1000] * 2) for n in range(20)}
    selection = Rehearsed({name: steady(2 - n / 100, 2.0) for n, name in enumerate(plans)})
    chosen = selection.best(plans, set())
    assert len(selection.simulated) == 3
    assert selection.simulated[chosen] == min(selection.simulated.values())
    samples = {
        name: {s for own, s in selection.asked if own == name} for name in selection.simulated
    }
    assert all(of_plan == set(range(6)) for of_plan in samples.values())


def test_a_plan_that_is_kept_takes_part_to_the_end() -> None:
    """Far behind by the formula, it is simulated all the same, and chosen where it is the best."""
    plans = {f"p #{n}": latency([1 + n / 1000] * 2) for n in range(40)}
    selection = Rehearsed({name: steady(2 - n / 100, 2.0) for n, name in enumerate(plans)})
    assert selection.best(plans, set()) == "p #11"  # the last of the twelve that are simulated
    assert selection.best(plans, set(), "p #39") == "p #39"
    assert selection.best(plans, set(), "p #2") == "p #11"


def test_loads_have_their_price() -> None:
    """A gain of 0.2 s for 2 GiB to load is taken below 0.1 s a GiB, by formula or simulated."""
    plans = plans_of(old=latency([1.0, 1.0]), new=latency([0.8, 0.8]))
    runs = {"old": steady(1.0, 1.0), "new": steady(0.8, 0.8)}

    def gib(plan: PlanLatency) -> float:
        return 2.0 if plan.mean_s < 0.9 else 0.0

    for known in (None, runs):
        assert Rehearsed(known, gib, load_price=0.09).best(plans, {"old"}) == "new"
        assert Rehearsed(known, gib, load_price=0.11).best(plans, {"old"}) == "old"
