"""Run HiGHS or CBC on a PuLP problem: silent, interruptible, and with the bound that it proved."""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prism_plan.solvers.contract import Options

_CBC_BOUND = re.compile(r"^Lower bound:\s+(\S+)", re.MULTILINE)
_CBC_RELAXED = re.compile(r"^Continuous objective value is\s+(\S+)", re.MULTILINE)
_CBC_OPTIMAL = re.compile(r"^(?:Result - Optimal solution found|Optimal objective)", re.MULTILINE)


def solve_problem(problem: Any, options: Options) -> float | None:
    """Solve a PuLP problem in place, by the back end and within the time of ``options``.

    Gives the lower bound on the objective that the back end proved, if it reports one.
    """
    with _silent_stdout(), tempfile.TemporaryDirectory(prefix="prism-plan-") as folder:
        log = Path(folder) / "log"
        with _children_killed_on_error():
            problem.solve(_pulp_solver(options, log))
        return _proven_bound(problem, options, log)


def _pulp_solver(options: Options, log: Path) -> Any:
    """The back end as PuLP's solver, which stops only at a proven optimum or at the time limit."""
    import pulp

    if options.backend == "highs":

        class Highs(pulp.HiGHS):  # type: ignore[misc]
            def callSolver(self, lp: Any) -> None:  # noqa: N802 - PuLP's name
                _run_interruptibly(lp.solverModel)

        return Highs(msg=False, timeLimit=options.time_limit_s, gapRel=0.0, gapAbs=0.0, threads=1)
    solver = pulp.COIN_CMD(
        path=pulp.PULP_CBC_CMD.pulp_cbc_path,  # the CBC that comes with PuLP
        msg=False,
        timeLimit=options.time_limit_s,
        gapRel=0.0,
        threads=1,
        logPath=str(log),
    )
    solver.tmpDir = str(log.parent)
    return solver


def _run_interruptibly(highs: Any) -> None:
    """Run HiGHS in a thread of its own, so that Ctrl-C is seen before the search ends."""
    highs.HandleUserInterrupt = True
    thread = highs.startSolve()
    try:
        while thread.is_alive():
            thread.join(0.05)
    except BaseException:
        highs.cancelSolve()
        thread.join(1)  # it may end later; nothing waits for it
        raise


@contextlib.contextmanager
def _children_killed_on_error() -> Iterator[None]:
    """Kill CBC when the wait for it is interrupted, for PuLP leaves it running."""
    import psutil

    process = psutil.Process()
    before = set(process.children(recursive=True))
    try:
        yield
    except BaseException:
        for child in set(process.children(recursive=True)) - before:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
                child.wait(5)
        raise


def _proven_bound(problem: Any, options: Options, log: Path) -> float | None:
    """The back end's own proven bound on the scaled objective, if it reports one."""
    import pulp

    if options.backend == "highs":
        model = getattr(problem, "solverModel", None)
        if model is None:
            return None
        bound = float(model.getInfo().mip_dual_bound)
        return bound if math.isfinite(bound) else None
    text = log.read_text(errors="replace") if log.exists() else ""
    found = _CBC_BOUND.search(text)
    if found:
        return float(found.group(1))
    if _CBC_OPTIMAL.search(text) and problem.sol_status == pulp.LpSolutionOptimal:
        return float(pulp.value(problem.objective))
    found = _CBC_RELAXED.search(text)
    return float(found.group(1)) if found else None


@contextlib.contextmanager
def _silent_stdout() -> Iterator[None]:
    """Discard what HiGHS prints to file descriptor 1: a banner, even with ``msg=False``."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        with open(os.devnull, "wb") as devnull:
            os.dup2(devnull.fileno(), 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
