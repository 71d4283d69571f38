"""The golden cases: calls of the installed command, and the files that each of them writes.

Every case runs in a folder of its own, in which ``in/repo`` is the repository, ``in/golden`` is
``tests/golden/inputs`` and ``in/taken`` holds the objects of our formats that stand inside of
larger committed JSON files. Options that a later commit may give another default (``--solver``,
``--solvers``, ``--route``) are always given.
"""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
INPUTS = Path(__file__).resolve().parent / "inputs"

SOLVERS = (
    "uniform",
    "redundance",
    "smartmoe",
    "eplb",
    "layer-partition",
    "prism",
    "ilp",
    "exact",
)
ALL_SOLVERS = ",".join(SOLVERS)

#: Endings of files that carry data; everything committed is one of these or of the next.
DATA = (
    ".parquet",
    ".json",
    ".jsonl",
    ".toml",
    ".csv",
    ".txt",
    ".npy",
    ".pt",
    ".safetensors",
    ".yaml",
    ".yml",
)
NO_DATA = (
    ".py",
    ".cpp",
    ".typed",
    ".md",
    ".ipynb",
    ".png",
    ".svg",
    ".sh",
    ".gitignore",
    ".pyi",
    ".cff",
)
NO_DATA_NAMES = ("LICENSE", "Makefile", ".ci/run")
#: Data that ``check`` is not for, by who reads it. What it gives is golden by other cases.
OTHER_READERS = {
    "pyproject.toml": "pip",
    ".pre-commit-config.yaml": "pre-commit",
    ".ci/*": "pip and the continuous integration",
    ".github/*": "the continuous integration",
    "prism_plan/**": "the package itself",
    "runtime_adapter/**": "the package itself",
    "traces/tiny-*/*": "profile --format hf and --model",
    "traces/tiny-prompts.jsonl": "profile --prompts",
    "studies/execution.json": "studies.execution --tables",
    "studies/formula.json": "studies.formula",
    "studies/grid.json": "studies.grid --report",
    "studies/small_instances.json": "studies.small_instances --table",
    "studies/latency.json": "studies.latency --tables",
    "studies/lost_server.json": "studies.lost_server --tables",
    "studies/faults.json": "studies.faults --table",
    "studies/soak.json": "studies.faults.soak --table",
    "studies/attack.json": "studies.faults.attack --table",
    "studies/losses.json": "studies.faults.losses --tables",
    "studies/shaped-spans.json": "studies.shaped",
    "studies/shaped-spans-832.json": "studies.testbed.experiment",
    "studies/shaped-spans-a100.json": "studies.shaped shaped-spans-a100",
    "studies/shaped-a100.toml": "studies.testbed.experiment",
    "studies/shaped-a100-832.toml": "studies.testbed.experiment",
    "studies/shaped-spans-a100-832.json": "studies.shaped shaped-spans-a100-832",
    "studies/hops.json": "studies.hops",
    "studies/llamacpp.json": "studies.llamacpp",
    "studies/faults-spans.json": "studies.faults --spans --table",
    "tests/golden/exceptions.toml": "the golden comparison",
    "tests/golden/values/*": "the golden comparison",
    "tests/golden/inputs/configs/*": "profile --model",
    "tests/golden/inputs/recordings/*": "profile",
    "tests/golden/inputs/toy.json": "profile --model",
    "tests/golden/inputs/unequal.json": "profile --model",
    "tests/golden/inputs/arrivals.jsonl": "simulate --arrivals",
}

TINY_V2 = "in/repo/traces/tiny-deepseek-v2.parquet"
TINY_MIXTRAL = "in/repo/traces/tiny-mixtral.parquet"
V2LITE = "in/golden/ours/v2lite.parquet"
TOY = "in/golden/ours/toy.parquet"
UNEQUAL = "in/golden/ours/unequal.parquet"
TINY_CLUSTER = "in/repo/traces/tiny-cluster.toml"
PAPER = "in/repo/traces/paper-v2lite.toml"
SHAPED = "in/repo/studies/shaped-v2lite.toml"
CLUSTERS = "in/golden/clusters"
PLACEMENTS = "in/golden/placements"
RECORDINGS = "in/golden/recordings"

