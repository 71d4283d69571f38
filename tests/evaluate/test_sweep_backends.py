"""Back ends of sweeps: one table on all of them, calls of lost workers made again, plain errors."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Callable, Hashable, Iterator
from multiprocessing import active_children
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_plan.errors import InputError, LimitReached
from prism_plan.evaluate import sweep_cells
from prism_plan.evaluate.sweep import SweepOptions, sweep
from prism_plan.evaluate.sweep_backends import BACKENDS, open_backend, require_backend
from prism_plan.evaluate.sweep_backends.contract import Backend
from prism_plan.evaluate.sweep_backends.in_order import num_parts, results_in_order
from prism_plan.evaluate.sweep_grid import Grid
from prism_plan.io.sweep import read_sweep
from prism_plan.io.trace_writer import write_trace
from tests.evaluate.simulation_material import GIVEN, small_cluster, small_trace
from tests.limits import HANG_S

Run = Callable[..., CompletedProcess[str]]
TIMES = ("solve_s", "runtime_s")


def require_installed(name: str) -> None:
    """Skip where the extra of a back end is not installed."""
    module = BACKENDS[name]
    if module is not None and importlib.util.find_spec(module) is None:
        pytest.skip(f"the extra {name} is not installed")


@pytest.fixture(scope="module", params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Two workers of each back end on this machine."""
    require_installed(request.param)
    opened = open_backend(request.param, 2, None)
    yield opened
    opened.close()


def ended(backend: Backend, handle: Hashable) -> Any:
    """The result of the only call that is under way."""
    assert backend.next_done() == handle
    return backend.result(handle)


# ------------------------------------------------------------------------------- what workers call


def add(shared: int, *numbers: int) -> int:
    return shared + sum(numbers)


def die_once(shared: int, marker: str) -> int:
    """End the worker without a word, but for the second time that it is called."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return shared
    os.kill(os.getpid(), signal.SIGKILL)
    return -1


def die(shared: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(shared: int) -> None:
    raise ZeroDivisionError("on purpose")


# ---------------------------------------------------------------------------------- every back end


@pytest.mark.filterwarnings("ignore")
def test_calls_results_errors_and_lost_workers(backend: Backend, tmp_path: Path) -> None:
    """Results stand for themselves in arguments, errors are raised here, lost calls come back."""
    assert backend.num_workers() == 2
    shared = backend.share(100)
    first = backend.submit(add, shared, 1)
    assert backend.next_done() == first
    second = backend.submit(add, shared, first, 2)
    assert ended(backend, second) == 203
    handles = [backend.submit(die_once, shared, str(tmp_path / "died"))]
    handles += [backend.submit(add, shared, number) for number in range(6)]
    done = {handle: backend.result(handle) for handle in [backend.next_done() for _ in handles]}
    assert [done[handle] for handle in handles] == [100, *range(100, 106)]
    assert (tmp_path / "died").exists()
    failed = backend.submit(fail, shared)
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        ended(backend, failed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["processes"])
def test_a_call_that_ends_every_worker(name: str) -> None:
    """A call whose workers are lost again and again is given up, in one line."""
    opened = open_backend(name, 2, None)
    try:
        opened.submit(die, opened.share(0))
        with pytest.raises(LimitReached, match="were lost 4 times"):
            opened.next_done()
    finally:
        opened.close()


@pytest.mark.parametrize("name", ["dask", "ray"])
def test_the_table_of_the_command_is_that_of_one_process(
    prism_plan: Run, tmp_path: Path, name: str
) -> None:
    """Runs of one solver and of several, a failed cell, and a hold-out; nothing else is said."""
    require_installed(name)
    write_trace(tmp_path / "t.parquet", small_trace())
    (tmp_path / "c.toml").write_text(GIVEN)
    words = ("simulate", "--trace", "t.parquet", "--cluster", "c.toml", "--requests", 2,
             "--sweep", "solver=exact", "--sweep", "gpus=4,5", "--holdout", "0.5",
             "--sweep", "bandwidth_mbps=10,20,50,100,200,500,1000")  # fmt: skip
    tables = []
    for options in (("--jobs", 1), ("--jobs", 2, "--backend", name)):
        result = prism_plan(*words, *options, "-o", "s.csv", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        told = result.stderr.splitlines()
        assert len(told) == 2, told
        assert told[0] == "prism-plan: s.csv: 14 of 14 runs"
        assert told[1].startswith("prism-plan: 7 of 14 runs failed: --sweep: gpus: 5")
        rows = read_sweep(tmp_path / "s.csv")
        tables.append([{**row, **dict.fromkeys(TIMES)} for row in rows])
    assert tables[0] == tables[1]


# ------------------------------------------------------------------------------ order, and planning


class AnyOrder:
    """A back end in which calls end in an order of ours."""

    def __init__(self, workers: int, choose: Callable[[int], int]) -> None:
        self.workers = workers
        self.choose = choose
        self.waiting: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self.most = 0
        self.made: dict[Hashable, Any] = {}

    def num_workers(self) -> int:  # noqa: D102
        return self.workers

    def share(self, value: Any) -> Any:  # noqa: D102
        return value

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Hashable:  # noqa: D102
        call = (function, arguments)
        self.waiting.append(call)
        self.most = max(self.most, len(self.waiting))
        return call

    def next_done(self) -> Hashable:  # noqa: D102
        call = self.waiting.pop(self.choose(len(self.waiting)))
        function, arguments = call
        self.made[call] = function(*(self.made.get(each, each) for each in arguments))
        return call

    def result(self, handle: Hashable) -> Any:  # noqa: D102
        return self.made[handle]

    def close(self) -> None:
        """Nothing was opened."""


@given(st.data(), st.lists(st.integers(1, 5), max_size=8), st.integers(1, 4))
def test_results_come_in_order(data: st.DataObject, sizes: list[int], workers: int) -> None:
    """Whatever ends first: results in order, first steps once a block, no call too many at once."""
    backend = AnyOrder(workers, lambda n: data.draw(st.integers(0, n - 1)))
    firsts: list[int] = []

    def first(shared: str, block: int) -> str:
        firsts.append(block)
        return f"{shared}{block}"

    blocks = [(at, tuple(range(size))) for at, size in enumerate(sizes)]
    found = results_in_order(
        backend,
        "s",
        blocks,
        first,
        lambda shared, block, start, part: (start, part),
        lambda shared, block, part: (first(shared, block), part),
    )
    assert list(found) == [(f"s{at}", part) for at, parts in blocks for part in parts]
    assert sorted(firsts) == list(range(len(sizes)))
    assert backend.most <= 2 * workers


def test_few_blocks_are_cut_into_more_parts() -> None:
    """There is work for all workers, whether there are many placements or a single one."""
    backend = AnyOrder(3, lambda n: 0)
    assert [num_parts(backend, blocks) for blocks in (0, 1, 5, 12, 1000)] == [12, 12, 3, 1, 1]


def test_a_placement_is_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells that share cluster, solver and seed have one plan, though their runs are apart."""
    planned = []
    solve = sweep_cells.solve

    def counting(instance: Any, solver: str, options: Any) -> Any:
        planned.append((solver, options.seed))
        return solve(instance, solver, options)

    monkeypatch.setattr(sweep_cells, "solve", counting)
    bandwidths = tuple(float(n) for n in range(1, 9))
    grid = Grid(solver=("exact", "uniform"), seed=(0, 1), bandwidth_mbps=bandwidths)
    monkeypatch.setattr("prism_plan.evaluate.sweep.num_parts", lambda backend, blocks: 3)
    options = SweepOptions(requests_per_server=1)
    rows = list(sweep(small_trace(), small_cluster(), grid, options, jobs=1))
    assert planned == [("exact", 0), ("uniform", 0), ("exact", 1), ("uniform", 1)]
    assert [row["bandwidth_mbps"] for row in rows] == list(bandwidths) * 4


