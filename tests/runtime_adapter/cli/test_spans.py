"""Serving plans whose layers execute on several servers: tokens, counts and refusals."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from prism_plan.execution_table import spans  # noqa: E402
from prism_plan.io.calibration import read_calibration  # noqa: E402
from prism_plan.io.placement import read_placement  # noqa: E402
from prism_plan.placement import Placement  # noqa: E402
from prism_plan.solvers import Options, solve  # noqa: E402
from tests.runtime_adapter.checkpoints import committed  # noqa: E402
from tests.runtime_adapter.cli.test_faults import (  # noqa: E402
    MODEL,
    NAMES,
    incarnation,
    replicated,
)
from tests.runtime_adapter.cli.test_serve import alone, lines  # noqa: E402
from tests.runtime_adapter.moe.test_placed_experts import instance  # noqa: E402
from tests.runtime_adapter.replays import (  # noqa: E402
    PATIENCE_S,
    Material,
    Replays,
    cluster_text,
    environment,
    free_port,
    striped,
)
from tests.runtime_adapter.servers import Servers  # noqa: E402
from tests.warm_processes import start_warm  # noqa: E402

NEW_TOKENS = 8
#: What replay and simulator both count.
COUNTED = (
    "calls", "remote_calls", "messages", "out_bytes", "back_bytes", "hops", "hop_bytes", "retries",
)  # fmt: skip


def with_table(placement: Placement, table: Any, **others: Any) -> Placement:
    """The placement with an execution table int [N, L]."""
    return placement.replace(execution=np.array(table, np.int32), **others)


def hops_of(
    row: Any, home: int, prompt: int, passes: int, token_bytes: int, chunk: int = 0
) -> tuple[int, int]:
    """Messages between spans and home of one request, and their payload, by section 10's rules.

    Each chunk of a prompt is a message from span to span.
    """
    path = [span.server for span in spans(np.array(row))]
    tokens = prompt + passes - 1
    count, payload = 0, 0
    if path[0] != home:
        count, payload = 1, 4 * prompt
    chunks = math.ceil(prompt / (chunk or prompt))
    count += (chunks + passes - 1) * (len(path) - 1)
    payload += (len(path) - 1) * tokens * token_bytes
    for made in range(1, passes + 1):
        goes_on = made < passes and path[-1] != path[0]
        targets = {path[0], home} if goes_on else {home}
        count += len(targets - {path[-1]})
        payload += 4 * len(targets - {path[-1]})
    return count, payload


@pytest.mark.parametrize(("model", "servers", "chunk"), [("mixtral", 3, 0), ("deepseek-v2", 2, 5)])
def test_tokens_are_those_of_one_process(
    model: str, servers: int, chunk: int, tmp_path: Path
) -> None:
    """Greedy tokens of every home equal the single process's, and hops the rules' to the byte.

    Homes have different paths: with the first span elsewhere, with a server twice, all elsewhere.
    """
    spec = committed(model).spec
    layers = spec.num_layers
    placement = solve(instance(model, servers), "prism", Options(seed=1))
    generator = np.random.default_rng(3)
    table = generator.integers(0, servers, (servers, layers))
    table[0] = [servers - 1] * layers
    table[1, :2] = [1, 0]
    names = placement.servers
    prompts = [line for task in lines().values() for line in task[:2]]
    asked = {
        name: [{**line, "id": f"{name}/{i}"} for i, line in enumerate(prompts[n : n + 4])]
        for n, name in enumerate(names)
    }
    own = ["--concurrency", "2", "--dtype", "float32", "--max-new-tokens", str(NEW_TOKENS)]
    own += ["--prefill-chunk", str(chunk), "--transport", "gloo" if chunk else "tcp"]
    with Servers(tmp_path, with_table(placement, table), f"tiny-{model}", *own) as run:
        for name in names:
            run.start(name, asked[name])
        assert set(run.codes().values()) == {0}, [run.errors(name) for name in names]
        for n, name in enumerate(names):
            hops, hop_bytes = 0, 0
            assert len(run.answers(name)) == len(asked[name])
            for answer in run.answers(name):
                line = next(one for one in asked[name] if one["id"] == answer["id"])
                assert answer["tokens"] == alone(model, line["prompt"], NEW_TOKENS)
                found = hops_of(
                    table[n], n, answer["prompt_tokens"], len(answer["tokens"]),
                    4 * spec.hidden_size, chunk,
                )  # fmt: skip
                hops, hop_bytes = hops + found[0], hop_bytes + found[1]
            stats = run.stats(name)
            assert (stats["hops"], stats["hop_bytes"]) == (hops, hop_bytes)
            tokens = sum(a["prompt_tokens"] + len(a["tokens"]) - 1 for a in run.answers(name))
            assert stats["steps"] == tokens * layers
            assert stats["calls"] == tokens * layers * spec.top_k


def test_a_server_of_the_path_is_killed_and_comes_back(tmp_path: Path) -> None:
    """Tokens are right before, while and after a server that executes layers is away.

    Its own requests are lost with it, those of other homes go on over the servers that are left.
    When it is back, the run is moved to another placement and table: requests execute there, as
    their hops tell. Every expert has two copies; prompts go in chunks.
    """
    placement = replicated()
    layers = placement.model.num_layers
    table = [[0] * layers, [1, *[2] * (layers - 2), 0], [1, *[0] * (layers - 1)]]
    later = [[0, *[2] * (layers - 2), 1], [1] * layers, [2] * layers]
    turned = placement.replace(on_gpu=np.roll(placement.on_gpu, 1, axis=0))
    new_tokens, chunk = 60, 16
    own = ["--dtype", "float32", "--max-new-tokens", str(new_tokens), "--timeout", "3"]
    own += ["--prefill-chunk", str(chunk), "--movable"]
    prompts = [line["prompt"] for line in lines()["narrative"][:4]]
    with Servers(tmp_path, with_table(placement, table), f"tiny-{MODEL}", *own) as run:
        run.start_store("--placements-dir", "out")
        for name in NAMES:
            run.start(name, None)

        def ask(name: str, number: int) -> None:
            run.ask(name, {"prompt": prompts[number % 4], "id": number})

        def answered(name: str, number: int) -> bool:
            return number in [answer["id"] for answer in run.answers(name)]

        for name in NAMES:
            ask(name, 0)
        run.until(lambda: all(answered(name, 0) for name in NAMES))
        before = incarnation(run, "edge-2")
        for number in range(1, 9):
            ask("edge-0", number)
            ask("edge-1", number)
        run.until(lambda: answered("edge-1", 1))
        run.send("edge-2", signal.SIGKILL)
        run.until(lambda: all(answered(name, 8) for name in ("edge-0", "edge-1")))
        run.start("edge-2", None, called="again")
        run.until(lambda: incarnation(run, "edge-2") > before)
        ask("edge-1", 9)
        ask("again", 0)
        run.until(lambda: answered("edge-1", 9) and answered("again", 0))
        run.until(lambda: run.move(with_table(turned, later))[0] == 0)  # after the repair
        for name in ("edge-0", "edge-1", "again"):
            ask(name, 10)
        run.until(lambda: all(answered(name, 10) for name in ("edge-0", "edge-1", "again")))
        for name in ("edge-0", "edge-1", "again"):
            run.finish(name)
        assert set(run.codes(["edge-0", "edge-1", "again"]).values()) == {0}
        for name in (*NAMES, "again"):
            for answer in run.answers(name):
                assert answer["error"] is None
                prompt = prompts[answer["id"] % 4]
                assert answer["tokens"] == alone(MODEL, prompt, new_tokens)
        (last,) = (answer for answer in run.answers("edge-0") if answer["id"] == 10)
        token_bytes = 4 * committed(MODEL).spec.hidden_size
        stats = run.stats("edge-0")
        assert (stats["hops"], stats["hop_bytes"]) == hops_of(
            later[0], 0, last["prompt_tokens"], len(last["tokens"]), token_bytes, chunk
        )
    written = sorted((tmp_path / "out").iterdir())[-1]
    assert read_placement(written).execution.tolist() == later


@pytest.mark.parametrize("prompts", [True, False])
def test_a_replay_counts_what_the_simulator_counts(prompts: bool, tmp_path: Path) -> None:
    """Calls, messages, hops and payload of random tables equal the simulated ones to the byte.

    Also for recordings without prompts, whose first pass begins with one id.
    """
    import prism_plan as pp

    changes = {} if prompts else {"prompt_tokens": 0}
    material = Material(tmp_path, cluster_text(slots=16), **changes)
    table = np.random.default_rng(7).integers(0, 3, (3, material.spec.num_layers))
    table[0] = [1, 1, 0]
    placement = material.placement("p.json", striped(4, 0), execution=table.astype(np.int32))
    with Replays(material, "p.json", "--requests", "20") as run:
        assert set(run.wait().values()) == {0}, [run.errors(name) for name in run.names]
        stats = [run.stats(name) for name in run.names]
        for name in run.names:
            for result in run.results(name):
                assert result["error"] is None
                assert result["start_s"] < result["first_token_s"] <= result["done_s"]
    requests = pp.sample_requests(material.trace, material.cluster, requests_per_server=20)
    report = pp.simulate_placements(
        [("p", placement)], requests, material.trace, material.cluster
    ).to_json()
    (simulated,) = report["runs"]
    counted = {name: sum(one[name] for one in stats) for name in stats[0] if name in COUNTED}
    payload = counted.pop("out_bytes") + counted.pop("back_bytes") + counted.pop("hop_bytes")
    assert counted == {
        "calls": simulated["expert_calls"],
        "remote_calls": simulated["remote_calls"],
        "messages": simulated["messages"],
        "hops": simulated["hops"],
        "retries": 0,
    }
    assert payload == simulated["bytes_sent"]
    assert counted["hops"] > 0
    assert counted["messages"] > 0


def test_calibrate_measures_a_hop(tmp_path: Path) -> None:
    """The command writes a calibration that the simulator reads, with what a hop costs."""
    material = Material(tmp_path, cluster_text(2, slots=24))
    (tmp_path / "model.json").write_text(json.dumps(material.spec.to_json()))
    port = free_port()
    words = ["calibrate", "--cluster", "cluster.toml", "--model", "model.json"]
    words += ["--store", f"127.0.0.1:{port}", "--join", str(PATIENCE_S)]
    processes = []
    for name in ("s0", "s1"):
        own = ["--server", name, *(["-o", "cal.json"] if name == "s0" else [])]
        with open(tmp_path / f"{name}.err", "wb") as errors:
            processes.append(
                start_warm(
                    [*words, *own], cwd=tmp_path, env=environment(), stdin=False, output=errors
                )
            )
    assert [one.wait(PATIENCE_S) for one in processes] == [0, 0], (tmp_path / "s0.err").read_text()
    calibration = read_calibration(tmp_path / "cal.json")
    assert 0 < calibration.hop_overhead_ms < 1e3
    assert 0 < calibration.call_overhead_ms < 1e3
