"""Exports of whole layers: stages, files of every engine, their checks, and planning again."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.errors import Infeasible, InputError, PrismError
from prism_plan.export import llamacpp, pipeline_partitions
from prism_plan.export.engine_checks import check_engine_file
from prism_plan.export.llamacpp_log import differs_from_export, verify_log
from prism_plan.export.shell_script import ShellScript, parse_script
from prism_plan.export.stages import head_of, moe_position_of, partial_layer, stages
from prism_plan.export.whole_layers import ExportRequest, export_whole_layers
from prism_plan.instance import Instance
from prism_plan.io.cluster import parse_cluster
from prism_plan.io.endpoints import EndpointTable, read_endpoints
from prism_plan.io.export import LayerEngine as Engine
from prism_plan.io.export import dump_export, export_from_json
from prism_plan.io.placement import write_placement
from prism_plan.io.trace_writer import write_trace
from prism_plan.model_spec import ModelSpec
from prism_plan.placement import Placement, SolveReport
from prism_plan.solvers import Options, solve
from tests.evaluate.simulation_material import SPEC, small_cluster, small_trace
from tests.export.drawn_models import drawn_model, model_of
from tests.limits import HANG_S
from tests.warm_processes import run_warm

ENGINES: tuple[Engine, ...] = get_args(Engine)
MODEL4 = model_of((0, 1, 2, 3), 2, 4)


def drawn_plan(rng: np.random.Generator, model: ModelSpec) -> Placement:
    """Any servers, each with room for all layers on its first GPU, and any table of server 0."""
    servers = int(rng.integers(1, 5))
    shape = model.shape()
    held = np.zeros((servers, shape.num_layers, shape.num_experts), bool)
    table = np.repeat(np.arange(servers, dtype=np.int32)[:, None], shape.num_layers, axis=1)
    table[0] = rng.integers(0, servers, shape.num_layers)
    if rng.random() < 0.5:
        table[0] = np.sort(table[0])
    held[table[0], np.arange(shape.num_layers)] = True
    names = tuple(f"s{n}" for n in range(servers))
    return Placement(
        shape, names, ((shape.num_pairs,),) * servers, held, SolveReport("hand"), execution=table
    )


def request_of(engine: Engine, plan: Placement, model: ModelSpec, **more: Any) -> ExportRequest:
    return ExportRequest(engine, plan, "p.json", "0" * 64, model, "out", "s0", **more)


def servers_by_layer(engine: Engine, text: str, plan: Placement, sidecar: Any) -> list[int]:
    """Which server executes each decoder layer, read from the engine's own file."""
    if engine != "llamacpp":
        counts = pipeline_partitions.read_partition(engine, text, "out")
        servers = [plan.servers.index(stage.server) for stage in sidecar.stages]
        return np.repeat(servers, counts).tolist()
    placing = llamacpp.read_placing(text, "out")
    hosts = [endpoint.rpartition(":")[0] for endpoint in placing.endpoints]
    found = [
        plan.servers.index("s0" if hosts[int(name[3:])] == "127.0.0.1" else hosts[int(name[3:])])
        for name in placing.devices
    ]
    return np.repeat(found, placing.counts).tolist()[:-1]


def test_two_hundred_drawn_plans(tmp_path: Path) -> None:
    """Each export passes its check, and the engine's file has every layer where the plan has it.

    A plan that an engine cannot have is refused for a reason that is true of it.
    """
    rng = np.random.default_rng(3)
    exports = refused = 0
    for _ in range(200):
        model = drawn_model(rng)
        plan = drawn_plan(rng, model)
        row = plan.execution_table[0][moe_position_of(model)].tolist()
        runs = 1 + sum(a != b for a, b in itertools.pairwise(row))
        for engine in ENGINES:
            request = request_of(engine, plan, model)
            if engine != "llamacpp" and runs > len(set(row)):
                with pytest.raises(InputError, match="runs of layers with others between them"):
                    export_whole_layers(request)
                refused += 1
                continue
            text, sidecar, exported = export_whole_layers(request)
            assert exported is plan
            assert servers_by_layer(engine, text, plan, sidecar) == row
            path = tmp_path / "out"
            path.write_text(text)
            assert check_engine_file(str(path), engine, model)[1] == []
            assert export_from_json(json.loads(dump_export(sidecar))) == sidecar
            exports += 1
    assert exports > 500
    assert refused > 50


