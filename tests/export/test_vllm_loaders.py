"""Exports read by vLLM's and vLLM-Ascend's own functions, from their sources, on a CPU."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from prism_plan.export.expert_maps.equal_slots import EqualSlots  # noqa: E402
from prism_plan.export.expert_maps.map_files import map_text  # noqa: E402
from prism_plan.export.expert_maps.projection import project  # noqa: E402
from prism_plan.export.expert_maps.replica_rules import remote_share  # noqa: E402
from prism_plan.export.pipeline_partitions import default_partition  # noqa: E402
from prism_plan.io.export import MapEngine  # noqa: E402
from tests.export.drawn_models import model_of  # noqa: E402
from tests.limits import HANG_S  # noqa: E402

VERSION = "0.33.0"
PARTITIONS = "vllm/distributed/utils.py"
ENGINES: tuple[MapEngine, ...] = ("vllm-ascend", "sglang")
MAPS = "vllm_ascend/eplb/core/eplb_utils.py"


@pytest.fixture(scope="module")
def partitions(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The reader of partitions of vLLM: of the folder $VLLM, or of its source release; or skips."""
    given = os.environ.get("VLLM")
    if given:
        return (Path(given) / PARTITIONS).read_text()
    folder = tmp_path_factory.mktemp("vllm")
    # it cannot be built without CUDA; what pip has unpacked by then is enough
    words = ["--no-deps", "--no-build-isolation", "--no-binary", "vllm", "--no-clean", "-q"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *words, "-d", str(folder), f"vllm=={VERSION}"],
        capture_output=True, text=True, timeout=HANG_S, env=os.environ | {"TMPDIR": str(folder)},
    )  # fmt: skip
    found = next(folder.glob(f"*/*/{PARTITIONS}"), None)
    if found is None:
        pytest.skip(f"vLLM {VERSION} cannot be fetched: {done.stderr.strip()[-200:]}")
    return found.read_text()


@pytest.mark.long
def test_vllm_reads_partitions(partitions: str) -> None:
    """Its reader gives the layers of each rank; its default is the one that is compared with.

    Ranks without layers pass in silence, which is why `check` refuses them.
    """
    begin = partitions.index("def get_pp_indices(")
    envs = SimpleNamespace(VLLM_PP_LAYER_PARTITION="6,8,13")
    scope: dict[str, Any] = {"envs": envs, "logger": logging.getLogger("vllm")}
    end = partitions.index("return (start_layer, end_layer)", begin) + 31
    exec(partitions[begin:end], scope)
    read = scope["get_pp_indices"]
    assert [read(27, rank, 3) for rank in range(3)] == [(0, 6), (6, 14), (14, 27)]
    with pytest.raises(ValueError, match="does not match"):
        read(28, 0, 3)
    envs.VLLM_PP_LAYER_PARTITION = "27,0,0"
    assert read(27, 1, 3) == (27, 27)
    envs.VLLM_PP_LAYER_PARTITION = None
    for layers in range(1, 30):
        for ranks in range(1, layers + 1):
            ends = [read(layers, rank, ranks) for rank in range(ranks)]
            assert default_partition("vllm-pp", layers, ranks) == [b - a for a, b in ends]


@pytest.fixture(scope="module")
def ascend() -> Any:
    """vLLM-Ascend's module of expert maps: of a checkout in $VLLM_ASCEND; skips without one."""
    given = os.environ.get("VLLM_ASCEND")
    if not given:
        pytest.skip("no vLLM-Ascend: set VLLM_ASCEND to a checkout of its commit 182b75ea")
    text = (Path(given) / MAPS).read_text()
    kept = [line for line in text.splitlines() if not line.startswith("from vllm.")]
    module = types.ModuleType("vllm_ascend_maps")
    module.logger = logging.getLogger("vllm")  # type: ignore[attr-defined]
    exec("\n".join(kept), module.__dict__)
    return module


@pytest.mark.long
@pytest.mark.parametrize("ranks", [[0, 1, 2], [0, 0, 1, 1], [0, 1, 1, 2]])
def test_ascend_calls_what_is_predicted(
    ranks: list[int], ascend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The map that it loads, and the traffic of its own tables: within 0.1 point.

    Also of the map that is the best one by SGLang's rule, and is not by this one.
    """
    monkeypatch.setattr(torch.Tensor, "npu", lambda tensor: tensor, raising=False)
    model = model_of((1, 2, 3), 12, 4)
    rng = np.random.default_rng(len(ranks))
    calls = rng.exponential(size=(max(ranks) + 1, 3, 12)) ** 3
    shape = EqualSlots(tuple(ranks), 6)
    of_rank = np.bincount(ranks)
    shares = []
    for physical in (project(engine, shape, calls).physical for engine in ENGINES):
        path = tmp_path / "map.json"
        path.write_text(map_text("vllm-ascend", physical, model))
        assert len(json.loads(path.read_text())["layer_list"]) == 3
        eplb = SimpleNamespace(
            expert_map_path=str(path), dynamic_eplb=False, num_redundant_experts=0
        )
        remote = 0.0
        for rank, server in enumerate(ranks):
            moe = SimpleNamespace(num_experts=12, ep_size=len(ranks), ep_rank=rank)
            for layer in range(3):
                _, local, table, redundant = ascend.init_eplb_config(eplb, layer, moe, tp_size=1)
                assert redundant == shape.physical - 12
                loaded = set(np.flatnonzero(local.numpy() >= 0).tolist())
                assert loaded == set(physical[layer, rank].tolist())
                away = np.array(ranks)[table.numpy() // shape.slots] != server
                remote += float(calls[server, layer][away].sum()) / of_rank[server]
        shares.append(remote / float(calls.sum()))
        predicted = remote_share("vllm-ascend", physical, ranks, calls)
        assert shares[-1] == pytest.approx(predicted, abs=1e-3)
    assert shares[0] < shares[1]
