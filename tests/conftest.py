"""Fixtures shared by the tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from prism_plan.cluster import Cluster
from prism_plan.io.cluster import parse_cluster
from prism_plan.model_spec import PRESETS
from prism_plan.profiling.counts_csv import read_counts
from prism_plan.profiling.esft import read_esft
from prism_plan.profiling.sources import Source
from prism_plan.trace import Trace
from tests import warm_processes
from tests.limits import HANG_S
from tests.warm_processes import run_warm

# a shell ignores these for what it starts in the background, nohup too, and all commands that tests
# interrupt would inherit that
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)

# as the runtime's own programs have it: a lost connection is told in our words, not in a C++ trace
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")

# no test may fail because the machine is slow
settings.register_profile("prism-plan", deadline=None)
settings.load_profile("prism-plan")

ROOT = Path(__file__).resolve().parent.parent
ESFT_TASKS = ("intent", "law", "summary", "translation")


#: Files whose tests take longest, each with about how long, in seconds.
LONG_FILES = {
    "runtime_adapter/cli/test_serve.py": 186, "runtime_adapter/cli/test_spans.py": 126,
    "runtime_adapter/cli/test_faults.py": 116, "solvers/latency/test_solver.py": 110,
    "runtime_adapter/cli/test_table_reviews.py": 50,
    "runtime_adapter/control/test_survival.py": 107, "test_jit.py": 106,
    "golden/test_golden.py": 105, "evaluate/test_sweep_backends.py": 104,
    "plotting/test_plotting.py": 84, "migration/test_replicas.py": 78,
    "runtime_adapter/cli/test_kills.py": 77, "cli/test_bad_input.py": 76,
    "evaluate/test_table_reviews.py": 74, "cli/test_solve_latency.py": 68,
    "cli/test_commands.py": 60, "test_hostile_files.py": 60,
    "solvers/latency/test_reference.py": 56,
    "runtime_adapter/cli/test_move.py": 53, "cli/test_execution.py": 52,
    "profiling/recording/test_checkpoint_run.py": 51, "runtime_adapter/cli/test_returns.py": 50,
    "solvers/test_pipeline.py": 45, "studies/testbed/test_testbed.py": 40,
    "plotting/test_simulations.py": 39, "cli/test_migrate.py": 36,
    "runtime_adapter/cli/test_user_errors.py": 40,
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each process of pytest-xdist its share of the longest tests, and let it begin with them.

    Each gets a run of the list at first, and takes from the others' ends when it is done
    (``--dist worksteal``). Long tests that are last, or all in one run, keep the others waiting.
    """
    shares: list[list[pytest.Item]] = [
        [] for _ in range(int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    ]
    taken = [0] * len(shares)
    by_file: dict[str, list[pytest.Item]] = {}
    for item in items:
        by_file.setdefault(item.nodeid.partition("::")[0].removeprefix("tests/"), []).append(item)
    for name, seconds in sorted(LONG_FILES.items(), key=lambda one: -one[1]):
        least = taken.index(min(taken))
        taken[least] += seconds
        shares[least] += by_file.pop(name, [])
    others = [item for found in by_file.values() for item in found]
    number = -(-len(items) // len(shares))
    for share in shares:
        room = max(number - len(share), 0)
        share += others[:room]
        others = others[room:]
    items[:] = [item for share in shares for item in share] + others


def pytest_sessionstart(session: pytest.Session) -> None:
    """Start what all processes of pytest-xdist share, and compiles, while they collect."""
    if "PYTEST_XDIST_WORKER" in os.environ or not session.config.getoption("numprocesses", None):
        return
    folder = tempfile.TemporaryDirectory(prefix="prism-warm-")
    sources = warm_processes.share_sources(Path(folder.name))
    session.config.add_cleanup(folder.cleanup)
    for source in sources:
        session.config.add_cleanup(source.close)


@pytest.fixture(scope="session")
def traces_dir() -> Path:
    """The folder of real routing data; tests that need it skip where it is missing."""
    folder = Path(os.environ.get("PRISM_TRACES", ROOT.parent / "shared" / "traces"))
    if not (folder / "deepseek-v2-lite-esft").is_dir():
        pytest.skip(f"no real routing data in {folder} (set PRISM_TRACES)")
    return folder


@pytest.fixture(scope="session")
def v2_trace(traces_dir: Path) -> Trace:
    """DeepSeek-V2-Lite's architecture, four tasks, token by token."""
    scores = traces_dir / "deepseek-v2-lite-esft" / "expert_scores"
    sources = [Source(scores / task) for task in ESFT_TASKS]
    return read_esft(sources, PRESETS["deepseek-v2-lite"])


@pytest.fixture(scope="session")
def mixtral_trace(traces_dir: Path) -> Trace:
    """Mixtral-8x7B, seven MMLU subjects, counts only."""
    source = Source(traces_dir / "mixtral-8x7b-mmlu" / "counts.csv")
    return read_counts([source], PRESETS["mixtral-8x7b"])


@pytest.fixture(scope="session")
def slots_cluster() -> Callable[..., Cluster]:
    """Make a cluster of one-task servers of weight 1 from tasks and the slots of their GPUs."""

    def make(tasks: list[str], slots: list[list[int]]) -> Cluster:
        text = ['name = "test"']
        for n, (task, gpus) in enumerate(zip(tasks, slots, strict=True)):
            text.append(f'[[server]]\nname = "edge-{n}"\nweight = 1.0\ntasks = {{ {task} = 1.0 }}')
            text.extend(f"[[server.gpu]]\nslots = {number}" for number in gpus)
        return parse_cluster("\n".join(text))

    return make


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def installed_prism_plan() -> Run:
    """Run the installed command, as a user does."""
    script = Path(sys.executable).parent / "prism-plan"

    def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(script), *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=cwd,
            timeout=HANG_S,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def prism_plan() -> Run:
    """Run the command in a process of its own."""

    def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return run_warm(list(map(str, arguments)), cwd=cwd, timeout_s=HANG_S)

    return run