def llama_text() -> str:
    """A script of two runs on three servers, of four layers."""
    return export_whole_layers(request_of("llamacpp", by_layers((1, 1, 2, 0)), MODEL4))[0]


def by_layers(servers: tuple[int, ...], *, executed: bool = True) -> Placement:
    shape = MODEL4.shape()
    held = np.zeros((3, 4, 2), bool)
    held[list(servers), range(4)] = True
    table = np.repeat(np.arange(3, dtype=np.int32)[:, None], 4, axis=1)
    if executed:
        table[0] = servers
    return Placement(
        shape, ("s0", "s1", "s2"), ((8,),) * 3, held, SolveReport("hand"), execution=table
    )


#: What is replaced in a good file, and by what; each must be refused.
SPOILED: dict[Engine, list[tuple[str, str]]] = {
    "llamacpp": [
        ("-ts 2,1,2", "-ts 2,1,1"), ("-ts 2,1,2", "-ts 2,1,3"), ("-ts 2,1,2", "-ts 3,2"),
        ("-ts 2,1,2", "-ts 5,0,0"), ("-ts 2,1,2", "-ts 2,1,x"), ("-ts 2,1,2", ""),
        ("-ngl 5", "-ngl 4"), ("-ngl 5", "-ngl 6"), ("-ngl 5", "-ngl all"), ("-ngl 5", ""),
        ("-fit off", ""), ("-fit off", "-fit on"), ("RPC0,RPC1,RPC2", "RPC0,RPC1,RPC3"),
        ("RPC0,RPC1,RPC2", "RPC0,RPC1"), ("s1:50052,", ""), ("s1:50052,s2", "s1:50052,s1"),
        ("--rpc s1", "--device RPC0 --rpc s1"), ("-m ", "--model-path "), ("case", "cake"),
        ("-fit off", "-fit 'off"),
    ],
    "vllm-pp": [
        ("=2,1,1", "=2,2,1"), ("=2,1,1", "=2,1"), ("=2,1,1", "=4,0,0"), ("=2,1,1", "=2,1,1,0"),
        ("=2,1,1", "=2,-1,3"), ("=2,1,1", "=2;1;1"), ("=2,1,1", "="), ("VLLM_PP_LAYER", "VLLM"),
        ("--pipeline-parallel-size 3", "--pipeline-parallel-size 2"),
        ("--pipeline-parallel-size 3", ""), ("--node-rank 1", "--node-rank 0"),
        ("--node-rank 2", "--node-rank 3"), ("--nnodes 3", "--nnodes 2"), ("export", "expert"),
    ],
    "sglang-pp": [
        ("=2,1,1", "=2,2,1"), ("=2,1,1", "=2,1"), ("=2,1,1", "=4,0,0"), ("=2,1,1", "=1,1,1"),
        ("SGLANG_PP", "VLLM_PP"), ("--pp-size 3", "--pp-size 4"), ("--pp-size 3", "--tp-size 3"),
        ("--node-rank 1", "--node-rank 2"), ("--nnodes 3", ""), ("=2,1,1", "=2,1,1.0"),
    ],
    "trtllm-pp": [
        ("[2, 1, 1]", "[2, 1, 2]"), ("[2, 1, 1]", "[2, 2]"), ("[2, 1, 1]", "[4, 0, 0]"),
        ("[2, 1, 1]", "2"), ("[2, 1, 1]", "[2, 1, 1.0]"), ("[2, 1, 1]", "[true, 2, 1]"),
        ('": 3', '": 2'), ("pp_partition", "pp_partitions"), ("{", "["),
    ],
}  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
def test_spoiled_files_are_refused(engine: Engine, tmp_path: Path) -> None:
    """Everything that the engine needs, and what its loader accepts in silence: 53 kinds."""
    text = export_whole_layers(request_of(engine, by_layers((1, 1, 2, 0)), MODEL4))[0]
    path = tmp_path / "out"
    path.write_text(text)
    assert check_engine_file(str(path), engine, MODEL4)[1] == []
    for old, new in SPOILED[engine]:
        assert old in text, (engine, old, text)
        path.write_text(text.replace(old, new))
        try:
            problems = check_engine_file(str(path), engine, MODEL4)[1]
        except InputError as error:
            problems = [str(error)]
        assert problems, (old, new)
        assert not any("\n" in problem for problem in problems)
    assert sum(map(len, SPOILED.values())) >= 50


