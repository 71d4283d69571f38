"""The traces that the project profiled itself, from the checkpoints it trained itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from prism_plan.instance import Instance
from prism_plan.io.cluster import read_cluster
from prism_plan.io.trace_reader import read_trace
from prism_plan.sizes.load import load_model_spec
from prism_plan.solvers import solve
from prism_plan.solvers.entropy import layer_entropy
from prism_plan.trace import Trace

TRACES = Path(__file__).resolve().parents[2] / "traces"
NAMES = ("tiny-mixtral", "tiny-deepseek-v2")


@pytest.fixture(params=NAMES)
def trace(request: pytest.FixtureRequest) -> Trace:
    """A committed trace."""
    return read_trace(TRACES / f"{request.param}.parquet")


def test_they_are_of_the_committed_checkpoints(trace: Trace) -> None:
    """Model, prompts and tasks are those beside the trace; nothing is partial."""
    spec = load_model_spec(str(TRACES / trace.model.name))
    assert trace.model == dataclasses.replace(spec, attention_flops=None)  # recorded before it came
    assert trace.tasks == ("arithmetic", "ascii-word", "narrative")
    assert trace.requests is not None
    assert trace.requests.tolist() == [40, 40, 40]
    assert trace.has_weights
    assert trace.provenance["source"] == "hf"
    assert "partial" not in trace.provenance


def test_routing_depends_on_the_task(trace: Trace) -> None:
    """Tasks diverge by about what real DeepSeek-V2-Lite traces show, 0.16 bits."""
    p = trace.counts / trace.counts.sum(axis=2, keepdims=True)
    pairs = [(0, 1), (0, 2), (1, 2)]
    divergence = np.mean(
        [
            (layer_entropy((p[a] + p[b]) / 2) - (layer_entropy(p[a]) + layer_entropy(p[b])) / 2)
            for a, b in pairs
        ]
    ) / np.log(2)
    assert 0.1 < divergence < 0.3


def test_they_are_small() -> None:
    """Traces together at most 8 MB, checkpoints at most 6 MB."""
    assert sum((TRACES / f"{name}.parquet").stat().st_size for name in NAMES) <= 8e6
    files = [path for name in NAMES for path in (TRACES / name).iterdir()]
    assert sum(path.stat().st_size for path in files) <= 6e6


def test_the_demonstration_cluster_fits() -> None:
    """The cluster of the demonstration is feasible, and locality pays on it."""
    trace = read_trace(TRACES / "tiny-deepseek-v2.parquet")
    instance = Instance.build(trace, read_cluster(TRACES / "tiny-cluster.toml"))
    shares = {name: solve(instance, name).plan.remote_share for name in ("eplb", "prism", "exact")}
    assert shares["exact"] <= shares["prism"] < shares["eplb"]


@pytest.mark.parametrize("name", NAMES)
def test_profiling_again_gives_the_same_counts(name: str, tmp_path: Path) -> None:
    """The commands in TINY.md make the committed traces, but for ties of float arithmetic."""
    pytest.importorskip("transformers")
    from prism_plan.profiling.recording.checkpoint_run import profile_checkpoint
    from prism_plan.profiling.recording.hf_options import HfOptions

    options = HfOptions(max_new_tokens=32, dtype="float32", weights=True, device="cpu")
    profile_checkpoint(
        str(TRACES / name), TRACES / "tiny-prompts.jsonl", tmp_path / "t.parquet", options
    )
    again, committed = read_trace(tmp_path / "t.parquet"), read_trace(TRACES / f"{name}.parquet")
    moved = np.abs(again.counts - committed.counts).sum() / committed.counts.sum()
    assert moved < 0.02
    assert np.abs(again.tokens - committed.tokens).max() <= 0.02 * committed.tokens.max()
