"""The benchmark registry: each case is frozen by name, sizes and seed.

A case prepares its input, then `run` is what is timed; it returns figures that prove that a faster
run did the same work (objective, augmentations, rows).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prism_plan.cluster import Cluster, Gpu, Link, Server
from prism_plan.evaluate.comparison import compare
from prism_plan.instance import Instance
from prism_plan.io.cluster import parse_cluster
from prism_plan.io.trace_reader import read_trace
from prism_plan.io.trace_schema import BATCH_ROWS
from prism_plan.io.trace_writer import TraceWriter, write_trace
from prism_plan.model_spec import PRESETS, ModelShape, ModelSpec
from prism_plan.profiling.esft import read_esft
from prism_plan.profiling.sources import Source
from prism_plan.simulate.sampling import sample_requests
from prism_plan.solvers import Options, solve
from prism_plan.trace import TokenBatch, Trace
from tests.benchmarks.simulations import (
    ReferenceEngine,
    paper_cluster,
    scenario,
    simulated,
    simulated_by_simpy,
    twins,
)
from tests.profiling.synthetic import synthetic_trace

ROOT = Path(__file__).resolve().parent.parent.parent
ESFT_TASKS = ("intent", "law", "summary", "translation")
SCRIPT = Path(sys.executable).parent / "prism-plan"


@dataclass(frozen=True)
class Case:
    """A frozen measurement: `prepare` makes the input, `run` is timed, `limit_s` is promised.

    ``events_per_s`` is promised of simulations, in the outcome's figure of that name.
    """

    name: str
    prepare: Callable[[Path], Any]
    run: Callable[[Any], dict[str, Any]]
    limit_s: float | None = None
    limit_mib: float | None = None
    repeats: int = 5
    events_per_s: int | None = None
    small: bool = False


def traces_dir() -> Path:
    """The folder of real routing data."""
    return Path(os.environ.get("PRISM_TRACES", ROOT.parent / "shared" / "traces"))


def v2_trace() -> Trace:
    """The real V2-Lite trace, four tasks."""
    scores = traces_dir() / "deepseek-v2-lite-esft" / "expert_scores"
    return read_esft([Source(scores / task) for task in ESFT_TASKS], PRESETS["deepseek-v2-lite"])


def small_trace() -> Trace:
    """A synthetic trace of two tasks, small enough for a test."""
    model = ModelSpec(
        name="small", moe_layers=(0, 1), num_experts=8, top_k=2, hidden_size=64, dtype_bytes=2,
        expert_bytes=2_000_000_000, dense_bytes=1_000_000_000, kv_bytes_per_token=0,
    )  # fmt: skip
    return synthetic_trace(model, ["x", "y"], requests=3, prompt_tokens=6, decode_tokens=4)


def v2_three(folder: Path) -> Instance:
    """V2-Lite, intent, law and translation on the paper's three servers."""
    cluster = parse_cluster((ROOT / "traces" / "paper-v2lite.toml").read_text())
    return Instance.build(v2_trace(), cluster)


def v2_many(servers: int, slots: int) -> Callable[[Path], Instance]:
    """V2-Lite, the four tasks in turn on so many servers: 16 of 64 servers are alike."""

    def prepare(folder: Path) -> Instance:
        trace = v2_trace()
        activations = trace.calls_per_token()[np.arange(servers) % len(trace.tasks)]
        names = tuple(f"s{n}" for n in range(servers))
        return Instance(trace.model.shape(), names, activations, ((slots,),) * servers)

    return prepare


def gamma(
    layers: int, experts: int, top_k: int, servers: int, slots: int, tasks: int, seed: int = 0
) -> Callable[[Path], Instance]:
    """Activations drawn per task from a gamma distribution (shape ½), tasks dealt to servers."""

    def prepare(folder: Path) -> Instance:
        rng = np.random.default_rng(seed)
        f = rng.gamma(0.5, size=(tasks, layers, experts))
        f *= top_k / f.sum(axis=2, keepdims=True)
        model = ModelShape("gamma", tuple(range(layers)), experts, top_k, 1)
        names = tuple(f"s{n}" for n in range(servers))
        return Instance(model, names, f[np.arange(servers) % tasks], ((slots,),) * servers)

    return prepare


def many_unequal(servers: int, layers: int, slots: int) -> Callable[[Path], Instance]:
    """Prepare a cluster of unequal servers at V3's experts, with links, and a drawn trace."""

    def prepare(folder: Path) -> Instance:
        rng = np.random.default_rng(0)
        model = replace(PRESETS["deepseek-v3"], moe_layers=tuple(range(layers)))
        trace = synthetic_trace(model, ["x", "y"], requests=4, prompt_tokens=20, decode_tokens=8)
        made = tuple(
            Server(
                f"s{n}",
                (
                    Gpu(
                        slots=int(slots * rng.uniform(0.7, 1.3)),
                        memory_bandwidth_gbs=float(rng.uniform(500, 1500)),
                    ),
                ),
                tasks={"xy"[n % 2]: 1.0},
                arrival_interval_s=100.0,
            )
            for n in range(servers)
        )
        return Instance.build(trace, Cluster("unequal", made, Link(bandwidth_mbps=500.0)))

    return prepare


