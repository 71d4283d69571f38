"""`check` of clusters: users, what no solver can plan for, the memory of every GPU."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prism_plan.check.cluster import _smallest_model, require_feasible_placement, require_plannable
from prism_plan.check.memory_report import (
    gpu_memory,
    insufficient_kv_memory,
    memory_shortages,
    missing_kv_reservation,
)
from prism_plan.cluster import Cluster, Gpu, Server
from prism_plan.errors import Infeasible, InputError, PrismError
from prism_plan.instance import Instance
from prism_plan.instance_feasibility import first_fit
from prism_plan.io.cluster import parse_cluster
from prism_plan.io.placement import read_placement, write_placement
from prism_plan.io.simulation import read_simulation
from prism_plan.io.trace_writer import write_trace
from prism_plan.model_spec import ModelSpec
from prism_plan.placement import Placement, SolveReport
from prism_plan.placement_check import violations
from prism_plan.solvers import solve
from prism_plan.token_rates import require_users
from prism_plan.trace import Trace
from tests.evaluate.simulation_material import invoke
from tests.profiling.synthetic import synthetic_trace

Run = Callable[..., CompletedProcess[str]]
SPEC = ModelSpec(
    name="tiny",
    moe_layers=(1, 2),
    num_experts=3,
    top_k=2,
    hidden_size=8,
    dtype_bytes=2,
    expert_bytes=100,
    dense_bytes=250,
    kv_bytes_per_token=10,
)
UNEQUAL = dataclasses.replace(SPEC, expert_bytes=(100, 150))
TRACES = {
    spec.expert_bytes: synthetic_trace(spec, ["x", "y"], requests=3) for spec in (SPEC, UNEQUAL)
}
#: Room for 7 and 2 + 3 of the model's 6 experts, and 50 bytes beside the first server's.
CLUSTER = """\
name = "small"
[[server]]
name = "a"
arrival_interval_s = 10.0
tasks = { x = 1.0 }
[[server.gpu]]
memory_gb = 1e-6
[[server]]
name = "b"
arrival_interval_s = 10.0
tasks = { y = 1.0 }
kv_tokens = 20
[[server.gpu]]
memory_gb = 0.7e-6
reserve_gb = 0.05e-6
[[server.gpu]]
slots = 3
"""


def without_tasks(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if "tasks" not in line)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a trace, a model spec, a cluster and a placement for it."""
    trace = TRACES[SPEC.expert_bytes]
    write_trace(tmp_path / "t.parquet", trace)
    (tmp_path / "m.json").write_text(json.dumps(SPEC.to_json()))
    (tmp_path / "c.toml").write_text(CLUSTER)
    instance = Instance.build(trace, parse_cluster(CLUSTER))
    write_placement(tmp_path / "p.json", solve(instance, "exact"))
    return tmp_path


# ------------------------------------------------------------------------------ clusters and users

COMMANDS: dict[str, tuple[str, ...]] = {
    "check": ("check", "c.toml"),
    "check with a trace": ("check", "c.toml", "--trace", "t.parquet"),
    "check with a model": ("check", "c.toml", "--model", "m.json"),
    "check of a placement": ("check", "p.json", "--cluster", "c.toml"),
    "solve": ("solve", "t.parquet", "--cluster", "c.toml", "--solver", "exact", "-o", "q.json"),
    "compare": ("compare", "t.parquet", "--cluster", "c.toml"),
    "simulate": ("simulate", "p.json", "--trace", "t.parquet", "--cluster", "c.toml"),
    "simulate solvers": ("simulate", "--solvers", "exact", "--trace", "t.parquet", "--cluster",
                         "c.toml"),
    "sweep": ("simulate", "--sweep", "solver=exact", "--trace", "t.parquet", "--cluster", "c.toml",
              "-o", "s.csv"),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_cluster_without_users_is_refused(prism_plan: Run, here: Path, command: str) -> None:
    """No server with tasks: exit 2 and one line that names the file; nothing is written."""
    (here / "c.toml").write_text(without_tasks(CLUSTER))
    before = sorted(here.iterdir())
    if " " in command:
        result = invoke(here, *COMMANDS[command])
    else:
        result = prism_plan(*COMMANDS[command], cwd=here)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("prism-plan: c.toml: server: no server has tasks, so ")
    assert len(result.stderr.splitlines()) == 1
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "simulate"])
def test_weights_of_zero_are_no_users(here: Path, command: str) -> None:
    """Weight 0 at every server with tasks: no plan is better than another, so exit 2."""
    (here / "c.toml").write_text(CLUSTER.replace("arrival", "weight = 0.0\narrival"))
    result = invoke(here, *COMMANDS[command])
    assert result.returncode == 2
    assert "c.toml: server[0].weight: 0, as of every server with tasks" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_rate_is_missing(here: Path) -> None:
    """Tasks without a rate and without a weight are refused by `check` as by `solve`."""
    (here / "c.toml").write_text(CLUSTER.replace("arrival_interval_s = 10.0", "", 1))
    for command in ("check", "solve", "compare"):
        result = invoke(here, *COMMANDS[command])
        assert result.returncode == 2
        assert "c.toml: server[0]: server 'a' has tasks but no arrival rate" in result.stderr


