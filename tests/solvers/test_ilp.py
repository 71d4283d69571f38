"""What the ILP says when a limit stops it, and what it keeps off standard output."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from prism_plan.errors import LimitReached
from prism_plan.instance import Instance
from prism_plan.model_spec import ModelShape
from prism_plan.placement_check import violations
from prism_plan.solvers import Options, solve


def hard(seed: int = 0, layers: int = 6, experts: int = 16) -> Instance:
    """Experts of many sizes on GPUs in bytes: generalised assignment, slow to prove optimal."""
    rng = np.random.default_rng(seed)
    sizes = tuple(int(s) for s in rng.integers(100, 1000, layers))
    room = sum(sizes) * experts
    return Instance(
        ModelShape("mixed", tuple(range(layers)), experts, 2, sizes),
        ("a", "b", "c", "d"),
        rng.gamma(0.5, size=(4, layers, experts)),
        ((room // 5, room // 6), (room // 3,), (room // 2,), (room // 4, room // 4)),
    )


@pytest.mark.parametrize("backend", ["highs", "cbc"])
def test_no_placement_within_the_limit(backend: str) -> None:
    """A limit before the first placement is LimitReached, never a made-up answer."""
    instance = hard(layers=24, experts=64)
    with pytest.raises(LimitReached, match=r"within 0\.001 s"):
        solve(instance, "ilp", Options(backend=backend, time_limit_s=0.001))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["highs", "cbc"])
def test_a_limit_with_a_placement_reports_the_gap(backend: str) -> None:
    """Stopped early with a placement: not called optimal, bound below it, gap as stated."""
    instance = hard(layers=12, experts=32)
    options = Options(backend=backend, time_limit_s=4.0)  # type: ignore[arg-type]
    plan = (placement := solve(instance, "ilp", options)).plan
    assert violations(placement, instance=instance) == []
    assert plan.bound is not None
    assert plan.remote_share is not None
    assert plan.bound <= plan.remote_share + 1e-12
    if plan.termination == "time_limit":
        gap = (plan.remote_share - plan.bound) / plan.remote_share
        assert plan.extra["gap"] == pytest.approx(gap, rel=1e-6)
    else:
        assert plan.bound == pytest.approx(plan.remote_share, abs=1e-9)


@pytest.mark.parametrize("backend", ["highs", "cbc"])
def test_standard_output_stays_clean(backend: str) -> None:
    """No banner of a back end reaches standard output, not even past Python."""
    code = f"""
import numpy as np
from prism_plan.instance import Instance
from prism_plan.model_spec import ModelShape
from prism_plan.solvers import Options, solve
instance = Instance(ModelShape("m", (0,), 4, 1, 1), ("a", "b"), np.ones((2, 1, 4)), ((3,), (3,)))
print(solve(instance, "ilp", Options(backend={backend!r})).plan.remote_share)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "0.25\n"