#: Where a back end of the ILP may choose another of equally good plans in another release of it.
CHOICE_OF_BACK_END = ("placement.json:servers*",)


@dataclass(frozen=True)
class Case:
    """A call of ``prism-plan`` and what of its outcome is golden.

    Attributes
    ----------
    name
        ``group/detail``; the recorded values of a group stand in one file.
    arguments
        Of the command.
    files
        What it writes, relative to the folder of the case.
    stdout
        Whether its standard output is JSON that is compared.
    needs_hf
        Whether it needs PyTorch.
    same_machine
        Patterns of places (``file:key.key``) that are compared by ``make same``, where both
        commits run on one machine with one set of libraries, and not recorded.
    long
        Whether it is left to ``make test-long``.

    """

    name: str
    arguments: tuple[str, ...]
    files: tuple[str, ...] = ()
    stdout: bool = False
    needs_hf: bool = False
    same_machine: tuple[str, ...] = ()
    long: bool = False


def _case(name: str, *arguments: str, **more: Any) -> Case:
    """A case; what follows ``-o`` or ``--per-request`` are its files."""
    files = tuple(
        value
        for option, value in itertools.pairwise(arguments)
        if option in ("-o", "--per-request")
    )
    return Case(name, arguments, files, "--json" in arguments and "-" not in files, **more)


