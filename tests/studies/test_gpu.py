"""The study of servers that share a card, with a small model on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.limits import HANG_S

pytest.importorskip("transformers")


@pytest.mark.long
def test_the_study_runs(tmp_path: Path) -> None:
    """All three ways serve all requests: only spans hop, only experts elsewhere are called."""
    words = ["--small", "--device", "cpu", "--requests", "3", "--tokens", "4", "-o"]
    subprocess.run(
        [sys.executable, "-m", "studies.gpu", *words, str(tmp_path / "g.json")],
        check=True, timeout=HANG_S, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    found = json.loads((tmp_path / "g.json").read_text())
    alone, at_home, spans = (one for name, one in found.items() if "server" in name)
    assert (alone["hops"], alone["messages"]) == (0, 0)
    assert (at_home["hops"], spans["messages"]) == (0, 0)
    assert at_home["messages"] > 0
    assert spans["hops"] > 0
    assert spans["tokens"] == at_home["tokens"] == 3 * alone["tokens"]
