"""Expert maps of equal slots: the best one by brute force, and files that engines load."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from prism_plan.errors import Infeasible, InputError, UnsupportedFeature
from prism_plan.execution_table import home_execution
from prism_plan.export.engine_checks import check_engine_file
from prism_plan.export.expert_maps import projection
from prism_plan.export.expert_maps.equal_slots import EqualSlots, equal_slots
from prism_plan.export.expert_maps.export_map import MapRequest, export_map
from prism_plan.export.expert_maps.map_files import map_text, read_map
from prism_plan.export.expert_maps.map_seconds import map_seconds
from prism_plan.export.expert_maps.projection import engines_own, project
from prism_plan.export.expert_maps.replica_rules import (
    called_ranks,
    local_share,
    nodes_of,
    remote_share,
)
from prism_plan.instance import Instance
from prism_plan.io.cluster import parse_cluster
from prism_plan.io.export import MapEngine, dump_export, export_from_json
from prism_plan.io.placement import write_placement
from prism_plan.io.trace_writer import write_trace
from prism_plan.latency.expected_latency import latency_of
from prism_plan.solvers import solve
from prism_plan.solvers.latency.problem import LatencyProblem
from tests.evaluate.simulation_material import SPEC, small_trace
from tests.export.drawn_models import drawn_model, model_of
from tests.limits import HANG_S
from tests.warm_processes import run_warm

ENGINES: tuple[MapEngine, ...] = get_args(MapEngine)


def called_rank(engine: MapEngine, rank: int, holders: list[int], ranks: list[int]) -> list[int]:
    """Ranks that an engine may call for one expert, each as often: its rule, written out."""
    nodes = nodes_of(ranks).tolist()
    if engine == "sglang":
        if rank in holders:
            return [rank]
        near = [other for other in holders if nodes[other] == nodes[rank]]
        return near or holders
    if engine == "vllm-ascend":
        return [holders[rank % len(holders)]]
    return holders


@pytest.mark.parametrize("engine", ENGINES)
def test_replica_rules(engine: MapEngine) -> None:
    """What stays on the server, rank by rank, for every holder set of some clusters."""
    for ranks in ([0, 0, 1, 1], [0, 1, 2], [0, 1, 1, 2], [0, 0]):
        for size in range(1, len(ranks) + 1):
            for holders in itertools.combinations(range(len(ranks)), size):
                for rank, share in enumerate(local_share(engine, holders, ranks)):
                    chosen = called_rank(engine, rank, list(holders), ranks)
                    here = [ranks[other] == ranks[rank] for other in chosen]
                    assert share == pytest.approx(sum(here) / len(here))


@pytest.mark.parametrize("engine", ENGINES)
def test_called_ranks(engine: MapEngine) -> None:
    """Over its turns a rank calls those that the rule says, each equally often."""
    for ranks in ([0, 0, 1, 1], [0, 1, 2], [0, 1, 1, 2], [0, 0]):
        sets = [
            list(holders)
            for size in range(1, len(ranks) + 1)
            for holders in itertools.combinations(range(len(ranks)), size)
        ]
        held = np.array([[[rank in holders for holders in sets]] for rank in range(len(ranks))])
        for rank in range(len(ranks)):
            called = [called_ranks(engine, held, ranks, rank, turn) for turn in range(12)]
            often = np.sum(called, axis=0)[:, 0]  # [R, sets]
            for holders, times in zip(sets, often.T.tolist(), strict=True):
                expected = called_rank(engine, rank, holders, ranks)
                share = 12 // len(expected)
                assert times == [share * (other in expected) for other in range(len(ranks))]


def test_seconds_of_maps() -> None:
    """Of single copies all engines take what the formula says; of copies everywhere none is called.

    TensorRT-LLM alone calls past its own copy, and a layer of single copies is called by all.
    """
    trace, cluster = small_trace(), three((24, 24, 24))
    instance = Instance.build(trace, cluster)
    problem = LatencyProblem(instance, cluster, trace, seed=0)
    layers, experts = trace.model.num_layers, trace.model.num_experts
    everywhere = np.broadcast_to(np.arange(experts), (layers, 3, experts))
    at_home = problem.expected(solve(instance, "exact")).mean_s
    assert map_seconds("sglang", everywhere, (0, 1, 2), problem) == pytest.approx(at_home)
    # a rank has the number of its replica where all ranks have one
    assert map_seconds("vllm-ascend", everywhere, (0, 1, 2), problem) == pytest.approx(at_home)
    assert map_seconds("trtllm", everywhere, (0, 1, 2), problem) > at_home
    slots = -(-experts // 3)
    single = np.broadcast_to(np.arange(3 * slots).reshape(3, slots), (layers, 3, slots))
    single = np.where(single < experts, single, np.arange(3)[None, :, None] * slots)
    on_gpu = np.zeros((3, layers, experts), bool)
    for layer, rank in np.ndindex(layers, 3):
        on_gpu[rank, layer, single[layer, rank]] = True
    table = home_execution(3, layers)
    expected = latency_of(on_gpu, table, problem.workload, problem.site).mean_s
    for engine in ENGINES:
        assert map_seconds(engine, single, (0, 1, 2), problem) == pytest.approx(expected)


def every_map(experts: int, ranks: int, slots: int) -> Any:
    """All maps of one layer with every expert somewhere and none twice on a rank."""
    held = list(itertools.combinations(range(experts), slots))
    for chosen in itertools.product(held, repeat=ranks):
        if len(set().union(*chosen)) == experts:
            yield np.array(chosen)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seed", range(4))
def test_no_map_is_better(engine: MapEngine, seed: int) -> None:
    """Against all maps of small layers; the bound is the optimum, every slot is used once."""
    rng = np.random.default_rng(seed)
    ranks = ((0, 0, 1), (0, 1, 2), (0, 0, 1, 1), (0, 1))[seed]
    experts, slots = 4, 2 if len(ranks) > 2 else 3
    calls = rng.exponential(size=(max(ranks) + 1, 2, experts))
    found = project(engine, EqualSlots(ranks, slots), calls)
    best = 0.0
    for layer in range(2):
        one = calls[:, layer : layer + 1]
        shares = [
            remote_share(engine, physical[None], ranks, one)
            for physical in every_map(experts, len(ranks), slots)
        ]
        best += min(shares) * one.sum() / calls.sum()
    assert found.share == pytest.approx(best)
    assert found.bound == pytest.approx(best, abs=1e-5)
    for layer in found.physical:
        assert set(layer.ravel()) == set(range(experts))
        assert all(len(set(rank)) == slots for rank in layer)


@pytest.mark.parametrize("engine", ENGINES)
def test_many_ranks(engine: MapEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not all sets of ranks are looked at the map is whole, and the bound below the best.

    SGLang's own nodes need no sets: its map stays the best one of 40 ranks.
    """
    rng = np.random.default_rng(5)
    shape = EqualSlots((0, 0, 1, 1, 2, 2), 3)
    calls = rng.exponential(size=(3, 2, 8)) ** 2
    best = project(engine, shape, calls)
    monkeypatch.setattr(projection, "MAX_COLUMNS", 8)
    found = project(engine, shape, calls)
    assert found.bound <= best.share <= found.share + 1e-6
    if engine == "sglang":
        assert found.share == pytest.approx(best.share)
        ranks = tuple(range(40))
        many = project(engine, EqualSlots(ranks, 3), rng.exponential(size=(40, 2, 64)))
        assert many.bound == pytest.approx(many.share)
        found = many
    else:
        assert found.share < engines_own(shape, calls, engine).share
    for layer in found.physical:
        assert set(layer.ravel()) == set(range(layer.max() + 1))
        assert all(len(set(rank)) == 3 for rank in layer)