@pytest.mark.parametrize("engine", ENGINES)
def test_edited_files_are_told(engine: Engine, tmp_path: Path) -> None:
    """Whatever an edit puts elsewhere, however well formed: the sidecar knows the file's digest."""
    text, sidecar, _ = export_whole_layers(request_of(engine, by_layers((1, 1, 2, 0)), MODEL4))
    (tmp_path / "out").write_text(text)
    (tmp_path / "out.export.json").write_bytes(dump_export(sidecar))
    assert check_engine_file(str(tmp_path / "out"), engine, MODEL4)[1] == []
    for old, new in (("s1", "s3"), ("2", "1"), ("50052", "50053")):
        if old in text:
            (tmp_path / "out").write_text(text.replace(old, new))
            with contextlib.suppress(InputError):
                assert "export it again" in check_engine_file(str(tmp_path / "out"), engine)[1][-1]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("server=${1:-'s0'}", "server=${1:-$(reboot)}"), ("set -eu\n", ""),
        ("if [ $# -gt 0 ]; then shift; fi\n", ""), ("\n  wait", ""),
        ("server=${1:-'s0'}", "server=${1:-'s2'}"),
    ],
)  # fmt: skip
def test_lines_that_a_script_needs(old: str, new: str) -> None:
    """A script with any of its own lines changed or left out is none of ours."""
    text = ShellScript([], {}, {}, {"s0": [["true"], ["false"]], "s1": [["true"]]}).text()
    assert parse_script(text, "x").commands
    assert old in text
    with pytest.raises(InputError):
        parse_script(text.replace(old, new), "x")


def test_machines_that_are_one(tmp_path: Path) -> None:
    """Two servers at one host would share its ports and GPUs, the head's loopback too."""
    plan = by_layers((1, 1, 2, 0))
    same = {name: EndpointTable(name=name, host="box") for name in plan.servers}
    for engine in ("llamacpp", "vllm-pp", "sglang-pp"):
        with pytest.raises(InputError, match="endpoints"):
            export_whole_layers(request_of(engine, plan, MODEL4, endpoints=same))


def test_scripts_of_several_processes_end_well() -> None:
    """When they have ended by themselves the script's own end is no failure."""
    text = ShellScript([], {}, {}, {"s0": [["true"], ["echo", "a"]]}).text()
    done = subprocess.run(["sh"], input=text, capture_output=True, text=True, timeout=HANG_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, "a\n", "")


