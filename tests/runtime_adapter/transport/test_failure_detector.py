"""How long other processes are silent."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from runtime_adapter.transport.failure_detector import MAX_GAP_S, FailureDetector


def test_only_observed_time_counts() -> None:
    """An unchanged heartbeat counts for as long as it was observed, one that changes does not.

    A pause of the process that looks, or a clock that is set, makes nobody silent.
    """
    at = [100.0]
    detector = FailureDetector(lambda: at[0])
    assert detector.silent_s("a", 1) == 0
    for _ in range(5):
        at[0] += 1.0
        detector.silent_s("a", 1)
    assert detector.silent_s("a", 1) == 5.0
    assert detector.silent_s("b", 1) == 0
    at[0] += 3600.0
    assert detector.silent_s("a", 1) == 5.0 + MAX_GAP_S
    at[0] -= 7200.0
    assert detector.silent_s("a", 1) == 5.0 + MAX_GAP_S
    assert detector.silent_s("a", 2) == 0
    at[0] += 1.0
    assert detector.silent_s("a", 2) == 1.0