def paper_problem(folder: Path) -> Instance:
    """Prepare the paper's testbed with half of its requests."""
    traces = Path(os.environ.get("PRISM_TRACES", ROOT.parent / "shared" / "traces"))
    scores = traces / "deepseek-v2-lite-esft" / "expert_scores"
    sources = [Source(scores / task) for task in ESFT_TASKS]
    trace = read_esft(sources, PRESETS["deepseek-v2-lite"])
    return Instance.build(trace.split(0.5, 0)[0], paper_cluster(trace))


def planned(solver: str) -> Callable[[Instance], dict[str, Any]]:
    """Run a solver that plans where layers execute."""

    def run(instance: Instance) -> dict[str, Any]:
        return {"expected_latency_s": solve(instance, solver).plan.extra["expected_latency_s"]}

    return run


def solved(solver: str, **options: Any) -> Callable[[Instance], dict[str, Any]]:
    """Run a solver, model building counted, and tell what came out."""

    def run(instance: Instance) -> dict[str, Any]:
        plan = solve(instance, solver, Options(**options)).plan
        work = {key: plan.extra[key] for key in ("augmentations", "expanded") if key in plan.extra}
        return {
            "remote_share": plan.remote_share,
            "termination": plan.termination,
            "runtime_s": plan.runtime_s,
            **work,
        }

    return run