def test_a_worker_with_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two versions are not mixed: the sweep is refused, no cell fails for itself."""
    grid = Grid(solver=("exact",))
    work = sweep_cells.SweepWork(small_trace(), small_cluster(), SweepOptions(), {})
    (block,) = grid.blocks()
    monkeypatch.setattr(sweep_cells, "__version__", "9.9")
    with pytest.raises(InputError, match=r"a worker has prism-plan 9\.9; expected workers with"):
        sweep_cells.plan_block(work, block)


# ------------------------------------------------------------------------------------ plain errors


@pytest.mark.parametrize("name", ["dask", "ray"])
def test_an_extra_that_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line names the extra to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(InputError) as caught:
        require_backend(name, None)
    assert f"pip install 'prism-plan[{name}]'" in str(caught.value)
    assert caught.value.parameter == "backend"


def test_back_ends_that_are_none() -> None:
    """An unknown name, and an address for processes, are refused."""
    with pytest.raises(InputError, match="backend: 'spark'; expected one of processes, dask, ray"):
        require_backend("spark", None)
    with pytest.raises(InputError, match="scheduler: has no effect with the backend processes"):
        require_backend("processes", "host:1")


@pytest.mark.parametrize("name", ["dask", "ray"])
@pytest.mark.parametrize(
    ("address", "words"),
    [("127.0.0.1:1", "refused"), ("nowhere", "HOST:PORT"), ("foo://127.0.0.1:1", "HOST:PORT")],
)
def test_schedulers_that_are_not_there(name: str, address: str, words: str) -> None:
    """An address where nobody listens is told at once, in one line."""
    require_installed(name)
    with pytest.raises(InputError) as caught:
        open_backend(name, -1, address)
    assert str(caught.value).startswith("scheduler: ")
    assert words in str(caught.value)


def is_running(pid: int | None) -> bool:
    """Whether a process runs; ``is_alive`` knows nothing of one that joblib's thread has reaped."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_second_interruption_leaves_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the workers are being ended: all of them are killed all the same."""
    backend = open_backend("processes", 2, None)
    backend.share(1)
    handle = backend.submit(add, 1)
    assert ended(backend, handle) == 1
    executor = backend._executor  # type: ignore[attr-defined]
    before = [child for child in active_children() if type(child).__name__ == "LokyProcess"]
    assert before

    def interrupted(**options: bool) -> None:
        raise KeyboardInterrupt

    whole = executor.shutdown
    monkeypatch.setattr(executor, "shutdown", interrupted)
    with pytest.raises(KeyboardInterrupt):
        backend.close()
    deadline = time.monotonic() + HANG_S
    while any(is_running(child.pid) for child in before):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    monkeypatch.undo()
    whole(wait=True, kill_workers=True)


def test_no_more_workers_than_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep of two runs asks for two workers, whatever --jobs says."""
    asked: list[int] = []

    def noted(name: str, jobs: int, scheduler: str | None) -> Backend:
        asked.append(jobs)
        return open_backend(name, 1, scheduler)

    monkeypatch.setattr("prism_plan.evaluate.sweep.open_backend", noted)
    grid = Grid(solver=("uniform", "eplb"))
    assert len(list(sweep(small_trace(), small_cluster(), grid, jobs=999_999))) == 2
    assert asked == [2]
