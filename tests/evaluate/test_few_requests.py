"""Too few requests: closed forms, coverage of the interval, and what commands say."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_plan.cluster import Cluster, Gpu, Server
from prism_plan.evaluate.comparison import compare
from prism_plan.evaluate.few_requests import MAX_RELATIVE_ERROR, few_requests, length_error
from prism_plan.io.trace_writer import write_trace
from prism_plan.trace import TokenBatch, Trace, trace_from_batches
from tests.evaluate.simulation_material import CLUSTER, SPEC, invoke, small_cluster

TASKS = ("law", "code", "chat")


def trace_of(lengths: Sequence[Sequence[int]]) -> Trace:
    """A trace whose requests of each task have so many tokens."""
    batches, number = [], 0
    for task, of_task in enumerate(lengths):
        for tokens in of_task:
            experts = np.tile(np.arange(SPEC.top_k, dtype=np.uint16), (tokens, SPEC.num_layers, 1))
            ids, at = np.full(tokens, number, np.int32), np.arange(tokens, dtype=np.int32)
            phase, code = np.zeros(tokens, np.int8), np.full(tokens, task, np.int32)
            batches.append(TokenBatch(ids, at, phase, code, experts))
            number += 1
    return trace_from_batches(SPEC, TASKS[: len(lengths)], batches, name="t.parquet")


def cluster_of(*users: tuple[dict[str, float], float]) -> Cluster:
    """Servers with these shares of tasks and seconds between requests."""
    return Cluster(
        "c",
        tuple(
            Server(f"s{n}", (Gpu(slots=99),), tasks=tasks, arrival_interval_s=interval_s)
            for n, (tasks, interval_s) in enumerate(users)
        ),
    )


@pytest.mark.parametrize(("number", "quantile"), [(2, 12.706), (3, 4.303), (6, 2.571), (31, 2.042)])
def test_one_task_is_the_interval_of_students_t(number: int, quantile: float) -> None:
    """The textbook's interval of a mean: t · s / √R, relative to the mean."""
    lengths = [10 + 3 * (i % 5) for i in range(number)]
    error = length_error(trace_of([lengths]), cluster_of(({"law": 1.0}, 2.0)))
    expected = quantile * np.std(lengths, ddof=1) / number**0.5 / np.mean(lengths)
    assert error.relative == pytest.approx(expected, rel=1e-9)


def test_tasks_weigh_by_the_requests_of_users() -> None:
    """Rates times shares; a task that nobody asks for counts for nothing."""
    law, code, chat = [4, 9, 12, 20, 31], [10, 10, 11, 19], [1, 60]
    cluster = cluster_of(({"law": 1.0}, 1.0), ({"law": 0.5, "code": 0.5}, 0.5))
    error = length_error(trace_of([law, code, chat]), cluster)
    weights = np.array([2 / 3, 1 / 3])  # 1 + 1 requests a second of law, 1 of code
    parts = weights**2 * [np.var(law, ddof=1) / 5, np.var(code, ddof=1) / 4]
    np.testing.assert_allclose(error.variance, [*parts, 0.0])
    degrees = parts.sum() ** 2 / (parts**2 / [4, 3]).sum()
    mean = weights @ [np.mean(law), np.mean(code)]
    least, most = (t * parts.sum() ** 0.5 / mean for t in (2.447, 2.776))  # t of 6 and 4
    assert 4 <= degrees <= 6
    assert least <= error.relative <= most


@given(st.permutations([5, 7, 7, 12, 40]), st.integers(1, 5))
def test_more_of_the_same_is_surer(lengths: list[int], times: int) -> None:
    """So many times the requests narrow the interval at least by the root of the number."""
    cluster = cluster_of(({"law": 1.0}, 1.0))
    one = length_error(trace_of([lengths]), cluster).relative
    more = length_error(trace_of([lengths * times]), cluster).relative
    assert more <= one / times**0.5 * (1 + 1e-9)