def test_experts_elsewhere(tmp_path: Path) -> None:
    """Of a plan at home llama.cpp gets patterns that match these layers, each once, and no other.

    The head computes on its CPU, or on its own device where it has one.
    """
    plan = by_layers((0, 1, 2, 1), executed=False)
    text, sidecar, _ = export_whole_layers(request_of("llamacpp", plan, MODEL4))
    assert llamacpp.read_placing(text, "out").overrides == {
        1: "RPC0[s1:50052]", 2: "RPC0[s2:50052]", 3: "RPC0[s1:50052]"
    }  # fmt: skip
    assert [(held.layer, held.server) for held in sidecar.held] == [(1, "s1"), (2, "s2"), (3, "s1")]
    path = tmp_path / "out"
    path.write_text(text)
    assert check_engine_file(str(path), "llamacpp", MODEL4)[1] == []
    for old, new in (("s1:50052]", "s9:50052]"), (r"\.(1|3)\.", r"\.(1|7)\."), ("(1|3)", "1,3"),
                     (r")\.ffn", ").ffn"), ("RPC0[s2", "RPC1[s2")):  # fmt: skip
        path.write_text(text.replace(old, new))
        try:
            problems = check_engine_file(str(path), "llamacpp", MODEL4)[1]
        except InputError as error:
            problems = [str(error)]
        assert any("-ot" in problem for problem in problems)
    own = {"s0": EndpointTable(name="s0", host="h0", devices=["CUDA0"])}
    text = export_whole_layers(request_of("llamacpp", plan, MODEL4, endpoints=own))[0]
    assert "--device CUDA0,RPC0,RPC1 -ngl 5 -fit off -ts 1,0,0" in text
    path.write_text(text)
    assert check_engine_file(str(path), "llamacpp", MODEL4)[1] == []
    with pytest.raises(InputError, match="all layers execute at 's0', and experts lie on other"):
        export_whole_layers(request_of("vllm-pp", plan, MODEL4))


def test_gpus_that_hold_one_layer_and_a_half(tmp_path: Path) -> None:
    """Two GPUs with room for 1.5 layers each hold two whole ones, and the third goes elsewhere.

    Together they have room for three, which is what planners of servers count.
    """
    trace = small_trace()
    text = ['name = "two"', "[link]", "bandwidth_mbps = 500", "rtt_ms = 1"]
    for n, gpus in enumerate(((9,), (12, 12))):
        text += ["[[server]]", f'name = "s{n}"', "arrival_interval_s = 5.0"]
        text += [f"tasks = {{ {'xy'[n]} = 1.0 }}"]
        text += [line for size in gpus for line in ("[[server.gpu]]", f"slots = {size}")]
    cluster = parse_cluster("\n".join(text) + "\n")
    plan = solve(Instance.build(trace, cluster), "exact")
    for engine in ENGINES:
        request = ExportRequest(
            engine, plan, "p.json", "0" * 64, SPEC, "out", "s0", trace, cluster, None, 16
        )
        text_of, sidecar, whole = export_whole_layers(request)
        held = [
            sum(stage.first <= layer <= stage.last for layer in SPEC.moe_layers)
            for stage in sidecar.stages
        ]
        assert sorted(held) == [1, 1, 1]
        assert partial_layer(whole, 0) == ""
        (tmp_path / "out").write_text(text_of)
        assert check_engine_file(str(tmp_path / "out"), engine, SPEC)[1] == []