def test_single_servers_may_be_without_users(here: Path) -> None:
    """One server of two without tasks is legal in every command."""
    text = CLUSTER.replace("tasks = { y = 1.0 }\n", "")
    (here / "c.toml").write_text(text)
    for command, arguments in COMMANDS.items():
        result = invoke(here, *arguments)
        assert result.returncode == 0, (command, result.stderr)


def test_moving_experts_needs_no_users(here: Path) -> None:
    """`migrate` asks what a cluster can load, not who uses it."""
    (here / "c.toml").write_text(without_tasks(CLUSTER))
    result = invoke(here, "migrate", "p.json", "p.json", "--cluster", "c.toml")
    assert result.returncode == 0, result.stderr


def test_arrivals_may_bring_the_users(here: Path) -> None:
    """A file of arrivals that names tasks says who asks: no tasks of the cluster are needed."""
    (here / "c.toml").write_text(without_tasks(CLUSTER))
    (here / "a.jsonl").write_text('{"server": "a", "at_s": 0.5, "task": "x"}\n')
    result = invoke(here, *COMMANDS["simulate"], "--arrivals", "a.jsonl", "-o", "s.json")
    assert result.returncode == 0, result.stderr
    assert read_simulation(here / "s.json")["runs"][0]["requests"] == 1


ASKS = {"tasks": {"x": 1.0}}


@pytest.mark.parametrize(
    ("users", "refused"),
    [
        ([{}], "no server has tasks"),
        ([{"tasks": {"x": 0.0}, "weight": 1.0}], "no server has tasks"),
        ([{}, ASKS | {"weight": 0.0}], "0, as of every server"),
        ([ASKS], "no arrival rate"),
        ([ASKS | {"weight": 0.0}, ASKS | {"weight": 0.5}], ""),
        ([ASKS | {"weight": 0.0}, ASKS | {"arrival_interval_s": 1.0}], ""),
        ([{}, ASKS | {"arrival_interval_s": 1.0}], ""),
    ],
)  # fmt: skip
def test_the_rule(users: list[dict[str, Any]], refused: str) -> None:
    """Some server has a task of a share above 0 and asks at a rate above 0."""
    servers = [Server(f"s{n}", (Gpu(slots=1),), **of_one) for n, of_one in enumerate(users)]
    cluster = Cluster("c", tuple(servers))
    if refused:
        with pytest.raises(InputError, match=refused):
            require_users(cluster)
    else:
        require_users(cluster)


def test_tasks_that_call_nothing() -> None:
    """Tokens without calls, which a counts-only trace can state, leave nothing to plan."""
    trace = Trace(SPEC, ("x",), np.zeros((1, 2, 3), np.int64), np.array([5]))
    cluster = Cluster("c", (Server("a", (Gpu(slots=9),), {"x": 1.0}, weight=1.0),))
    with pytest.raises(InputError, match="call no expert in the trace"):
        Instance.build(trace, cluster)


# ------------------------------------------------------------- what no solver can plan for, alone


@pytest.mark.parametrize(
    ("old", "new", "code", "words"),
    [
        ("memory_gb = 1e-6", "slots = 0\n[[server.gpu]]\nslots = 0", 0, ()),
        ("memory_gb = 1e-6", "memory_gb = 1e-6\nreserve_gb = 2e-6", 3, ("its reserve of 2,000",)),
        ("memory_gb = 1e-6", "slots = 1", 0, ()),
        ('name = "a"', 'name = "a"\npin = [[1, 0], [1, 1]]\nlayer_cap = 1', 3, ("layer_cap 1",)),
        ('name = "a"', 'name = "a"\npin = [[1, 70000]]', 2, ("server[0].pin: expert 70000",)),
        ('name = "a"', 'name = "a"\nforbid = [[2147483648, 0]]', 2, ("server[0].forbid: layer",)),
    ],
    ids=["one server empty", "reserve", "few slots", "pins over cap", "expert", "layer"],
)
def test_cluster_alone(here: Path, old: str, new: str, code: int, words: tuple[str, ...]) -> None:
    """What `solve` refuses whatever the trace is, `check` refuses without one."""
    (here / "c.toml").write_text(CLUSTER.replace(old, new))
    result = invoke(here, "check", "c.toml")
    assert result.returncode == code, result.stderr
    for word in words:
        assert word in result.stderr
    if code:
        assert result.stderr.startswith("prism-plan: c.toml: ")


