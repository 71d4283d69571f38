"""The comparison with LEMON runs where LEMON is installed, and both solvers agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.cases import gamma
from tests.benchmarks.lemon import compile_lemon, measure, solve_with_exact, solve_with_lemon
from tests.solvers.test_exact import medium


@pytest.fixture(scope="module")
def lemon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled comparison."""
    program = compile_lemon(tmp_path_factory.mktemp("lemon"))
    if program is None:
        pytest.skip("needs g++ and LEMON (package liblemon-dev)")
    return program


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_equals_network_simplex_of_lemon(lemon: Path, seed: int, replicas: int) -> None:
    """LEMON keeps as many calls local, with one replica or two, shared tasks and scarce slots."""
    instance = medium(seed).replace(min_replicas=replicas)
    _, most_local = solve_with_lemon(lemon, instance)
    assert solve_with_exact(instance)[2] == pytest.approx(most_local, rel=1e-9)


def test_equals_lemon_where_most_experts_are_tied(lemon: Path) -> None:
    """Twelve servers with two tasks and whole-number calls: ties all over."""
    instance = gamma(6, 32, 4, 12, 30, 2)(Path())
    instance = instance.replace(activations=np.rint(instance.activations * 8))
    _, most_local = solve_with_lemon(lemon, instance)
    assert solve_with_exact(instance)[2] == most_local


def test_a_measurement_is_complete(lemon: Path) -> None:
    """A row has the times of both and their ratios."""
    row = measure(lemon, gamma(4, 16, 2, 8, 12, 8)(Path()), rounds=1)
    assert sorted(row) == ["flow_over_lemon", "flow_s", "lemon_s", "solve_over_lemon", "solve_s"]
    assert 0 < row["flow_s"] < row["solve_s"]