def test_flow_and_sets_agree() -> None:
    """SGLang's best map by the flow has the share of the integer programme over all sets."""
    rng = np.random.default_rng(2)
    for ranks in ((0, 1, 2), (0, 0, 1, 1), (0, 1)):
        for slots in (3, 5):
            shape = EqualSlots(ranks, slots)
            calls = rng.exponential(size=(max(ranks) + 1, 3, 6)) ** 2
            physical, kept = projection._by_sets("sglang", shape, calls)
            assert remote_share("sglang", physical, ranks, calls) == pytest.approx(
                project("sglang", shape, calls).share
            )
            assert 1 - kept / calls.sum() == pytest.approx(project("sglang", shape, calls).bound)


def test_slots() -> None:
    """A rank has what the smallest GPU has room for; less than a layer is refused with numbers."""
    shape = equal_slots([[541], [541], [617, 617]], 26, 64)
    assert (shape.ranks, shape.slots, shape.physical) == ((0, 1, 2, 2), 20, 80)
    assert equal_slots([[99], [99]], 2, 8).slots == 8
    assert equal_slots([[99], [99]], 2, 8, 5).slots == 5
    with pytest.raises(InputError, match="slots: 9; expected 4 to 8"):
        equal_slots([[99], [99]], 2, 8, 9)
    with pytest.raises(Infeasible) as caught:
        equal_slots([[541], [541], [617]], 26, 64)
    assert "3 ranks of 20 slots a layer hold 60 of 64 experts; the smallest GPU needs 572" in str(
        caught.value
    )
    assert caught.value.shortfall == 4
    with pytest.raises(UnsupportedFeature, match="32 ranks at most"):
        project("trtllm", EqualSlots(tuple(range(33)), 2), np.ones((33, 1, 4)))