@pytest.mark.parametrize(
    ("servers", "words"),
    [
        (("slots = 0", "slots = 0"), "coverage"),
        (("slots = 1", "slots = 2"), "layer 1 expert 0, layer 1 expert 1"),
    ],
    ids=["no slots", "fewer slots than the rules name"],
)
def test_too_few_slots_for_any_model(
    prism_plan: Run, here: Path, servers: tuple[str, str], words: str
) -> None:
    """Slots that fall short of the layers and experts that rules name fall short of any model."""
    rules = "" if words == "coverage" else "pin = [[1, 3]]"
    users = "weight = 1.0\ntasks = { x = 1.0 }"
    text = "".join(
        f'[[server]]\nname = "{name}"\n{users}\n{rule}\n[[server.gpu]]\n{gpu}\n'
        for name, gpu, rule in zip("ab", servers, (rules, ""), strict=True)
    )
    (here / "c.toml").write_text(text)
    result = prism_plan("check", "c.toml", cwd=here)
    assert result.returncode == 3
    assert result.stderr.startswith("prism-plan: c.toml: infeasible: whatever the model is, ")
    assert words in result.stderr
    assert invoke(here, *COMMANDS["solve"]).returncode in (2, 3)  # 2: no expert 3 in its model


def test_forbidden_everywhere(here: Path) -> None:
    """An expert that every server forbids has no place, whatever the model is."""
    text = CLUSTER.replace("[[server]]\n", "[[server]]\nforbid = [[1, 0]]\n")
    (here / "c.toml").write_text(text)
    for more in ((), ("--trace", "t.parquet"), ("--model", "m.json")):
        result = invoke(here, "check", "c.toml", *more)
        assert result.returncode == 3
        assert "layer 1 expert 0 want 1 copies" in result.stderr


# ------------------------------------------------------------------------ check and solve agree

PAIRS = st.lists(st.tuples(st.integers(1, 2), st.integers(0, 2)), max_size=2, unique=True)
GPUS = st.one_of(
    st.builds(Gpu, slots=st.integers(0, 5)),
    st.builds(
        Gpu,
        memory_bytes=st.integers(200, 900),
        reserve_bytes=st.sampled_from([0, 0, 50, 400]),
    ),
)


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    """One to three servers with scarce memory, rules, and users of some of them."""
    servers = []
    for n in range(draw(st.integers(1, 3))):
        pins, forbidden = draw(PAIRS), draw(PAIRS)
        servers.append(
            Server(
                f"s{n}",
                tuple(draw(st.lists(GPUS, min_size=1, max_size=2))),
                draw(st.sampled_from([{}, {"x": 1.0}, {"x": 0.5, "y": 0.5}, {"z": 1.0}])),
                arrival_interval_s=draw(st.sampled_from([None, 1.0, 1.0])),
                weight=draw(st.sampled_from([None, None, 0.0, 1.0])),
                kv_tokens=draw(st.sampled_from([0, 5])),
                pin=tuple(pins) if draw(st.booleans()) else (),
                forbid=tuple(pair for pair in forbidden if pair not in pins),
                layer_cap=draw(st.sampled_from([None, None, 0, 1, 2])),
            )
        )
    return Cluster("c", tuple(servers))


def verdict(work: Callable[[], object]) -> int:
    """The exit code of some work."""
    try:
        work()
    except PrismError as error:
        return error.exit_code
    return 0


@given(cluster=clusters(), unequal=st.booleans())
@settings(max_examples=150)
def test_check_says_what_solve_says(cluster: Cluster, unequal: bool) -> None:
    """With a trace `check` and `solve` (by a solver that knows all rules) have one exit code."""
    trace = TRACES[UNEQUAL.expert_bytes if unequal else SPEC.expert_bytes]

    def plan() -> None:
        solve(Instance.build(trace, cluster), "ilp" if unequal else "exact")

    with_trace = verdict(lambda: require_plannable(cluster, trace=trace))
    assert with_trace == verdict(plan)
    with_model = verdict(lambda: require_plannable(cluster, model=trace.model))
    alone = verdict(lambda: require_plannable(cluster))
    assert not with_model or with_trace  # what is refused with less is refused with more
    assert not alone or with_model


@given(cluster=clusters())
@settings(max_examples=100)
def test_alone_refuses_no_more(cluster: Cluster) -> None:
    """Some model and trace can be planned for whenever a cluster alone is accepted."""
    assume(all("z" not in server.tasks for server in cluster.servers))
    smallest = _smallest_model(cluster)
    trace = synthetic_trace(smallest, ["x", "y"], requests=2)
    alone = verdict(lambda: require_plannable(cluster))
    assert alone == verdict(lambda: solve(Instance.build(trace, cluster), "exact"))