def test_gpus_of_one_server(tmp_path: Path) -> None:
    """Layers fill one GPU after the other; what fits none of them is refused with how much."""
    plan = by_layers((1, 1, 1, 0))
    two = plan.replace(gpu_capacity=((8,), (5, 2), (8,)), on_gpu=split(plan.on_gpu))
    found = stages(two, MODEL4, 0)
    assert [(stage.server, stage.gpu, stage.first, stage.last) for stage in found] == [
        (1, 0, 0, 1), (1, 1, 2, 2), (0, 0, 3, 3)
    ]  # fmt: skip
    small = plan.replace(gpu_capacity=((8,), (5, 1), (8,)), on_gpu=split(plan.on_gpu))
    with pytest.raises(Infeasible, match=r"have \[1, 1\] experts left for decoder layer 2") as one:
        stages(small, MODEL4, 0)
    assert one.value.shortfall == 1
    for engine in ("vllm-pp", "sglang-pp"):  # each GPU is a node, for machines have unequally many
        text = export_whole_layers(request_of(engine, two, MODEL4))[0]
        (tmp_path / "out").write_text(text)
        assert check_engine_file(str(tmp_path / "out"), engine, MODEL4)[1] == []
        assert [text.count(f"--nnodes 3 --node-rank {rank}") for rank in range(3)] == [1, 1, 1]
        assert ("--port 30001" in text) == (engine == "sglang-pp")
        (tmp_path / "out").write_text(text.replace("--node-rank 1", "--node-rank 2"))
        assert check_engine_file(str(tmp_path / "out"), engine, MODEL4)[1]
    text, sidecar, _ = export_whole_layers(request_of("llamacpp", two, MODEL4))
    assert "CUDA_VISIBLE_DEVICES=1" in text
    assert len(sidecar.stages) == 3


def split(on_gpu: Any) -> Any:
    """The same experts with server 1's on two GPUs: its last layer on the second."""
    first, second = on_gpu[1].copy(), on_gpu[1].copy()
    first[2], second[:2] = False, False
    return np.stack([on_gpu[0], first, second, on_gpu[2]])


@pytest.mark.parametrize("engine", ENGINES)
def test_partial_layers_are_planned_again(engine: Engine) -> None:
    """Without trace and cluster it says why not; with them the new plan is whole, and is told."""
    trace, cluster = small_trace(), small_cluster(("0.04", "1"))
    plan = solve(Instance.build(trace, cluster), "exact")
    name = cluster.servers[0].name
    request = ExportRequest(engine, plan, "p.json", "0" * 64, SPEC, "out", name)
    with pytest.raises(InputError, match="it is planned again in whole layers"):
        export_whole_layers(request)
    again = ExportRequest(
        engine, plan, "p.json", "0" * 64, SPEC, "out", name, trace, cluster, None, 16
    )
    _, sidecar, whole = export_whole_layers(again)
    assert sidecar.replanned
    assert partial_layer(whole, 0) == ""
    seconds = sidecar.expected_latency_s
    assert seconds is not None
    assert seconds.export > 0


def test_default_partitions() -> None:
    """By hand: vLLM's remainder goes to ranks before the last; llama.cpp's goes by memory."""
    default = pipeline_partitions.default_partition
    assert default("vllm-pp", 8, 2) == [4, 4]
    assert default("vllm-pp", 9, 2) == [5, 4]
    assert default("vllm-pp", 11, 3) == [4, 4, 3]
    assert default("sglang-pp", 11, 3) == [3, 4, 4]
    for engine in ("vllm-pp", "sglang-pp", "trtllm-pp"):
        assert default(engine, 5, 1) == [5]
        for layers in range(1, 20):
            for ranks in range(1, layers + 1):
                found = default(engine, layers, ranks)
                assert (sum(found), len(found)) == (layers, ranks)
                assert max(found) - min(found) <= 1
    assert llamacpp.default_split([1, 1], 7) == [4, 3]
    assert llamacpp.default_split([3, 1], 7) == [6, 1]
    assert sum(llamacpp.default_split([5, 2, 1], 27)) == 27