def test_the_interval_holds_the_true_mean() -> None:
    """Of traces drawn from known distributions, 95 of 100 intervals hold the mean of all."""
    rng = np.random.default_rng(0)
    cluster = cluster_of(({"law": 1.0}, 1.0), ({"code": 1.0}, 1.0))
    means, held = (60.0, 20.0), 0
    for _ in range(400):
        law, code = (
            rng.gamma(4.0, mean / 4, size) for mean, size in zip(means, (6, 9), strict=True)
        )
        lengths = [np.maximum(np.round(of), 1).astype(int).tolist() for of in (law, code)]
        found = np.mean([np.mean(of) for of in lengths])
        error = length_error(trace_of(lengths), cluster).relative
        held += bool(abs(found - 40.0) <= error * found)
    assert 0.90 <= held / 400 <= 0.985


def test_what_is_said() -> None:
    """The tasks that matter most and by how much; nothing where requests are enough, or alike."""
    cluster = cluster_of(({"law": 1.0}, 1.0), ({"code": 1.0}, 1.0))
    even, uneven = [20] * 8, [10, 20, 60, 30, 15, 90]
    assert few_requests(trace_of([even, even]), cluster) == ""
    assert few_requests(trace_of([uneven * 20, even]), cluster) == ""
    text = few_requests(trace_of([even, uneven]), cluster)
    percent = 100 * length_error(trace_of([even, uneven]), cluster).relative
    assert percent > 100 * MAX_RELATIVE_ERROR
    assert text == (
        "only 6 requests of task code: by their lengths, mean times of other requests may differ "
        f"by {percent:.0f} % (95 % interval), and another plan may be the best for them"
    )
    assert few_requests(trace_of([[7], even]), cluster) == (
        "only 1 request of task law: how far mean times of other requests may differ cannot be told"
    )
    assert "by more than 100 %" in few_requests(trace_of([even, [3, 200]]), cluster)


def test_counts_have_no_requests() -> None:
    """Of a counts-only trace nothing is said here: commands say that its prompts are drawn."""
    trace = trace_of([[7], [8]])
    counts = Trace(SPEC, trace.tasks, trace.counts, trace.tokens)
    assert few_requests(counts, cluster_of(({"law": 1.0}, 1.0))) == ""


def test_weights_where_no_rate_is_known() -> None:
    """A server's ``weight`` counts tokens: its requests are fewer the longer they are."""
    servers = [
        Server(name, (Gpu(slots=99),), tasks={task: 1.0}, weight=1.0)
        for name, task in (("a", "law"), ("b", "code"))
    ]
    lengths = [[10, 20, 30], [30, 50, 40]]
    by_weight = length_error(trace_of(lengths), Cluster("c", tuple(servers)))
    by_rate = length_error(trace_of(lengths), cluster_of(({"law": 1.0}, 1.0), ({"code": 1.0}, 2.0)))
    assert by_weight.relative == pytest.approx(by_rate.relative, rel=1e-12)


def test_commands_say_it_of_what_they_simulate(tmp_path: Path) -> None:
    """`simulate` and `compare` name the file and the task; with latencies alone, and only then."""
    lengths = [[10, 20, 60, 30, 15, 90], [20] * 8, [25] * 3]
    trace = dataclasses.replace(trace_of(lengths), tasks=("x", "y", "z"))
    write_trace(tmp_path / "t.parquet", trace)
    (tmp_path / "c.toml").write_text(CLUSTER)
    cluster = small_cluster()
    text = few_requests(trace, cluster)
    assert text.startswith("only 6 requests of task x: ")
    told = f"t.parquet: {text}"
    options = ("--cluster", "c.toml", "--solvers", "exact")
    simulate = invoke(tmp_path, "simulate", "--trace", "t.parquet", *options)
    compared = invoke(tmp_path, "compare", "t.parquet", *options)
    none = invoke(tmp_path, "compare", "t.parquet", *options, "--requests", "0")
    for result, wanted in ((simulate, True), (compared, True), (none, False)):
        assert result.returncode == 0
        assert (told in " ".join(result.stderr.split())) == wanted
    assert compare(trace, cluster, solvers=["exact"]).few_requests == text