@given(seed=st.integers(0, 10**6))
@settings(max_examples=60)
def test_first_fit_proves(seed: int) -> None:
    """Where first fit finds places for experts of unequal size, the integer program does too."""
    rng = np.random.default_rng(seed)
    shape = (2, 2, 3)
    rules = [tuple(map(int, triple)) for triple in np.argwhere(rng.random(shape) < 0.2)]
    cut = int(rng.integers(0, len(rules) + 1))
    instance = Instance(
        model=UNEQUAL.shape(),
        servers=("a", "b"),
        activations=np.zeros(shape),
        gpu_capacity=tuple(
            tuple(int(room) for room in rng.integers(0, 600, rng.integers(1, 3))) for _ in "ab"
        ),
        min_replicas=int(rng.integers(1, 3)),
        pinned=tuple(rules[:cut]),  # type: ignore[arg-type]
        forbidden=tuple(rules[cut:]),  # type: ignore[arg-type]
        layer_caps=(int(rng.integers(1, 4)), None),
    )
    if first_fit(instance):
        assert violations(solve(instance, "ilp"), instance=instance) == []


def test_what_only_packing_forbids() -> None:
    """Bytes enough in sum, but no GPU for the last whole expert: found out without a trace."""
    model = dataclasses.replace(UNEQUAL, dense_bytes=0)  # 3 experts of 100 and 3 of 150 bytes
    gpus = (Gpu(memory_bytes=249),) * 3 + (Gpu(memory_bytes=99),)
    server = Server("a", gpus, {"x": 1.0}, weight=1.0)
    instance = Instance.of_cluster(Cluster("c", (server,)), model)
    assert sum(instance.gpu_capacity[0]) > 3 * 100 + 3 * 150
    with pytest.raises(Infeasible, match="no packing of whole experts"):
        require_feasible_placement(instance)


def test_rules_beyond_memory_are_told() -> None:
    """Without a model, pins of so many layers and experts are not followed, and `check` says so."""
    pins = tuple((layer, 65535) for layer in range(60))
    servers = (
        Server("a", (Gpu(slots=1),), {"x": 1.0}, weight=1.0, pin=pins),
        *(Server(name, (Gpu(slots=1),)) for name in "bc"),
    )
    cluster = Cluster("c", servers)
    assert require_plannable(cluster) == (
        "pin and forbid not followed: that needs a trace or a model",
    )


def test_check_with_a_trace_refuses_what_solve_refuses(here: Path) -> None:
    """Both commands end with one code and one line, whether the tasks or the memory is wrong."""
    for old, new, code in (
        ("{ x = 1.0 }", "{ w = 1.0 }", 2),
        ("memory_gb = 1e-6", "memory_gb = 0.1e-6", 3),
        ("memory_gb = 1e-6", "memory_gb = 0.3e-6", 3),
        ('name = "a"', 'name = "a"\npin = [[9, 0]]', 2),
    ):
        (here / "c.toml").write_text(CLUSTER.replace(old, new).replace("slots = 3", "slots = 1"))
        checked = invoke(here, *COMMANDS["check with a trace"])
        solved = invoke(here, *COMMANDS["solve"])
        assert checked.returncode == solved.returncode == code
        assert checked.stderr == solved.stderr
        assert len(checked.stderr.splitlines()) == 1


# ---------------------------------------------------------------------------------------- memory


def test_memory_by_hand() -> None:
    """Usable bytes are dense part, KV cache, reserve, experts and what is free, on each GPU."""
    rows = [row.to_json() for row in gpu_memory(parse_cluster(CLUSTER), SPEC)]
    assert rows == [
        {
            "server": "a", "gpu": 0, "usable_bytes": 1000, "dense_bytes": 250, "kv_bytes": 0,
            "reserve_bytes": 0, "slots": 7, "experts": 6, "expert_bytes": 600,
            "for_experts_bytes": 750, "free_bytes": 150,
        },
        {
            "server": "b", "gpu": 0, "usable_bytes": 700, "dense_bytes": 250, "kv_bytes": 200,
            "reserve_bytes": 50, "slots": 2, "experts": 2, "expert_bytes": 200,
            "for_experts_bytes": 200, "free_bytes": 0,
        },
        {
            "server": "b", "gpu": 1, "usable_bytes": None, "dense_bytes": None, "kv_bytes": None,
            "reserve_bytes": None, "slots": 3, "experts": 3, "expert_bytes": 300,
            "for_experts_bytes": None, "free_bytes": None,
        },
    ]  # fmt: skip


def test_memory_of_unequal_experts() -> None:
    """There are no slots then: a GPU can be full of experts, and hold no more than all of them."""
    text = CLUSTER.replace("slots = 3", "memory_gb = 2e-6")
    rows = gpu_memory(parse_cluster(text), UNEQUAL)
    assert [(row.slots, row.experts) for row in rows] == [(None, None)] * 3
    assert [row.expert_bytes for row in rows] == [750, 200, 750]
    assert [row.free_bytes for row in rows] == [0, 0, 1250]