def test_files_of_drawn_maps(tmp_path: Path) -> None:
    """Every one of 210 maps passes its check, and reads back as it was."""
    rng = np.random.default_rng(0)
    for _ in range(70):
        model = drawn_model(rng)
        ranks = tuple(sorted(rng.integers(0, 3, int(rng.integers(1, 5))).tolist()))
        least = -(-model.num_experts // len(ranks))
        shape = EqualSlots(ranks, int(rng.integers(least, model.num_experts + 1)))
        calls = rng.exponential(size=(3, model.num_layers, model.num_experts))
        for engine in ENGINES:
            physical = project(engine, shape, calls).physical
            path = tmp_path / "map"
            path.write_text(map_text(engine, physical, model))
            sidecar_of(path, engine, shape)
            assert check_engine_file(str(path), engine, model)[1] == []
            rows, _ = read_map(engine, path.read_text(), "map")
            kept = list(rows.values())
            if engine == "sglang":
                assert len(kept) == model.num_decoder_layers
                kept = [rows[layer] for layer in model.moe_layers]
            assert np.array_equal(np.array(kept).reshape(physical.shape), physical)


def sidecar_of(path: Path, engine: MapEngine, shape: EqualSlots) -> None:
    """A sidecar of the file as it is, with these ranks and slots, and little else."""
    values = {
        "format": "prism-plan/export", "version": 1, "engine": engine, "checked_with": "x",
        "file": "map", "file_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "plan": "p", "plan_sha256": "", "home": None, "num_hidden_layers": 1,
        "stages": [], "held": [], "replanned": None, "engine_default": None,
        "expected_latency_s": None, "ranks": ["s"] * len(shape.ranks), "slots": shape.slots,
        "launch": [], "warnings": [],
    }  # fmt: skip
    Path(f"{path}.export.json").write_bytes(dump_export(export_from_json(values)))


MODEL = model_of((1, 2), 3, 3)
PHYSICAL = np.array([[[0, 1], [1, 2]], [[0, 2], [0, 1]]])
SPOILED: dict[MapEngine, list[tuple[str, str]]] = {
    "sglang": [
        ('"physical_to_logical_map"', '"map"'), ("{", '{"x": 1, '),
        ("[0, 1, 1, 2]", "[0, 1, 1, 1]"),
        ("[0, 1, 1, 2]", "[0, 1, 2]"), ("[0, 1, 1, 2]", "[0, 1, -1, 2]"),
        ("[0, 1, 1, 2]", "[0, 1, 3, 2]"), ("[0, 1, 1, 2]", "[0, 0, 1, 2]"),
        ("[0, 1, 1, 2], ", ""), ("[0, 1, 1, 2]", "[0, 1, 1, 2], [0, 1, 1, 2]"),
        ("[0, 1, 1, 2]", "[0, 1, 1.0, 2]"), ("[0, 1, 1, 2]", "7"), ("[[", "[["[:1]),
    ],
    "vllm-ascend": [
        ('"moe_layer_count": 2', '"moe_layer_count": 3'), ('"layer_id": 1', '"layer_id": 0'),
        ('"device_count": 2', '"device_count": 3'), ('"device_id": 1', '"device_id": 0'),
        ("[0, 1]", "[0, 0]"), ("[0, 1]", "[0]"), ("[0, 1]", "[0, 9]"), ("[0, 1]", "[0, -1]"),
        ('"device_list"', '"devices"'), ("[1, 2]", "[1, 0]"),
    ],
    "trtllm": [
        ("num_slots: 4", "num_slots: 5"), ("num_slots", "slots"), ("  1:", "  2:"),
        ("  1:", "  0:"), ("[0, 1", "[0 1"),
        ("[0, 1, 1, 2]", "[0, 1, 1, 1]"), ("[0, 1, 1, 2]", "[0, 1, 1]"), ("iter: 0", "iter: 2"),
        ("[0, 1, 1, 2]", "[0, 1, 1, 3]"), ("  1: [0, 1, 1, 2]\n", ""), ("[0, 1", "[0, x"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
def test_spoiled_maps_are_refused(engine: MapEngine, tmp_path: Path) -> None:
    """What engines accept in silence: a missing expert, a wrong number of layers or slots ..."""
    path = tmp_path / "map"
    text = map_text(engine, PHYSICAL, MODEL)
    path.write_text(text)
    sidecar_of(path, engine, EqualSlots((0, 1), 2))
    assert check_engine_file(str(path), engine, MODEL)[1] == []
    for old, new in SPOILED[engine]:
        assert old in text, (old, text)
        path.write_text(text.replace(old, new, 1))
        sidecar_of(path, engine, EqualSlots((0, 1), 2))
        try:
            problems = check_engine_file(str(path), engine, MODEL)[1]
        except InputError as error:
            problems = [str(error)]
        assert problems, (old, new)
        assert not any("\n" in problem for problem in problems)
    path.write_text(text.replace("0", "0 ", 1))
    with contextlib.suppress(InputError):
        assert "not the file that" in check_engine_file(str(path), engine, MODEL)[1][-1]


@pytest.mark.parametrize("engine", ENGINES)
def test_maps_unlike_their_sidecars(engine: MapEngine, tmp_path: Path) -> None:
    """A good map of other ranks, slots or another engine than the file beside it says."""
    path = tmp_path / "map"
    path.write_text(map_text(engine, PHYSICAL, MODEL))
    other: MapEngine = "trtllm" if engine == "sglang" else "sglang"
    for name, shape in (
        (engine, EqualSlots((0, 1), 3)),
        (engine, EqualSlots((0, 1, 1, 2), 2)),
        (other, EqualSlots((0, 1), 2)),
    ):
        sidecar_of(path, name, shape)
        assert check_engine_file(str(path), engine, MODEL)[1]


def test_rules_have_no_map() -> None:
    """A pinned expert would be nowhere in particular in a map, so that it is refused."""
    trace = small_trace()
    pinned = three(rule="pin = [[1, 0]]")
    plan = solve(Instance.build(trace, three()), "exact")
    with pytest.raises(UnsupportedFeature, match="without pinned experts"):
        export_map(MapRequest("sglang", plan, "p.json", "0" * 64, trace, pinned, "map"))


def three(slots: tuple[int, ...] = (15, 12, 9), rule: str = "") -> Any:
    text = ['name = "three"']
    for n, size in enumerate(slots):
        text += ["[[server]]", f'name = "s{n}"', f"tasks = {{ {'xyx'[n]} = 1.0 }}"]
        text += ["arrival_interval_s = 5.0", rule, "[[server.gpu]]", f"slots = {size}"]
    return parse_cluster("\n".join(text) + "\n")


@pytest.mark.parametrize("engine", ENGINES)
def test_shares_of_an_export(engine: MapEngine) -> None:
    """Each restriction costs something or nothing; the export beats what the engine does alone."""
    trace, cluster = small_trace(), three()
    plan = solve(Instance.build(trace, cluster), "exact")
    text, sidecar = export_map(
        MapRequest(engine, plan, "p.json", "0" * 64, trace, cluster, "map")
    )  # fmt: skip
    shares = sidecar.remote_share
    assert shares is not None
    assert plan.plan.remote_share == pytest.approx(shares.plan)
    assert shares.equal_memory is not None
    assert shares.equal_slots is not None
    assert shares.engine_default is not None
    assert shares.plan <= shares.equal_memory + 1e-12 <= shares.equal_slots + 2e-12
    assert shares.equal_slots <= shares.export + 1e-9
    assert shares.bound == pytest.approx(shares.export, abs=1e-6)
    assert shares.export <= shares.engine_default
    seconds = sidecar.expected_latency_s
    assert seconds is not None
    assert seconds.plan is not None
    assert 0 < seconds.plan < seconds.export
    assert (sidecar.ranks, sidecar.slots) == (["s0", "s1", "s2"], 3)
    if engine == "sglang":  # each server finds its own copies
        assert shares.export == pytest.approx(shares.equal_slots)
    assert export_from_json(json.loads(dump_export(sidecar))) == sidecar
    assert "all-to-all" in sidecar.warnings[0]
    assert text


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_need_be_remote(engine: MapEngine) -> None:
    """Where every rank has room for all experts no call leaves: also by TensorRT-LLM's turns.

    There a call goes to any replica, so that more slots than experts need are worse than fewer.
    """
    trace, cluster = small_trace(), three((24, 24, 24))
    plan = solve(Instance.build(trace, cluster), "exact")
    request = MapRequest(engine, plan, "p.json", "0" * 64, trace, cluster, "map")
    _, sidecar = export_map(request)
    assert sidecar.remote_share is not None
    if engine == "trtllm":
        _, full = export_map(dataclasses.replace(request, slots=8))
        assert full.remote_share is not None
        assert sidecar.remote_share.export < full.remote_share.export == pytest.approx(2 / 3)
        assert sidecar.slots is not None
        assert sidecar.slots < 8
    else:
        assert sidecar.remote_share.export == pytest.approx(0.0, abs=1e-12)
        assert sidecar.remote_share.bound == 0.0


def test_launch_lines_of_several_machines() -> None:
    """Each server starts its own ranks: those of vLLM by number, SGLang's nodes in order."""
    trace, cluster = small_trace(), three()
    plan = solve(Instance.build(trace, cluster), "exact")
    for engine, words in (
        ("sglang", [f"--nnodes 3 --node-rank {n} --dist-init-addr s0:29500" for n in range(3)]),
        (
            "vllm-ascend",
            [f"--data-parallel-size-local 1 --data-parallel-start-rank {n}" for n in range(3)],
        ),
    ):
        request = MapRequest(engine, plan, "p.json", "0" * 64, trace, cluster, "map")  # type: ignore[arg-type]
        launch = export_map(request)[1].launch
        assert [line.partition(":")[0] for line in launch] == ["on s0", "on s1", "on s2"]
        for line, expected in zip(launch, words, strict=True):
            assert expected in line


def test_the_engines_own_map_is_eplb() -> None:
    """On equal ranks it is the published algorithm: loads as equal as packing makes them."""
    calls = np.random.default_rng(1).exponential(size=(2, 3, 8))
    found = engines_own(EqualSlots((0, 0, 1, 1), 3), calls, "sglang")
    for layer in found.physical:
        assert set(layer.ravel()) == set(range(8))


def test_the_command(tmp_path: Path) -> None:
    """Export and check as a user calls them; a map that cannot be says by how many slots."""
    trace, cluster = small_trace(), three()
    write_trace(tmp_path / "t.parquet", trace)
    write_placement(tmp_path / "p.json", solve(Instance.build(trace, cluster), "exact"))
    text = ['name = "three"']
    for n, size in enumerate((15, 12, 9)):
        text += ["[[server]]", f'name = "s{n}"', f"tasks = {{ {'xyx'[n]} = 1.0 }}"]
        text += ["arrival_interval_s = 5.0", "[[server.gpu]]", f"slots = {size}"]
    (tmp_path / "c.toml").write_text("\n".join(text) + "\n")
    (tmp_path / "small.toml").write_text("\n".join(text).replace("= 9", "= 6") + "\n")
    (tmp_path / "m.json").write_text(json.dumps(SPEC.to_json()))

    def run(*words: str) -> Any:
        return run_warm(words, cwd=tmp_path, timeout_s=HANG_S)

    for engine in ENGINES:
        given = ("export", "p.json", "--engine", engine, "--trace", "t.parquet", "-o", "map")
        done = run(*given, "--cluster", "c.toml")
        assert done.returncode == 0, done.stderr
        assert "3 ranks of 3 slots a layer" in done.stderr
        checked = run("check", "--engine", engine, "map", "--model", "m.json")
        assert checked.returncode == 0, checked.stderr
        assert run("check", "map.export.json").returncode == 0
        done = run(*given, "--cluster", "small.toml")
        assert done.returncode == 3
        assert "3 ranks of 2 slots a layer hold 6 of 8 experts; the smallest GPU needs 9" in (
            done.stderr
        )
        for words, line in (
            (("--cluster", "c.toml", "--home", "s0"), "--home: has no effect on"),
            (("--cluster", "c.toml", "--slots", "4"), "slots: 4; expected 3 to 3"),
            ((), "--cluster: not given"),
        ):
            found = run(*given, *words)
            assert found.returncode == 2
            assert line in found.stderr
