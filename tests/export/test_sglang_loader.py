"""Exports read by SGLang's own functions, from its wheel, on a CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from prism_plan.export.expert_maps.equal_slots import EqualSlots  # noqa: E402
from prism_plan.export.expert_maps.map_files import map_text  # noqa: E402
from prism_plan.export.expert_maps.projection import engines_own, project  # noqa: E402
from prism_plan.export.pipeline_partitions import default_partition  # noqa: E402
from prism_plan.model_spec import ModelSpec  # noqa: E402
from tests.export.drawn_models import model_of  # noqa: E402
from tests.limits import HANG_S  # noqa: E402

VERSION = "0.5.23"
FILES = ("sglang/srt/eplb/expert_location.py", "sglang/srt/distributed/utils.py")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of SGLang: of the folder $SGLANG, or of its wheel; skips where there is none."""
    given = os.environ.get("SGLANG")
    folder = Path(given) if given else tmp_path_factory.mktemp("sglang")
    if not (folder / FILES[0]).exists():
        words = ["download", "--no-deps", "-q", "-d", str(folder), f"sglang=={VERSION}"]
        done = subprocess.run(
            [sys.executable, "-m", "pip", *words], capture_output=True, text=True, timeout=HANG_S
        )
        wheels = list(folder.glob("*.whl"))
        if done.returncode or not wheels:
            pytest.skip(f"SGLang {VERSION} cannot be fetched: {done.stderr.strip()[-200:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name in FILES:
                wheel.extract(name, folder)
    return folder


def load(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def locations(sources: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """SGLang's module of expert locations; what it asks its runtime for is ``settings``."""
    settings = SimpleNamespace(
        parallel=SimpleNamespace(ep_size=1, nnodes=1, elastic_ep_initial_size=None, tp_size=1),
        moe=SimpleNamespace(
            ep_num_redundant_experts=0, ep_join_mode=None, moe_a2a_backend="deepep",
            ep_dispatch_algorithm="static", init_expert_location="",
        ),
    )  # fmt: skip
    context = types.ModuleType("sglang.srt.runtime_context")
    context.get_device = lambda: SimpleNamespace(device="cpu")  # type: ignore[attr-defined]
    context.get_exec = lambda: SimpleNamespace(moe=settings.moe)  # type: ignore[attr-defined]
    context.get_parallel = lambda: settings.parallel  # type: ignore[attr-defined]
    context.get_resources = lambda: SimpleNamespace()  # type: ignore[attr-defined]
    elastic = types.ModuleType("sglang.srt.elastic_ep.elastic_ep")
    elastic.elastic_expanded_world_enabled = lambda: False  # type: ignore[attr-defined]
    for name in ("sglang", "sglang.srt", "sglang.srt.elastic_ep"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, context.__name__, context)
    monkeypatch.setitem(sys.modules, elastic.__name__, elastic)
    module = load(sources / FILES[0], "sglang_expert_location")
    module.settings = settings
    yield module
    del sys.modules["sglang_expert_location"]


def remote_by_sglang(
    module: Any, path: Path, model: ModelSpec, ranks: list[int], calls: Any
) -> float:
    """Remote share by SGLang's dispatch tables, one a rank, of the map that it loads."""
    module.settings.parallel.ep_size = len(ranks)
    module.settings.parallel.nnodes = len(set(ranks))
    module.settings.moe.init_expert_location = str(path)
    loaded = json.loads(path.read_text())["physical_to_logical_map"]
    slots = len(loaded[0])
    module.settings.moe.ep_num_redundant_experts = slots - model.num_experts
    shape = SimpleNamespace(num_layers=len(loaded), num_logical_experts=model.num_experts)
    module.ModelConfigForExpertLocation.from_model_config = lambda config: shape
    of_rank = np.bincount(ranks)
    remote = 0.0
    for rank, server in enumerate(ranks):
        found = module.compute_initial_expert_location_metadata(None, rank)
        assert found.physical_to_logical_map.tolist() == loaded
        table = found.logical_to_rank_dispatch_physical_map.numpy()
        holders = np.array(ranks)[table // (slots // len(ranks))]
        for at, layer in enumerate(model.moe_layers):
            away = holders[layer] != server
            remote += float(calls[server, at][away].sum()) / of_rank[server]
    return remote / float(calls.sum())


@pytest.mark.long
@pytest.mark.parametrize("ranks", [[0, 1, 2], [0, 0, 1, 1], [0, 0, 0, 1, 1, 1]])
def test_sglang_calls_what_is_predicted(ranks: list[int], locations: Any, tmp_path: Path) -> None:
    """The map that it loads, and the traffic of its own dispatch tables: within 0.1 point.

    Also of its own balancing's map, which is worse.
    """
    model = model_of((1, 2, 3), 12, 4)
    rng = np.random.default_rng(len(ranks))
    calls = rng.exponential(size=(max(ranks) + 1, 3, 12)) ** 3
    shape = EqualSlots(tuple(ranks), 6)
    shares = []
    for found in (project("sglang", shape, calls), engines_own(shape, calls, "sglang")):
        path = tmp_path / "map.json"
        path.write_text(map_text("sglang", found.physical, model))
        theirs = remote_by_sglang(locations, path, model, ranks, calls)
        assert theirs == pytest.approx(found.share, abs=1e-3)
        shares.append(theirs)
    assert shares[0] < shares[1]


@pytest.mark.long
def test_sglang_reads_partitions(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reader gives the layers of each rank; its default is the one that is compared with."""
    text = (sources / FILES[1]).read_text()
    begin = text.index("def get_pp_indices(")
    scope: dict[str, Any] = {"os": os, "Tuple": tuple}
    exec(text[begin : text.index("return (start_layer, end_layer)") + 31], scope)
    monkeypatch.setenv("SGLANG_PP_LAYER_PARTITION", "6,8,13")
    found = [scope["get_pp_indices"](27, rank, 3) for rank in range(3)]
    assert found == [(0, 6), (6, 14), (14, 27)]
    monkeypatch.delenv("SGLANG_PP_LAYER_PARTITION")
    for layers in range(1, 30):
        for ranks in range(1, layers + 1):
            ends = [scope["get_pp_indices"](layers, rank, ranks) for rank in range(ranks)]
            counts = [end - begin for begin, end in ends]
            assert default_partition("sglang-pp", layers, ranks) == counts