@pytest.mark.parametrize(
    "with_sizes", [("--trace", "t.parquet"), ("--model", "m.json")], ids=["trace", "model"]
)
def test_check_prints_the_memory(prism_plan: Run, here: Path, with_sizes: tuple[str, ...]) -> None:
    """One row a GPU, the numbers of `--json`; GPUs that give slots are noted, not guessed."""
    result = prism_plan("check", "c.toml", *with_sizes, cwd=here)
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if " gpu[" in line and "B" in line]
    assert rows == [
        [
            "a",
            "gpu[0]",
            "1.00",
            "kB",
            "250",
            "B",
            "0",
            "B",
            "0",
            "B",
            "750",
            "B",
            "7",
            "6",
            "600",
            "B",
            "150",
            "B",
        ],
        [
            "b",
            "gpu[0]",
            "0.70",
            "kB",
            "250",
            "B",
            "200",
            "B",
            "50",
            "B",
            "200",
            "B",
            "2",
            "2",
            "200",
            "B",
            "0",
            "B",
        ],
        ["b", "gpu[1]", "–", "–", "–", "–", "–", "3", "3", "300", "B", "–"],
    ]
    assert "note: slots are given for b gpu[1]: the KV cache" in result.stdout
    printed = invoke(here, "check", "c.toml", *with_sizes, "--json")
    values = json.loads(printed.stdout)[0]
    memory = gpu_memory(parse_cluster(CLUSTER), SPEC)
    assert values["memory"] == [row.to_json() for row in memory]
    assert values["warnings"] == [result.stderr.strip().removeprefix("prism-plan: ")]


def test_memory_of_a_placement(here: Path) -> None:
    """A placement's experts are counted as they lie, not as they could."""
    sparse = read_placement(here / "p.json")
    held = sparse.on_gpu.copy()
    held[0] = False
    held[0, 0, :2] = True
    write_placement(here / "p.json", sparse.replace(on_gpu=held))
    for with_sizes in (("--trace", "t.parquet"), ("--model", "m.json")):
        result = invoke(here, "check", "p.json", "--cluster", "c.toml", *with_sizes, "--json")
        rows = json.loads(result.stdout)[0]["memory"]
        assert (rows[0]["experts"], rows[0]["expert_bytes"]) == (2, 200)
        assert rows[0]["free_bytes"] == 1000 - 250 - 200
        assert [row["experts"] for row in rows[1:]] == held[1:].sum(axis=(1, 2)).tolist()


def test_a_placement_against_a_model(here: Path) -> None:
    """Sizes alone are enough to find a GPU too full; the remote share is then not recomputed."""
    result = invoke(here, "check", "p.json", "--cluster", "c.toml", "--model", "m.json")
    assert result.returncode == 0, result.stderr
    assert "remote_share not recomputed" in result.stdout
    (here / "c.toml").write_text(CLUSTER.replace("memory_gb = 1e-6", "memory_gb = 0.4e-6"))
    result = invoke(here, "check", "p.json", "--cluster", "c.toml", "--model", "m.json")
    assert result.returncode == 3
    assert "holds 6 slots of experts, the cluster says 1" in result.stderr


def test_a_model_or_a_trace_needs_a_cluster(here: Path) -> None:
    """Neither says anything of other files, and together they would say the model twice."""
    for options, words in (
        (("--trace", "t.parquet"), "--trace needs --cluster"),
        (("--model", "m.json"), "--model needs --cluster"),
        (("--cluster", "c.toml", "--trace", "t.parquet", "--model", "m.json"), "--model with"),
    ):
        result = invoke(here, "check", "p.json", *options)
        assert result.returncode == 2
        assert words in result.stderr


# ------------------------------------------------------------- clusters with a given placement

#: Layer 1 of a's users executes on b: their tokens' KV cache is split over both.
TABLE = np.array([[1, 0], [1, 1]], np.int32)


def on_table(here: Path, kv_tokens: int) -> Path:
    """A cluster whose first server reserves so much, beside a placement with a table."""
    text = CLUSTER.replace('name = "a"', f'name = "a"\nkv_tokens = {kv_tokens}')
    text = text.replace("kv_tokens = 20", "kv_tokens = 10")
    (here / "c.toml").write_text(text)
    write_placement(here / "p.json", read_placement(here / "p.json").replace(execution=TABLE))
    return here