def catalogue() -> list[Case]:
    """All cases, in a fixed order."""
    cases = [*_check(), *_profile(), *_solve(), *_compare(), *_simulate(), *_sweep(), *_moves()]
    cases += [*_plot(), *_gpus()]
    names = [case.name for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two cases are called {', '.join(twice)}")
    return cases


# ------------------------------------------------------------------------------------------- files


def committed() -> list[str]:
    """Every committed file, relative to the root."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return sorted(name for name in listed.stdout.split("\0") if name and (ROOT / name).exists())


def is_data(name: str) -> bool:
    """Whether a committed file carries data.

    Raises
    ------
    ValueError
        Its ending is not known: add it to :data:`DATA` or :data:`NO_DATA`.

    """
    if name.endswith(DATA):
        return True
    if name.endswith(NO_DATA) or name in NO_DATA_NAMES:
        return False
    raise ValueError(f"{name}: no ending of DATA or NO_DATA in tests/golden/catalogue.py")


def checked_files() -> list[str]:
    """The committed files that ``check`` is called on."""
    return [
        name
        for name in committed()
        if is_data(name) and not any(fnmatchcase(name, pattern) for pattern in OTHER_READERS)
    ]


def taken() -> dict[str, Any]:
    """Objects of our formats inside of committed JSON files, by a name for each."""
    found: dict[str, Any] = {}

    def search(value: Any, name: str) -> None:
        if isinstance(value, dict):
            form = value.get("format")
            if isinstance(form, str) and form.startswith("prism-plan/"):
                found[f"{name}.json"] = value
                return
            for key, inner in value.items():
                search(inner, f"{name}-{key}")
        elif isinstance(value, list):
            for index, inner in enumerate(value):
                search(inner, f"{name}-{index}")

    for path in checked_files():
        if path.endswith(".json"):
            values = json.loads((ROOT / path).read_text(encoding="utf-8"))
            if "format" not in values:
                search(values, path.removesuffix(".json").replace("/", "-"))
    return found


# ------------------------------------------------------------------------------------------- cases


def _check() -> Iterator[Case]:
    for name in checked_files():
        yield _case(f"check/{name}", "check", f"in/repo/{name}", "--json")
    for name in taken():
        yield _case(f"check/taken/{name}", "check", f"in/taken/{name}", "--json")
    on = {
        "v2": (TINY_CLUSTER, TINY_V2),
        "busy": (f"{CLUSTERS}/busy.toml", TINY_V2),
        "mixtral": (f"{CLUSTERS}/tight.toml", TINY_MIXTRAL),
        "v2lite": (PAPER, V2LITE),
        "unequal": (f"{CLUSTERS}/bytes.toml", UNEQUAL),
    }
    for path in sorted((INPUTS / "placements").iterdir()):
        cluster, trace = on[path.stem.partition("-")[0]]
        words = ("check", f"{PLACEMENTS}/{path.name}", "--json", "--cluster", cluster)
        yield _case(f"check/on-cluster/{path.stem}", *words)
        yield _case(f"check/on-trace/{path.stem}", *words, "--trace", trace)
    wrong = ("check", f"{PLACEMENTS}/v2-exact.json", "--json", "--cluster")
    yield _case("check/on-cluster/too-small", *wrong, f"{CLUSTERS}/tight.toml")
    yield _case("check/on-trace/other-model", *wrong, TINY_CLUSTER, "--trace", TINY_MIXTRAL)


def _profile() -> Iterator[Case]:
    out = ("-o", "trace.parquet")
    for folder in sorted((INPUTS / "configs").iterdir()):
        place = f"in/golden/configs/{folder.name}"
        counts = ("profile", f"{place}/counts.csv", "--format", "counts", "--model")
        # sizes of a bare config.json come from transformers
        words = (*counts, f"{place}/config.json", *out)
        yield _case(f"profile/config/{folder.name}", *words, needs_hf=True)
    tiny = "in/repo/traces/tiny-mixtral/config.json"
    counts = ("profile", "in/golden/configs/mixtral-8x7b/counts.csv", "--format", "counts")
    for preset in ("mixtral-8x7b", "deepseek-v2-lite", "mixtral"):
        yield _case(f"profile/preset/{preset}", *counts, "--model", preset, *out)
    yield _case("profile/config/layers-of-another", *counts, "--model", tiny, *out)
    toy = ("--model", "in/golden/toy.json")
    csv = (f"{RECORDINGS}/counts.csv", "--format", "counts")
    yield _case("profile/counts/toy", "profile", *csv, *toy, *out)
    yield _case("profile/counts/tokens", "profile", *csv, *toy, "--tokens", "law=60", *out)
    unequal = ("--model", "in/golden/unequal.json")
    yield _case("profile/counts/unequal", "profile", *csv, *unequal, *out)
    yield _case("profile/counts/no-model", "profile", *csv, *out)
    esft = (f"{RECORDINGS}/esft/chat", f"statutes={RECORDINGS}/esft/code", "--format", "esft")
    yield _case("profile/esft/toy", "profile", *esft, *toy, *out)
    yield _case("profile/esft/no-weights", "profile", *esft, *toy, "--no-weights", *out)
    yield _case("profile/esft/default-model", "profile", *esft, *out)
    for name in ("vllm.jsonl", "vllm.npy"):
        words = ("profile", f"chat={RECORDINGS}/{name}", "--format", "vllm", *toy, *out)
        yield _case(f"profile/vllm/{name}", *words)
    both = (f"{RECORDINGS}/vllm.jsonl", f"more={RECORDINGS}/vllm.npy", "--format", "vllm")
    yield _case("profile/vllm/both", "profile", *both, *toy, *out)
    for name in ("sglang.jsonl", "sglang-stat.pt", "sglang-pass.pt", "sglang-token.pt"):
        words = ("profile", f"{RECORDINGS}/{name}", "--format", "sglang", *toy, *out)
        yield _case(f"profile/sglang/{name}", *words, needs_hf=name.endswith(".pt"))
    trtllm = ("profile", f"{RECORDINGS}/trtllm", "--format", "trtllm", *toy, *out)
    yield _case("profile/trtllm/toy", *trtllm, needs_hf=True)  # safetensors comes with it
    for name in ("tiny-mixtral", "tiny-deepseek-v2"):
        words = ("profile", f"in/repo/traces/{name}", "--max-new-tokens", "8", "--dtype",
                 "float32", "--weights", "--device", "cpu",
                 "--prompts", "in/repo/traces/tiny-prompts.jsonl", *out)  # fmt: skip
        yield _case(f"profile/hf/{name}", *words, needs_hf=True, same_machine=("*",), long=True)


#: Trace and cluster of each part of ``solve``.
PAIRS = {
    "v2": (TINY_V2, TINY_CLUSTER),
    "v2-double": (TINY_V2, f"{CLUSTERS}/double.toml"),
    "v2-busy": (TINY_V2, f"{CLUSTERS}/busy.toml"),
    "v2-rules": (TINY_V2, f"{CLUSTERS}/rules.toml"),
    "mixtral": (TINY_MIXTRAL, TINY_CLUSTER),
    "mixtral-tight": (TINY_MIXTRAL, f"{CLUSTERS}/tight.toml"),
    "v2lite": (V2LITE, PAPER),
    "v2lite-memory": (V2LITE, f"{CLUSTERS}/memory.toml"),
    "toy": (TOY, f"{CLUSTERS}/toy.toml"),
    "toy-bytes": (TOY, f"{CLUSTERS}/bytes.toml"),
    "unequal": (UNEQUAL, f"{CLUSTERS}/bytes.toml"),
}


def _solve() -> Iterator[Case]:
    def solve(name: str, pair: str, solver: str, *more: str) -> Case:
        trace, cluster = PAIRS[pair]
        fragile = CHOICE_OF_BACK_END if solver == "ilp" else ()
        words = ("solve", trace, "--cluster", cluster, "--solver", solver, *more)
        return _case(f"solve/{name}", *words, "-o", "placement.json", same_machine=fragile)

    for pair in PAIRS:
        for solver in SOLVERS:
            yield solve(f"{pair}/{solver}", pair, solver)
    for seed in ("1", "2", "3"):
        for solver in ("redundance", "prism", "exact"):
            yield solve(f"v2/{solver}-seed-{seed}", "v2", solver, "--seed", seed)
    for pair in ("v2", "mixtral-tight", "v2-rules", "unequal"):
        yield solve(f"{pair}/ilp-cbc", pair, "ilp", "--backend", "cbc")
    for solver in ("exact", "ilp", "prism"):
        two = ("--min-replicas", "2")
        yield solve(f"v2-double/{solver}-twice", "v2-double", solver, *two)
        yield solve(f"v2/{solver}-twice", "v2", solver, *two)
    for old in ("eplb", "prism"):
        for solver in ("exact", "ilp", "uniform"):
            near = ("--from", f"{PLACEMENTS}/v2-{old}.json")
            yield solve(f"v2/{solver}-near-{old}", "v2", solver, *near)
            price = (*near, "--load-price", "0.01")
            yield solve(f"v2/{solver}-near-{old}-price", "v2", solver, *price)
    other = ("--from", f"{PLACEMENTS}/mixtral-exact.json")
    yield solve("v2/exact-near-another-model", "v2", "exact", *other)
    yield solve("v2/unknown", "v2", "exakt")
    yield solve("v2/no-replicas", "v2", "exact", "--min-replicas", "0")
    words = ("solve", TINY_V2, "--cluster", PAPER, "--solver", "exact", "-o", "placement.json")
    yield _case("solve/tasks-of-another-trace", *words)


def _compare() -> Iterator[Case]:
    out = ("-o", "comparison.json")
    for pair, (trace, cluster) in PAIRS.items():
        words = ("compare", trace, "--cluster", cluster, "--solvers")
        yield _case(f"compare/{pair}/all", *words, ALL_SOLVERS, *out)
        if trace in (TINY_V2, TINY_MIXTRAL) and pair != "v2-rules":
            held = ("--holdout", "0.5", "--seed", "3")
            yield _case(f"compare/{pair}/holdout", *words, ALL_SOLVERS, *held, *out)
    counts_only = ("compare", V2LITE, "--cluster", PAPER, "--solvers", "exact")
    yield _case("compare/v2lite/holdout", *counts_only, "--holdout", "0.5", *out)
    existing = [f"{PLACEMENTS}/v2-{solver}.json" for solver in ("eplb", "exact", "layer-partition")]
    words = ("compare", TINY_V2, *existing, "--cluster", TINY_CLUSTER, "--solvers")
    yield _case("compare/v2/existing", *words, "", *out)
    yield _case("compare/v2/existing-and-new", *words, "prism", "--holdout", "0.3", "--json")
    double = ("compare", TINY_V2, "--cluster", f"{CLUSTERS}/double.toml", "--min-replicas", "2")
    yield _case("compare/v2-double/twice", *double, "--solvers", "exact,ilp,prism", *out)


def _simulate() -> Iterator[Case]:
    out = ("-o", "report.json")
    cover = ("--route", "cover")

    def simulate(name: str, trace: str, cluster: str, *more: str, long: bool = False) -> Case:
        words = ("simulate", "--trace", trace, "--cluster", cluster, *more)
        return _case(f"simulate/{name}", *words, long=long)

    def v2(name: str, *more: str, cluster: str = TINY_CLUSTER) -> Case:
        return simulate(f"v2/{name}", TINY_V2, cluster, *more, *out)

    solvers = ("--solvers", ",".join(name for name in SOLVERS if name != "ilp"))
    few = ("--requests", "12")
    for name, (trace, cluster) in {
        "v2": PAIRS["v2"],
        "mixtral-tight": PAIRS["mixtral-tight"],
        "v2lite": PAIRS["v2lite"],
        "v2lite-shaped": (V2LITE, SHAPED),
    }.items():
        words = (*solvers, "--offload", *few, *cover, *out)
        yield simulate(f"{name}/all", trace, cluster, *words, long=trace == V2LITE)
    table = ("--per-request", "requests.parquet")
    held = ("--solvers", "eplb,prism,exact", "--holdout", "0.5", "--requests", "40")
    yield v2("holdout", *held, *cover, *table)
    yield simulate("toy/all", TOY, f"{CLUSTERS}/toy.toml", *solvers, *few, *cover, *out)
    yield simulate(
        "unequal/ilp", UNEQUAL, f"{CLUSTERS}/bytes.toml", f"{PLACEMENTS}/unequal-ilp.json",
        *few, *cover, *out,
    )  # fmt: skip
    busy = f"{CLUSTERS}/busy.toml"
    three = ("--solvers", "redundance,eplb,exact")
    for route in ("cover", "nearest", "spread"):
        many = ("--requests", "60", "--route", route)
        yield v2(f"busy-{route}", *three, *many, *table, cluster=busy)
        double = f"{CLUSTERS}/double.toml"
        yield v2(f"double-{route}", *three, *few, "--route", route, cluster=double)
    yield v2("busy-offload", "--offload", "--requests", "40", *cover, cluster=busy)
    reference = ("--engine", "reference", "--requests", "4", *cover)
    yield v2("reference", *three, "--offload", *reference)
    yield v2("reference-busy", *three, *reference, cluster=busy)
    old = f"{PLACEMENTS}/v2-eplb.json"
    other = f"{PLACEMENTS}/v2-exact.json"
    phases = ("--phases", "in/golden/phases.toml", *cover)
    yield v2("phases", old, other, "--requests", "30", *phases)
    for policy in ("never", "prism", "partial"):
        moving = ("--requests", "30", *phases, "--migrate", policy, "--migrate-every", "40")
        yield v2(f"migrate-{policy}", old, *moving, *table)
        cumulative = ("--statistics", "cumulative", "--migration-cost", "max")
        yield v2(f"migrate-{policy}-cumulative", old, *moving, *cumulative)
    window = ("--migrate", "prism", "--migrate-every", "50", "--half-life", "20")
    window += ("--horizon", "500", "--migrate-solver", "exact")
    yield v2("migrate-window", old, "--requests", "30", *phases, *window)
    hurried = ("--requests", "60", *cover, "--migrate", "partial", "--migrate-every", "0.5")
    yield v2("migrate-busy", f"{PLACEMENTS}/busy-eplb.json", *hurried, cluster=busy)
    yield v2("migrate-from-solver", "--solvers", "uniform", *hurried, cluster=busy)
    shift = ("--phases", "in/repo/studies/shift.toml", "--requests", "210", *cover)
    exact = f"{PLACEMENTS}/v2lite-exact.json"
    partial = ("--migrate", "partial", "--migrate-every", "500")
    yield simulate("v2lite/shift", V2LITE, PAPER, exact, *shift, *partial, *out, long=True)
    arrivals = ("--arrivals", "in/golden/arrivals.jsonl", *cover)
    yield v2("arrivals", old, other, *arrivals, *table)
    yield v2("duration", old, "--duration", "200", *cover, *table)
    yield v2("burst", old, "--burst", "4", *few, *cover, *table)
    yield v2("decode-tokens", old, "--decode-tokens", "3", *few, *cover)
    yield v2("seed", old, "--seed", "7", *few, *cover, "--json")
    drawn = ("--prompt-tokens", "40", "--decode-tokens", "10", *few, *cover)
    yield simulate("v2lite/prompt-tokens", V2LITE, PAPER, exact, *drawn, *out)
    for name in taken():
        if "calibrations" in name:
            times = ("--calibration", f"in/taken/{name}", *few, *cover)
            yield simulate(f"v2lite/{name}", V2LITE, SHAPED, exact, *times, *out, long=True)
    yield v2("nothing", *few)
    yield v2("another-model", f"{PLACEMENTS}/mixtral-exact.json", *few)
    yield v2("duration-and-requests", old, *few, "--duration", "10")


def _sweep() -> Iterator[Case]:
    def sweep(name: str, trace: str, cluster: str, output: str, *more: str) -> Case:
        words = ("simulate", "--trace", trace, "--cluster", cluster, "--route", "cover", *more)
        few = ("--requests", "5", "--jobs", "1")
        return _case(f"sweep/{name}", *words, *few, "-o", output, long=trace == V2LITE)

    v2 = (TINY_V2, TINY_CLUSTER)
    grid = ("--sweep", "bandwidth_mbps=100,1000", "--sweep", "solver=eplb,layer-partition,exact")
    yield sweep("v2/parquet", *v2, "sweep.parquet", *grid)
    yield sweep("v2/solver-twice", *v2, "sweep.parquet", *grid, "--offload")
    solvers = ("--sweep", "bandwidth_mbps=500", "--solvers", "uniform,exact", "--offload")
    yield sweep("v2/offload", *v2, "sweep.csv", *solvers)
    yield sweep("v2/csv", *v2, "sweep.csv", *grid, "--sweep", "seed=1,2")
    more = ("--sweep", "gpus=4,8", "--sweep", "arrival_interval_s=2,8", "--solvers", "prism")
    yield sweep("v2lite/gpus", V2LITE, PAPER, "sweep.csv", *more)
    memory = ("--sweep", "memory_fraction=0.1,0.3,0.5", "--solvers", "exact")
    yield sweep("v2lite/memory", V2LITE, PAPER, "sweep.parquet", *memory)
    held = ("--sweep", "bandwidth_mbps=300", "--solvers", "prism", "--holdout", "0.4")
    yield sweep("mixtral/holdout", TINY_MIXTRAL, f"{CLUSTERS}/tight.toml", "sweep.csv", *held)


def _moves() -> Iterator[Case]:
    pairs = [
        ("v2-eplb", "v2-exact", TINY_CLUSTER),
        ("v2-exact", "v2-eplb", TINY_CLUSTER),
        ("v2-prism", "v2-layer-partition", TINY_CLUSTER),
        ("v2-exact", "v2-exact", TINY_CLUSTER),
        ("mixtral-uniform", "mixtral-exact", f"{CLUSTERS}/tight.toml"),
        ("v2lite-smartmoe", "v2lite-exact", PAPER),
        ("v2-exact", "mixtral-exact", TINY_CLUSTER),
    ]
    for a, b, cluster in pairs:
        files = (f"{PLACEMENTS}/{a}.json", f"{PLACEMENTS}/{b}.json")
        yield _case(f"diff/{a}/{b}", "diff", *files, "--json")
        words = ("migrate", *files, "--cluster", cluster, "-o", "migration.json")
        yield _case(f"migrate/{a}/{b}", *words)


def _plot() -> Iterator[Case]:
    drawn = {
        "heatmap": TINY_V2,
        "entropy": TINY_MIXTRAL,
        "placement": f"{PLACEMENTS}/v2-exact.json",
        "comparison": "in/golden/ours/comparison.json",
        "cdf": "in/golden/ours/simulation.json",
        "timeline": "in/golden/ours/simulation.json",
        "layer-latency": "in/golden/ours/simulation.json",
        "latency": "in/golden/ours/simulation.json",
        "sweep": "in/golden/ours/sweep.csv",
    }
    for kind, file in drawn.items():
        yield _case(f"plot/{kind}", "plot", kind, file, "-o", "figure.png", long=True)
    yield _case("plot/wrong-kind", "plot", "cdf", "in/golden/ours/sweep.csv", "-o", "figure.png")


def _gpus() -> Iterator[Case]:
    yield _case("gpus/all", "gpus", "--json")
    yield _case("gpus/rtx-4090", "gpus", "rtx-4090", "--json")
    yield _case("gpus/wrong-name", "gpus", "rtx4090", "--json")
