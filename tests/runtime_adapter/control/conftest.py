"""The threads of a test's fleets end with the test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _end_fleets() -> Iterator[None]:
    """Threads that go on would take the processor from later tests."""
    yield
    try:
        from tests.runtime_adapter.control.fleet import OPEN
    except ImportError:  # PyTorch is not here
        return
    while OPEN:
        OPEN.pop().close()