def checked(here: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit code and report of checking the cluster with the placement."""
    result = invoke(here, "check", "c.toml", "--placement", "p.json", *options, "--json")
    return result.returncode, json.loads(result.stdout)[0]


@pytest.mark.parametrize(
    "sizes", [("--model", "m.json"), ("--trace", "t.parquet")], ids=["model", "trace"]
)
def test_memory_of_a_cluster_with_a_placement(here: Path, sizes: tuple[str, ...]) -> None:
    """KV caches are counted where layers execute, and experts as the placement holds them.

    By hand: 10 bytes a token over three decoder layers, two of which execute with MoE layer 1. b
    keeps 10 tokens of its own and two thirds of a's 15, a the other third of these.
    """
    placement = read_placement(on_table(here, 15) / "p.json")
    code, report = checked(here, *sizes)
    held = [int(number) for number in placement.on_gpu.sum(axis=(1, 2))]
    assert [row["kv_bytes"] for row in report["memory"]] == [50, 200, None]
    assert [row["dense_bytes"] for row in report["memory"]] == [250, 250, None]
    assert [row["for_experts_bytes"] for row in report["memory"]] == [700, 200, None]
    assert [row["experts"] for row in report["memory"]] == held
    assert [row["expert_bytes"] for row in report["memory"]] == [100 * number for number in held]
    assert [row["slots"] for row in report["memory"]] == [7, 2, 3]
    assert [row["free_bytes"] for row in report["memory"]] == [
        700 - 100 * held[0], 200 - 100 * held[1], None
    ]  # fmt: skip
    assert (code, report["problems"]) == (0, [])
    assert "with p.json: tiny on 2 servers" in report["summary"]


def test_a_placement_that_does_not_fit_a_cluster(prism_plan: Run, here: Path) -> None:
    """The table is printed all the same, the line says by how many bytes; exit code 3.

    Also where KV caches alone are too large, for which no capacity is defined.
    """
    on_table(here, 16)  # two thirds of 16 tokens: 107 bytes, 7 more than are left on b
    result = prism_plan("check", "c.toml", "--model", "m.json", "--placement", "p.json", cwd=here)
    assert result.returncode == 3
    assert "c.toml: INVALID: cluster: " in result.stdout
    assert [line for line in result.stderr.splitlines() if "lacks" in line] == [
        "prism-plan: c.toml: server 'b' gpu[0] lacks 7 bytes: dense part 250, KV cache 207, "
        "reserve 50 and 2 experts 200, of 700 usable bytes"
    ]
    rows = [line for line in result.stdout.splitlines() if " gpu[0]" in line]
    assert rows[1].split()[-2:] == ["-7", "B"]
    code, report = checked(on_table(here, 1000), "--model", "m.json")
    assert code == 3
    assert [row["for_experts_bytes"] for row in report["memory"]] == [-2584, -6367, None]
    assert [row["slots"] for row in report["memory"]] == [0, 0, 3]
    assert [text.partition(":")[0] for text in report["problems"]] == [
        f"server 'a' gpu[0] lacks {2584 + report['memory'][0]['expert_bytes']:,} bytes",
        f"server 'b' gpu[0] lacks {6367 + report['memory'][1]['expert_bytes']:,} bytes",
    ]
    # the placement itself is refused for the same reason
    for options in (("--model", "m.json"), ("--trace", "t.parquet")):
        assert invoke(here, "check", "p.json", "--cluster", "c.toml", *options).returncode == 3


def test_a_table_may_fit_where_home_does_not(here: Path) -> None:
    """KV caches that do not fit at home are no problem where the layers execute elsewhere."""
    text = CLUSTER.replace("kv_tokens = 20", "kv_tokens = 50")  # 500 bytes, 400 are left on b
    (here / "c.toml").write_text(text)
    alone = invoke(here, "check", "c.toml", "--model", "m.json")
    assert alone.returncode == 3
    placement = read_placement(here / "p.json")
    held = placement.on_gpu.copy()
    held[0], held[1] = True, False
    table = np.array([[0, 0], [1, 0]], np.int32)  # two thirds stay, one goes to a
    cluster = text.replace("memory_gb = 1e-6", "memory_gb = 2e-6")
    (here / "c.toml").write_text(cluster)
    write_placement(here / "p.json", placement.replace(on_gpu=held, execution=table))
    code, report = checked(here, "--model", "m.json")
    assert (code, report["problems"]) == (0, [])
    assert [row["kv_bytes"] for row in report["memory"]] == [167, 334, None]
    found = invoke(here, "check", "p.json", "--cluster", "c.toml", "--model", "m.json", "--json")
    (report,) = json.loads(found.stdout)
    assert [row["kv_bytes"] for row in report["memory"]] == [167, 334, None]
    assert not [text for text in report["problems"] if "the cluster says" in text]


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1))
def test_memory_with_a_placement_is_counted_anew(seed: int) -> None:
    """Per GPU: usable = dense + KV + reserve + left, left = experts + free, for random tables.

    KV caches of all servers together are those of all users' tokens, up to one rounding each.
    """
    rng = np.random.default_rng(seed)
    servers = int(rng.integers(1, 5))
    spec = dataclasses.replace(
        SPEC, moe_layers=(1, 2, 4), num_decoder_layers=6, expert_bytes=int(rng.integers(50, 90))
    )
    cluster = Cluster("c", tuple(
        Server(
            f"s{n}",
            tuple(Gpu(memory_bytes=int(rng.integers(500, 3000)), reserve_bytes=7)
                  for _ in range(int(rng.integers(1, 3)))),
            tasks={"x": 1.0}, weight=1.0, kv_tokens=int(rng.integers(0, 60)),
        )
        for n in range(servers)
    ))  # fmt: skip
    gpus = [len(server.gpus) for server in cluster.servers]
    table = rng.integers(0, servers, (servers, 3)).astype(np.int32)
    placement = Placement(
        spec.shape(), tuple(f"s{n}" for n in range(servers)), tuple((9,) * g for g in gpus),
        rng.random((sum(gpus), 3, 3)) < 0.5, SolveReport("hand"), execution=table,
    )  # fmt: skip
    rows = gpu_memory(cluster, spec, placement)
    short = memory_shortages(rows)
    layers = (2, 1, 3)  # decoder layers that execute with MoE layers 1, 2 and 4
    for m, server in enumerate(cluster.servers):
        own = [row for row in rows if row.server == server.name]
        token_layers = sum(
            home.kv_tokens * count
            for home, row in zip(cluster.servers, table, strict=True)
            for at, count in zip(row, layers, strict=True)
            if at == m
        )
        assert own[0].kv_bytes == math.ceil(token_layers * spec.kv_bytes_per_token / 6)
        for g, (row, gpu) in enumerate(zip(own, server.gpus, strict=True)):
            held = int(placement.on_gpu[placement.gpus_of(m)[g]].sum())
            used = held * spec.expert_bytes + 7
            used += 0 if g else spec.dense_bytes + own[0].kv_bytes
            assert row.free_bytes == gpu.usable_bytes - used
            assert row.slots == max((gpu.usable_bytes - used) // spec.expert_bytes + held, 0)
            told = f"server '{row.server}' gpu[{g}] lacks {-row.free_bytes:,} bytes"
            assert any(line.startswith(told) for line in short) == (row.free_bytes < 0)


def test_placements_that_are_not_of_the_cluster(here: Path) -> None:
    """Other servers are named, and there is no table then; too many experts in slots too."""
    placement = read_placement(here / "p.json")
    write_placement(here / "p.json", placement.replace(servers=("a", "x")))
    code, report = checked(here, "--model", "m.json")
    assert (code, report["problems"]) == (3, ["servers are ['a', 'x'], the cluster has ['a', 'b']"])
    assert "memory" not in report
    held = placement.on_gpu.copy()
    held[2] = True
    write_placement(here / "p.json", placement.replace(on_gpu=held))
    code, report = checked(here, "--model", "m.json")
    assert code == 3
    assert report["problems"] == ["server 'b' gpu[1] holds 6 experts, the cluster says 3 slots"]
    held[2], held[0] = False, False
    write_placement(here / "p.json", placement.replace(on_gpu=held))
    code, report = checked(here, "--model", "m.json")
    assert code == 3
    assert any("is held nowhere" in text for text in report["problems"])


def test_wrong_combinations_with_a_placement(here: Path) -> None:
    """Without sizes, without a cluster, or with one of another model: one line, exit code 2."""
    for arguments, words in (
        (("c.toml", "--placement", "p.json"), "--placement: a placement does not say how large"),
        (("p.json", "--placement", "p.json", "--cluster", "c.toml", "--model", "m.json"),
         "--placement: no cluster to check is among p.json; expected a cluster"),
        (("c.toml", "--placement", "p.json", "--model", "olmoe-1b-7b"), "made for another model"),
        (("c.toml", "--placement", "none.json", "--model", "m.json"), "none.json"),
        (("c.toml", "--placement", "c.toml", "--model", "m.json"), "c.toml"),
    ):  # fmt: skip
        result = invoke(here, "check", *arguments)
        assert result.returncode == 2
        assert words in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


# ------------------------------------------------------------------------------------ KV caches


def test_no_kv_cache_is_reserved() -> None:
    """Servers with users and without kv_tokens are named in one line of bounded length."""
    assert missing_kv_reservation(parse_cluster(CLUSTER)) == (
        "nothing is reserved for the KV cache of a: kv_tokens is not given or 0"
    )
    gpu = Gpu(memory_bytes=1)
    servers = tuple(Server(f"s{n}", (gpu,), {"x": 1.0} if n else {}) for n in range(100))
    assert "of s1, s2, s3 and 96 more:" in missing_kv_reservation(Cluster("c", servers))
    stateless = dataclasses.replace(SPEC, kv_bytes_per_token=0)
    assert missing_kv_reservation(Cluster("c", servers), stateless) == ""


def test_kv_tokens_are_no_remedy_where_slots_are_given() -> None:
    """Servers whose KV cache lies on GPUs that give slots are named without ``kv_tokens``.

    With a table that is where the layers of their users execute: here those of a, b and c on b and
    c, of which c has memory.
    """
    users = {"x": 1.0}
    gpus = [Gpu(memory_bytes=1), Gpu(slots=1), Gpu(memory_bytes=1)]
    servers = tuple(Server(n, (gpu,), users) for n, gpu in zip("abc", gpus, strict=True))
    cluster = Cluster("c", servers)
    assert missing_kv_reservation(cluster) == (
        "nothing is reserved for the KV cache of a, c: kv_tokens is not given or 0; no KV cache of "
        "b is subtracted from slots, which are used as given"
    )
    only = missing_kv_reservation(Cluster("c", servers[1:2]))
    assert only == "no KV cache of b is subtracted from slots, which are used as given"
    table = np.array([[1, 1], [1, 2], [2, 2]], np.int32)
    assert missing_kv_reservation(cluster, SPEC, table) == (
        "nothing is reserved for the KV cache of b, c: kv_tokens is not given or 0; no KV cache of "
        "a is subtracted from slots, which are used as given"
    )


def test_kv_cache_of_others_is_looked_for_where_it_lies() -> None:
    """With a table a server needs room for the layers that it executes for the users of others."""
    gpu = Gpu(memory_bytes=SPEC.dense_bytes + 600 + 4)  # 4 bytes beside all experts
    servers = (Server("a", (gpu,), {"x": 1.0}), Server("b", (gpu,)))
    cluster = Cluster("c", servers)
    spec = dataclasses.replace(SPEC, num_decoder_layers=5)  # 2 execute with layer 1, 3 with layer 2
    memory = gpu_memory(cluster, spec)
    assert insufficient_kv_memory(cluster, spec, memory) == (
        "nothing is left for a KV cache on a gpu[0] (4 bytes, a token needs 10)"
    )
    table = np.array([[0, 1], [1, 1]], np.int32)
    assert insufficient_kv_memory(cluster, spec, memory, None, table) == (
        "nothing is left for a KV cache on b gpu[0] (4 bytes, a token of a needs 6)"
    )


def test_nothing_is_left_for_a_kv_cache() -> None:
    """Too little is left where reserved and free bytes hold less than a mean request's cache."""
    trace = TRACES[SPEC.expert_bytes]
    assert trace.requests is not None
    tokens = -(-int(trace.tokens[0]) // int(trace.requests[0]))  # of task x, all requests alike
    assert trace.tokens[0] == tokens * trace.requests[0]
    need = tokens * SPEC.kv_bytes_per_token
    for room, short in ((need, False), (need - 1, True)):
        gpu = Gpu(memory_bytes=SPEC.dense_bytes + 600 + room)  # all 6 experts fit
        cluster = Cluster("c", (Server("a", (gpu,), {"x": 1.0}, weight=1.0),))
        assert gpu_memory(cluster, SPEC)[0].free_bytes == room
        found = insufficient_kv_memory(cluster, SPEC, gpu_memory(cluster, SPEC), trace)
        assert bool(found) == short
        assert (
            insufficient_kv_memory(cluster, SPEC, gpu_memory(cluster, SPEC)) == ""
        )  # for one token
    assert found == (
        f"nothing is left for a KV cache on a gpu[0] ({room:,} bytes, a request of {tokens:,} "
        f"tokens needs {need:,})"
    )


def test_kv_warnings_of_the_commands(prism_plan: Run, here: Path) -> None:
    """`check` and `solve` warn on standard error and end well; one line a file."""
    full = CLUSTER.replace("memory_gb = 1e-6", "memory_gb = 0.555e-6")  # 3 experts and 5 bytes
    (here / "c.toml").write_text(full)
    reserved = "prism-plan: c.toml: nothing is reserved for the KV cache of a: kv_tokens is not"
    checked = prism_plan("check", "c.toml", "--model", "m.json", cwd=here)
    assert checked.returncode == 0
    (line,) = checked.stderr.splitlines()
    assert line.startswith(reserved)
    assert line.endswith("left for a KV cache on a gpu[0] (5 bytes, a token needs 10)")
    for result in (
        invoke(here, "check", "c.toml"),
        prism_plan(*COMMANDS["solve"], cwd=here),
    ):
        assert result.returncode == 0
        (line,) = result.stderr.splitlines()
        assert line.startswith(reserved)
        assert line.endswith("given or 0")
    text = CLUSTER.replace('name = "a"', 'name = "a"\nkv_tokens = 30')
    (here / "c.toml").write_text(text)
    for arguments in (("check", "c.toml", "--model", "m.json"), COMMANDS["solve"]):
        assert invoke(here, *arguments).stderr == ""
