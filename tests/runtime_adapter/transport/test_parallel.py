"""Calls with a time limit end although what they wait for does not answer."""

from __future__ import annotations

import threading

import pytest

pytest.importorskip("torch")

from runtime_adapter.transport.call_threads import run_with_timeout

LIMIT_S = 60.0


def test_a_job_with_a_limit() -> None:
    """Its result or its error come through; one that blocks is left behind."""
    assert run_with_timeout(lambda: 7, LIMIT_S) == 7
    with pytest.raises(ZeroDivisionError):
        run_with_timeout(lambda: 1 // 0, LIMIT_S)
    block = threading.Event()
    with pytest.raises(TimeoutError, match=r"within 0\.05 s"):
        run_with_timeout(block.wait, 0.05)
    block.set()
