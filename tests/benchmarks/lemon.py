"""The exact solver beside LEMON's network simplex: ``python -m tests.benchmarks.lemon``.

LEMON (package liblemon-dev) is a general solver in C++; lemon.cpp is compiled with ``g++ -O2``. Its
clock covers the solve alone, its arcs are in memory before; ours covers the whole of
:func:`prism_plan.solvers.solve`, and the flow alone. CPU seconds, in turn, medians.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np

from prism_plan.instance import Instance
from prism_plan.solvers import flow, solve
from tests.benchmarks.cases import gamma, v2_many, v2_three

SOURCE = Path(__file__).with_name("lemon.cpp")
ROUNDS = 5
#: Weights become integers of so many bits, so that LEMON's sums of costs stay below 2**63.
WEIGHT_BITS = 40

CASES = {
    "V2-Lite, 3 servers": v2_three,
    "V2-Lite, 64 servers x 80": v2_many(64, 80),
    "V2-Lite, 256 servers x 80": v2_many(256, 80),
    "V3 size, 64 servers x 300, each its own task": gamma(58, 256, 8, 64, 300, 64),
    "V3 size, 64 servers x 300, 4 tasks": gamma(58, 256, 8, 64, 300, 4),
    "V3 size, 256 servers x 300, each its own task": gamma(58, 256, 8, 256, 300, 256),
}


def compile_lemon(folder: Path) -> Path | None:
    """The compiled comparison, or ``None`` where the compiler or LEMON's headers are missing."""
    program = folder / "lemon"
    command = ["g++", "-O2", "-o", str(program), str(SOURCE)]
    try:
        compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    if compiled.returncode == 0:
        return program
    if "lemon/network_simplex.h" in compiled.stderr:
        return None
    raise RuntimeError(compiled.stderr)


def solve_with_lemon(program: Path, instance: Instance) -> tuple[float, float]:
    """CPU seconds of LEMON's solve, and the most calls that a placement can keep local.

    Instances have no rules.
    """
    assert not instance.has_rules
    value = instance.activations.reshape(instance.num_servers, -1)
    scale = 2.0 ** (WEIGHT_BITS - math.ceil(math.log2(value.max())))
    numbers = [
        np.array([*value.shape, instance.min_replicas]),
        instance.slots,
        np.rint(value * scale).ravel(),
    ]
    data = np.concatenate(numbers).astype(np.int64).tobytes()
    result = subprocess.run([str(program)], input=data, capture_output=True, check=True)
    seconds, weight = result.stdout.split()
    return float(seconds), int(weight) / scale


def solve_with_exact(instance: Instance) -> tuple[float, float, float]:
    """CPU seconds of the solve and of the flow in it, and the calls that are kept local."""
    in_flow = 0.0

    def timed(function: Any) -> Any:
        def run(*arguments: Any) -> Any:
            nonlocal in_flow
            begin = time.process_time()
            try:
                return function(*arguments)
            finally:
                in_flow += time.process_time() - begin

        return run

    with (
        mock.patch.object(flow, "initialise", timed(flow.initialise)),
        mock.patch.object(flow, "augment", timed(flow.augment)),
    ):
        begin = time.process_time()
        placement = solve(instance, "exact")
        seconds = time.process_time() - begin
    assert placement.plan.termination == "optimal"
    return seconds, in_flow, float(instance.activations[placement.local].sum())


def measure(program: Path, instance: Instance, rounds: int = ROUNDS) -> dict[str, float]:
    """Medians of CPU seconds, the two solvers in turn, and the ratios over LEMON's."""
    solve_with_exact(instance)  # compiled code is loaded
    times: dict[str, list[float]] = {"lemon_s": [], "solve_s": [], "flow_s": []}
    for _ in range(rounds):
        lemon_s, most_local = solve_with_lemon(program, instance)
        solve_s, flow_s, local = solve_with_exact(instance)
        if not math.isclose(local, most_local, rel_tol=1e-9):
            raise AssertionError(f"{local} calls are local by exact, {most_local} by LEMON")
        for name, seconds in (("lemon_s", lemon_s), ("solve_s", solve_s), ("flow_s", flow_s)):
            times[name].append(seconds)
    found = {name: median(seconds) for name, seconds in times.items()}
    return found | {
        "solve_over_lemon": found["solve_s"] / found["lemon_s"],
        "flow_over_lemon": found["flow_s"] / found["lemon_s"],
    }


def main() -> None:
    """Print a table of all cases."""
    with tempfile.TemporaryDirectory(prefix="prism-plan-lemon-") as folder:
        program = compile_lemon(Path(folder))
        if program is None:
            sys.exit("needs g++ and LEMON (package liblemon-dev)")
        print("| case | LEMON, ms | flow, ms | solve, ms | flow / LEMON | solve / LEMON |")
        print("|---|---|---|---|---|---|")
        for name, prepare in CASES.items():
            row = measure(program, prepare(Path(folder)))
            ms = " | ".join(f"{1e3 * row[key]:.1f}" for key in ("lemon_s", "flow_s", "solve_s"))
            ratios = f"{row['flow_over_lemon']:.2f} | {row['solve_over_lemon']:.2f}"
            print(f"| {name} | {ms} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
