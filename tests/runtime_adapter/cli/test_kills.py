"""Every kind of process killed or stopped, in serving and in moving: the run goes on.

The trials are those of the study of faults: no hang, no wrong token, no failed request where an
expert is held, and whatever was killed is back and serves in the end.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from studies.faults.run import run_trial
from studies.faults.trials import Trial, scripted


def representative() -> Trial:
    """A whole server is killed while experts move, with two copies of each expert."""
    found = [
        trial
        for trial in scripted()
        if trial.moment == "moving"
        and trial.model == "deepseek-v2"
        and trial.replicas == 2
        and [(fault.target, fault.stop_s) for fault in trial.faults] == [("both", None)]
    ]
    return found[0]


def test_a_server_that_is_killed_in_a_move(tmp_path: Path) -> None:
    """All requests of homes that live are answered, and the server comes back and serves."""
    record = run_trial(representative(), tmp_path)
    assert record["well"], record


@pytest.mark.long
@pytest.mark.parametrize("trial", scripted(), ids=str)
def test_whatever_is_hit(trial: Trial, tmp_path: Path) -> None:
    """All scripted trials go well."""
    record = run_trial(trial, tmp_path)
    assert record["well"], record