NAME = st.text(
    st.characters(blacklist_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=12
).filter(lambda name: name.strip() == name)


@settings(max_examples=60)
@given(names=st.lists(NAME, min_size=1, max_size=3, unique=True), words=st.lists(NAME, max_size=3))
def test_scripts_of_any_names(names: list[str], words: list[str]) -> None:
    """A shell runs the words of the server that is named, whatever characters they have."""
    commands = {name: [["printf", "%s\\n", f"w{n}", *words]] for n, name in enumerate(names)}
    script = ShellScript(["comment"], {"A": "b"}, {"C": "d e"}, commands)
    text = script.text()
    for n, name in enumerate(names):
        found = subprocess.run(
            ["sh", "-s", "--", name, "more"], input=text, capture_output=True, text=True,
            timeout=HANG_S, check=True,
        )  # fmt: skip
        assert found.stdout.split("\n")[:-1] == [f"w{n}", *words, "more"]
    assert parse_script(text, "x").exported == {"C": "d e"}


def test_names_that_no_script_can_have() -> None:
    """A line break in a server's name would be a line of the script."""
    for name in ("a\nb", "a\rb", "\x1b[0m", "a\u2028b"):
        with pytest.raises(InputError, match="a name without line breaks"):
            ShellScript([], {}, {}, {name: [["true"]]}).text()


def test_logs_of_llama() -> None:
    """A log that is not verbose is refused; layers elsewhere are named with both devices."""
    placing = llamacpp.read_placing(llama_text(), "out")
    with pytest.raises(InputError, match="no line says which device"):
        verify_log(["load_tensors: offloaded 5/5 layers"], placing, 4, "log")
    lines = [
        f"load_tensors: layer {n:3d} assigned to device {device}, is_swa = 0"
        for n, device in enumerate(("RPC0", "RPC0", "RPC1", "RPC2", "RPC2"))
    ]
    lines += [
        f"llama_kv_cache: layer {n:3d}: dev = {device}"
        for n, device in enumerate(("RPC0", "RPC0", "RPC1", "RPC2"))
    ]
    lines += [
        f"using device RPC{n} ({endpoint}) (unknown id) - 24105 MiB free"
        for n, endpoint in enumerate(placing.endpoints)
    ]
    assert verify_log(lines, placing, 4, "log") == []
    wrong = [line.replace("layer   2 assigned to device RPC1", "layer   2 assigned to device CPU")
             for line in lines]  # fmt: skip
    assert verify_log(wrong, placing, 4, "log") == ["layer 2 is on CPU, planned RPC1"]
    assert verify_log(lines[:4] + lines[5:], placing, 4, "log") == [
        "layer 4 is on no device, planned RPC2"
    ]
    assert verify_log(lines[:-1], placing, 4, "log") == [
        f"RPC2 is in no line, planned {placing.endpoints[2]}"
    ]
    other = [line.replace(placing.endpoints[1], "h:1") for line in lines]
    assert verify_log(other, placing, 4, "log") == [f"RPC1 is h:1, planned {placing.endpoints[1]}"]
    assert "not loaded" in verify_log([*lines, "failed to load model"], placing, 4, "log")[0]
    twice = [*lines, "layer   0 assigned to device RPC1"]
    assert "two runs" in verify_log(twice, placing, 4, "log")[0]
    assert len(verify_log(lines[:5], placing, 4, "log")) == 7  # no caches, no devices


def test_heads(tmp_path: Path) -> None:
    """The head is named, or the only one that was planned for; endpoints are read strictly."""
    plan = by_layers((1, 1, 2, 0))
    assert head_of(plan, "s2") == 2
    with pytest.raises(InputError, match="3 servers may ask"):
        head_of(plan, None)
    with pytest.raises(InputError, match="unknown server 'x'"):
        head_of(plan, "x")
    alone = plan.replace(plan=SolveReport("hand", extra={"heads": ["s1"]}))
    assert head_of(alone, None) == 1
    path = tmp_path / "f.toml"
    table = '[[server]]\nname = "a"\nhost = "{}"\n'
    path.write_text(table.format("10.0.0.1"))
    assert read_endpoints(path)["a"].port == 50052
    for text, words in (
        (table.format("10.0.0.1") * 2, "'a' again"),
        (table.format("$(reboot)"), "host"),
        (table.format("h") + "port = 70000\n", "port"),
        ("", "server"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            read_endpoints(path)


def command_line(folder: Path) -> Callable[..., Any]:
    """Runs ``prism-plan`` in a folder with a trace, a cluster and plans."""
    trace, cluster = small_trace(), small_cluster(("0.04", "1"))
    write_trace(folder / "t.parquet", trace)
    write_placement(folder / "p.json", solve(Instance.build(trace, cluster), "exact"))
    write_placement(folder / "q.json", by_layers((1, 1, 2, 0)))
    (folder / "m.json").write_text(json.dumps(MODEL4.to_json()))
    return lambda *words: run_warm(words, cwd=folder, timeout_s=HANG_S)


def test_the_command(tmp_path: Path) -> None:
    """Export, check and verify as a user calls them; mistakes are one line and leave no file."""
    run = command_line(tmp_path)
    done = run("export", "q.json", "--engine", "llamacpp", "--model", "m.json", "--home", "s0",
               "-o", "run.sh")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "layers 0 to 1: s1 gpu[0]" in done.stderr
    assert "on s1: sh run.sh s1" in done.stderr
    checked = run("check", "--engine", "llamacpp", "run.sh", "--model", "m.json")
    assert checked.returncode == 0
    assert "ok: export to llamacpp: 3 runs of layers" in checked.stdout
    (tmp_path / "log").write_text("nothing\n")
    assert run("export-verify", "run.sh", "log").returncode == 2
    for words, line in (
        (("q.json", "--engine", "vllm-pp", "--home", "s0"), "--model: how many decoder layers"),
        (("q.json", "--engine", "vllm-pp", "--home", "x", "--model", "m.json"), "'x'"),
        (("q.json", "--engine", "tgi", "--home", "s0", "--model", "m.json"), "tgi"),
        (("p.json", "--engine", "llamacpp", "--home", "a", "--trace", "t.parquet"), "--cluster"),
        (("q.json", "--engine", "llamacpp", "--home", "s0", "--trace", "t.parquet"), "q.json"),
        (("q.json", "--engine", "llamacpp", "--home", "s0", "--model", "m.json", "--ctx", "0"),
         "--ctx: 0"),
    ):  # fmt: skip
        found = run("export", *words, "-o", "no.sh")
        assert found.returncode == 2, words
        assert line in found.stderr
        assert "Traceback" not in found.stderr
        assert not (tmp_path / "no.sh").exists()


def test_errors_are_ours() -> None:
    """Whatever a script has become, reading it gives a result or one of our errors."""
    text = llama_text()
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(text.encode())
        for _ in range(3):
            data[rng.integers(len(data))] = int(rng.integers(32, 127))
        with contextlib.suppress(PrismError):
            llamacpp.check_script(data.decode(), "out", 4)


def test_cluster_of_one_gpu_a_server_plans_for_every_engine() -> None:
    """On such a cluster every engine of layers gets a plan, for each head."""
    text = ['name = "three"']
    for n, slots in enumerate((24, 10, 10)):
        text += ["[[server]]", f'name = "s{n}"', "tasks = { x = 1.0 }", "arrival_interval_s = 5.0"]
        text += ["[[server.gpu]]", f"slots = {slots}"]
    trace, cluster = small_trace(), parse_cluster("\n".join(text) + "\n")
    plan = solve(Instance.build(trace, cluster), "prism")
    for engine in ENGINES:
        for head in ("s0", "s1"):
            request = ExportRequest(
                engine, plan, "p.json", "0" * 64, SPEC, "out", head, trace, cluster
            )
            _, sidecar, _ = export_whole_layers(request)
            seconds = sidecar.expected_latency_s
            assert seconds is not None
            layers = [n for s in sidecar.stages for n in range(s.first, s.last + 1)]
            assert layers == list(range(SPEC.num_decoder_layers)) or sidecar.held


def test_a_script_that_was_edited_is_not_its_export() -> None:
    """Other runs, devices or experts than the sidecar's are told, whatever the log says."""
    text, sidecar, _ = export_whole_layers(request_of("llamacpp", by_layers((1, 1, 2, 0)), MODEL4))
    placing = llamacpp.read_placing(text, "out")
    assert differs_from_export(placing, sidecar) == []
    for old, new in (("-ts 2,1,2", "-ts 1,2,2"), ("RPC0,RPC1,RPC2", "RPC0,RPC0,RPC2")):
        edited = llamacpp.read_placing(text.replace(old, new), "out")
        assert differs_from_export(edited, sidecar)
    away = by_layers((0, 1, 2, 1), executed=False)
    text, sidecar, _ = export_whole_layers(request_of("llamacpp", away, MODEL4))
    assert differs_from_export(llamacpp.read_placing(text, "out"), sidecar) == []
    for old, new in (("(1|3)", "(1)"), ("(2)", "(0)")):
        edited = llamacpp.read_placing(text.replace(old, new), "out")
        assert differs_from_export(edited, sidecar)


def test_where_attention_and_caches_are() -> None:
    """Of experts that are away the layers and caches have to be the head's, and all parts away."""
    away = by_layers((0, 1, 2, 1), executed=False)
    text = export_whole_layers(request_of("llamacpp", away, MODEL4))[0]
    placing = llamacpp.read_placing(text, "out")
    lines = [f"layer {n} assigned to device CPU" for n in range(5)]
    lines += [f"llama_kv_cache: layer {n}: dev = CPU" for n in range(4)]
    lines += [f"using device RPC{n} ({one})" for n, one in enumerate(placing.endpoints)]
    lines += [
        f"tensor blk.{layer}.ffn_{part}_exps.weight buffer type overridden to {buffer}"
        for layer, buffer in placing.overrides.items()
        for part in ("up", "gate", "down")
    ]
    assert verify_log(lines, placing, 4, "log") == []
    for old, new in (
        ("layer 0 assigned to device CPU", "layer 0 assigned to device RPC0"),
        ("layer 3: dev = CPU", "layer 3: dev = RPC1"),
        ("blk.1.ffn_down", "blk.1.ffn_side"),
    ):
        assert verify_log([line.replace(old, new) for line in lines], placing, 4, "log")


def test_what_a_cluster_has_room_for() -> None:
    """With a cluster, caches of the head's tokens count, and the engine's own division too."""
    trace, cluster = small_trace(), small_cluster(("0.04", "1"))
    model = dataclasses.replace(trace.model, kv_bytes_per_token=100_000)
    trace = dataclasses.replace(trace, model=model)
    servers = []
    for server in cluster.servers:
        gpu = dataclasses.replace(
            server.gpus[0], slots=None, memory_bytes=model.dense_bytes + 17 * 1_000_000
        )
        servers.append(dataclasses.replace(server, gpus=(gpu,)))
    cluster = dataclasses.replace(cluster, servers=tuple(servers))
    head = cluster.servers[0].name
    plan = solve(Instance.build(trace, cluster.with_users_of([head]), reserve_kv=False), "latency",
                 Options(whole_layers=True))  # fmt: skip
    found = {}
    for context in (1, 60, 1 << 20):
        request = ExportRequest(
            "llamacpp", plan, "p.json", "", model, "out", head, trace, cluster, None, context
        )
        try:
            found[context] = export_whole_layers(request)[1].replanned
        except Infeasible:
            found[context] = "infeasible"
    assert found[1] is None
    assert found[1 << 20] == "infeasible"
    at_home = dataclasses.replace(
        cluster,
        servers=tuple(dataclasses.replace(s, execute_at_home=True) for s in cluster.servers),
    )
    assert (plan.execution_table[0] != 0).any()
    request = ExportRequest(
        "llamacpp", plan, "p.json", "", model, "out", head, trace, at_home, None, 1
    )
    _, sidecar, again = export_whole_layers(request)
    assert "execute_at_home" in (sidecar.replanned or "")
    assert (again.execution_table[0] == 0).all()