def large_trace(
    tokens: int, *, weights: bool = False, model_name: str = "deepseek-v2-lite"
) -> Callable[[Path], Path]:
    """A token-level trace of a model's shape: 20,000 drawn tokens, shuffled again and again."""

    def prepare(folder: Path) -> Path:
        path = folder / f"large-{tokens}.parquet"
        model: ModelSpec = PRESETS[model_name]
        rng = np.random.default_rng(0)
        drawn = 20_000
        popularity = rng.normal(0, 0.8, (model.num_layers, model.num_experts))
        base = np.empty((drawn, model.num_layers, model.top_k), np.uint16)
        for layer in range(model.num_layers):
            noisy = popularity[layer] + rng.gumbel(size=(drawn, model.num_experts))
            base[:, layer] = np.argpartition(-noisy, model.top_k, axis=1)[:, : model.top_k]
        with TraceWriter(path, model, weights=weights) as writer:
            for start in range(0, tokens, drawn):
                rows = np.arange(start, min(start + drawn, tokens))
                chosen = rng.permutation(drawn)[: len(rows)]
                gates = rng.random((len(rows), model.num_layers, model.top_k))
                writer.write(
                    TokenBatch(
                        request=(rows // 500).astype(np.int32),
                        position=(rows % 500).astype(np.int32),
                        phase=np.full(len(rows), 2, np.int8),
                        task=(rows // 500 % 3).astype(np.int32),
                        experts=base[chosen],
                        weights=gates.astype(np.float16) if weights else None,
                    ),
                    ("a", "b", "c"),
                )
        return path

    return prepare


def counted(path: Path) -> dict[str, Any]:
    """Read, check and count a trace."""
    trace = read_trace(path)
    calls = int(trace.counts.sum())
    return {"calls": calls, "bytes_a_selection": round(path.stat().st_size / calls, 4)}


def decoded(path: Path) -> dict[str, Any]:
    """Decode a trace by pyarrow alone, which reading it is compared with."""
    import pyarrow.parquet as pq

    rows = 0
    with pq.ParquetFile(path, read_dictionary=["phase", "task"]) as parquet:
        for batch in parquet.iter_batches(BATCH_ROWS):
            rows += len(batch)
    return {"tokens": rows}


def paper_cluster_of_drawn_tasks() -> Cluster:
    """The paper's three servers, which serve the tasks of :func:`large_trace`."""
    text = (ROOT / "traces" / "paper-v2lite.toml").read_text()
    for old, new in (("intent", "a"), ("law", "b"), ("translation", "c")):
        text = text.replace(f"{{ {old} =", f"{{ {new} =")
    return parse_cluster(text)


def compared(path: Path) -> dict[str, Any]:
    """Read a trace and score solvers that plan in no time, as `compare` does."""
    trace = read_trace(path, keep_tokens=True)
    names = ["uniform", "redundance", "smartmoe", "eplb", "layer-partition"]
    cluster = paper_cluster_of_drawn_tasks()
    servers = tuple(replace(server, arrival_interval_s=None) for server in cluster.servers)
    # without arrivals nothing is simulated, as in older versions
    result = compare(trace, replace(cluster, servers=servers), solvers=names)
    return {row.name: row.steps.waiting_share for row in result.rows if row.steps}


def read_and_sampled(path: Path) -> dict[str, Any]:
    """Read a trace and sample requests on half of it, as `simulate` does before it simulates."""
    trace = read_trace(path, keep_tokens=True)
    _, scored = trace.split(0.5, 0)
    requests = sample_requests(scored, paper_cluster_of_drawn_tasks())
    return {"requests": len(requests), "tokens": len(requests.prompts.experts)}


def solve_files(folder: Path) -> tuple[Path, Path]:
    """The real V2-Lite trace as a file."""
    path = folder / "v2.parquet"
    write_trace(path, v2_trace())
    return path, folder / "p.json"


def command(*arguments: object, compiled: bool = True) -> dict[str, Any]:
    """Run the installed command as a whole process; else with nothing compiled before."""
    command = [str(SCRIPT), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as empty:
        environment = os.environ if compiled else {**os.environ, "NUMBA_CACHE_DIR": empty}
        result = subprocess.run(command, capture_output=True, check=True, env=environment)
    return {"stdout_bytes": len(result.stdout)}


def solve_command(compiled: bool) -> Callable[[tuple[Path, Path]], dict[str, Any]]:
    """`prism-plan solve` with its default solver on the real trace."""

    def run(files: tuple[Path, Path]) -> dict[str, Any]:
        trace, output = files
        cluster = ROOT / "traces" / "paper-v2lite.toml"
        return command("solve", trace, "--cluster", cluster, "-o", output, compiled=compiled)

    return run


def simulate_command(compiled: bool) -> Callable[[tuple[Path, Path]], dict[str, Any]]:
    """`prism-plan simulate` of an exact plan and two requests a server of the real trace."""

    def run(files: tuple[Path, Path]) -> dict[str, Any]:
        trace, _ = files
        cluster = ROOT / "traces" / "paper-v2lite.toml"
        given = ("--trace", trace, "--cluster", cluster, "--solvers", "exact", "--requests", 2)
        return command("simulate", *given, compiled=compiled)

    return run


CASES = [
    Case("exact, V2-Lite, 3 servers", v2_three, solved("exact"), 0.1),
    Case("ilp HiGHS, V2-Lite, 3 servers", v2_three, solved("ilp", backend="highs")),
    Case("ilp CBC, V2-Lite, 3 servers", v2_three, solved("ilp", backend="cbc")),
    Case("exact, V2-Lite, 64 servers x 80", v2_many(64, 80), solved("exact"), 0.3),
    Case(
        "ilp CBC, V2-Lite, 64 servers x 80",
        v2_many(64, 80),
        solved("ilp", backend="cbc"),
        repeats=2,
    ),
    Case("exact, V2-Lite, 128 servers x 80", v2_many(128, 80), solved("exact")),
    Case("exact, V2-Lite, 256 servers x 80", v2_many(256, 80), solved("exact")),
    Case(
        "exact, V3 size, 64 servers x 300, each its own task",
        gamma(58, 256, 8, 64, 300, 64),
        solved("exact"),
        2.0,
        1024,
    ),
    Case(
        "exact, V3 size, 64 servers x 300, 4 tasks",
        gamma(58, 256, 8, 64, 300, 4),
        solved("exact"),
        2.0,
        1024,
    ),
    Case(
        "exact, V3 size, 128 servers x 300, 4 tasks",
        gamma(58, 256, 8, 128, 300, 4),
        solved("exact"),
        repeats=3,
    ),
    Case(
        "exact, V3 size, 256 servers x 300, 4 tasks",
        gamma(58, 256, 8, 256, 300, 4),
        solved("exact"),
        repeats=3,
    ),
    Case(
        "exact, V3 size, 256 servers x 60, each its own task",
        gamma(58, 256, 8, 256, 60, 256),
        solved("exact"),
        repeats=3,
    ),
    Case(
        "paths, V3 size, 64 servers",
        many_unequal(64, 58, 1536),
        planned("layer-partition+paths"),
        2.0,
        repeats=3,
    ),
    Case(
        "pipeline, V3 size, 64 servers",
        many_unequal(64, 58, 1536),
        planned("pipeline"),
        repeats=3,
    ),
    Case("latency, V2-Lite, 3 servers", paper_problem, planned("latency"), 5.0, repeats=3),
    Case(
        "latency, V3 size, 64 servers",
        many_unequal(64, 58, 1536),
        planned("latency"),
        300.0,
        4096,
        repeats=1,
    ),
    Case("count 1,000,000 tokens x 26 x 6", large_trace(1_000_000), counted, 5.0, 1024, repeats=3),
    Case(
        "count 1,000,000 tokens x 26 x 6 with weights",
        large_trace(1_000_000, weights=True),
        counted,
        repeats=3,
    ),
    Case("decode 1,000,000 tokens x 26 x 6", large_trace(1_000_000), decoded, repeats=3),
    Case("compare, 1,000,000 tokens", large_trace(1_000_000), compared, repeats=3),
    Case("read and sample, 1,000,000 tokens", large_trace(1_000_000), read_and_sampled, repeats=3),
    Case("count 10,000,000 tokens x 26 x 6", large_trace(10_000_000), counted, repeats=2),
    Case(
        "count 300,000 tokens x 58 x 256, top-8",
        large_trace(300_000, model_name="deepseek-v3"),
        counted,
        repeats=3,
    ),
    Case(
        "simulate, V2-Lite, 3 servers, exact",
        scenario(v2_trace, paper_cluster, 100),
        simulated(),
        events_per_s=1_000_000,
    ),
    Case(
        "simulate, V2-Lite, 3 servers, layer-partition",
        scenario(v2_trace, paper_cluster, 100, solver="layer-partition"),
        simulated(),
        events_per_s=1_000_000,
    ),
    Case(
        "simulate, V2-Lite, 3 servers, eplb",
        scenario(v2_trace, paper_cluster, 100, solver="eplb"),
        simulated(),
        events_per_s=1_000_000,
    ),
    Case(
        "simulate, V2-Lite, 3 servers, layers executed where they are",
        scenario(v2_trace, paper_cluster, 100, solver="layer-partition", where_held=True),
        simulated(),
        events_per_s=1_000_000,
    ),
    Case(
        "simulate, V2-Lite, 3 servers, offload",
        scenario(v2_trace, paper_cluster, 100, solver="offload"),
        simulated(),
    ),
    *(
        Case(
            f"simulate, V2-Lite, {2 * servers} GPUs in {servers} servers",
            scenario(v2_trace, lambda trace, n=servers: twins(trace, n), 20),
            simulated(),
            limit_s=60.0 if servers == 128 else None,
            limit_mib=2048 if servers == 128 else None,
            events_per_s=1_000_000,
            repeats=3,
        )
        for servers in (8, 12, 32, 48, 128)
    ),
    Case(
        "simulate, V2-Lite, 64 GPUs in 32 servers, 8 decode tokens",
        scenario(v2_trace, lambda trace: twins(trace, 32), 20, decode_tokens=8),
        simulated(),
        repeats=3,
    ),
    Case(
        "simulate, V2-Lite, 3 servers, 2 requests, compiled",
        scenario(v2_trace, paper_cluster, 2),
        simulated(),
    ),
    Case(
        "simulate, V2-Lite, 3 servers, 2 requests, reference",
        scenario(v2_trace, paper_cluster, 2),
        simulated(ReferenceEngine),
        repeats=3,
    ),
    Case(
        "simulate, V2-Lite, 3 servers, 2 requests, SimPy",
        scenario(v2_trace, paper_cluster, 2),
        simulated_by_simpy,
        repeats=3,
    ),
    Case("prism-plan --help", lambda folder: None, lambda _: command("--help"), 0.4),
    Case("prism-plan solve, V2-Lite", solve_files, solve_command(True), 8.0),
    Case("prism-plan simulate, V2-Lite", solve_files, simulate_command(True), 3.0),
    Case("first solve, nothing compiled", solve_files, solve_command(False), repeats=3),
    Case("first simulate, nothing compiled", solve_files, simulate_command(False), repeats=3),
    Case("small: exact", gamma(4, 16, 2, 8, 12, 8), solved("exact"), small=True),
    Case("small: ilp", gamma(4, 16, 2, 8, 12, 8), solved("ilp"), small=True),
    Case(
        "small: simulate",
        scenario(small_trace, lambda trace: twins(trace, 3), 3, solver="prism"),
        simulated(),
        small=True,
    ),
    Case(
        "small: simulate by SimPy",
        scenario(small_trace, lambda trace: twins(trace, 3), 3, solver="prism"),
        simulated_by_simpy,
        small=True,
    ),
    Case("small: count 5,000 tokens", large_trace(5_000), counted, small=True),
    Case("small: decode 5,000 tokens", large_trace(5_000), decoded, small=True),
    Case("small: compare, 5,000 tokens", large_trace(5_000), compared, small=True),
    Case("small: read and sample, 5,000 tokens", large_trace(5_000), read_and_sampled, small=True),
]


def folder() -> tempfile.TemporaryDirectory[str]:
    """A place for prepared files."""
    return tempfile.TemporaryDirectory(prefix="prism-plan-bench-")
