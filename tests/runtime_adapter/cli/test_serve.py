"""Serving: several servers give the single process's tokens; what they listen to and unpickle."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import threading
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import runtime_adapter  # noqa: E402
from prism_plan.errors import InputError  # noqa: E402
from prism_plan.io.cluster import parse_cluster  # noqa: E402
from prism_plan.io.serve_requests import read_requests  # noqa: E402
from prism_plan.solvers import SOLVER_NAMES, Options, solve  # noqa: E402
from runtime_adapter.cli.serve import missing_kv_text  # noqa: E402
from runtime_adapter.moe.compute import ExpertCompute  # noqa: E402
from runtime_adapter.moe.placed_model import load_placed_model  # noqa: E402
from runtime_adapter.moe.router import uniform_network  # noqa: E402
from runtime_adapter.moe.thread_local_dispatcher import ThreadLocalDispatcher  # noqa: E402
from runtime_adapter.server import LocalServer  # noqa: E402
from runtime_adapter.server_config import MigrationConfig, ServerConfig  # noqa: E402
from runtime_adapter.transport.call_threads import run_in_parallel  # noqa: E402
from runtime_adapter.transport.nccl_channel import ChannelConfig  # noqa: E402
from runtime_adapter.transport.rendezvous import Rendezvous  # noqa: E402
from runtime_adapter.weights.checkpoint_loader import CheckpointLoader  # noqa: E402
from runtime_adapter.weights.server_experts import load_server_experts  # noqa: E402
from tests.runtime_adapter.checkpoints import CPU, TRACES, committed, reference  # noqa: E402
from tests.runtime_adapter.moe.test_placed_experts import instance, prompts  # noqa: E402
from tests.runtime_adapter.replays import experts_of, free_port  # noqa: E402
from tests.runtime_adapter.servers import Servers  # noqa: E402

NEW_TOKENS = 10
#: How the first server begins to tell of each move.
NOTE = "prism-runtime: migration "
#: Requests of a server that are under way or wait at any time while experts move.
OUTSTANDING = 3
TORCHRUN = (
    *("-m", "torch.distributed.run", "--nproc-per-node", "1", "--rdzv-backend", "static"),
    *("--master-addr", "127.0.0.1", "--master-port"),
)


@functools.cache
def lines() -> dict[str, list[dict[str, Any]]]:
    """The committed prompts by task."""
    text = (TRACES / "tiny-prompts.jsonl").read_text(encoding="utf-8")
    found: dict[str, list[dict[str, Any]]] = {}
    for line in map(json.loads, text.splitlines()):
        found.setdefault(line["task"], []).append(line)
    return found


@functools.cache
def alone(model: str, prompt: str, new_tokens: int = NEW_TOKENS) -> list[int]:
    """What the single process adds to a prompt, in float32."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TRACES / f"tiny-{model}")
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        found = reference(model, torch.float32).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
        )
    tokens: list[int] = found[0, ids.shape[1] :].tolist()
    return tokens


@pytest.mark.parametrize(
    ("model", "servers", "options"),
    [
        ("mixtral", 2, ["--route", "spread", "--transport", "gloo"]),
        ("mixtral", 4, ["--rtt-ms", "1"]),
        ("deepseek-v2", 3, ["--route", "spread", "--weights", "peer"]),
        ("deepseek-v2", 4, ["--transport", "gloo"]),
    ],
)
def test_tokens_are_those_of_one_process(
    model: str, servers: int, options: list[str], tmp_path: Path
) -> None:
    """Greedy tokens equal the whole model's, before, during and after moves to every placement.

    A run serves two requests at once on every server (of four servers the last has none and
    answers the others; of two both are started by torchrun) while it is led through placements of
    solvers, with four servers those of one half and else those of the other. What the servers count
    fits together: each expert call once, each layer of each pass, whatever the transport; and in
    the end each holds what the last placement says.
    """
    solvers = SOLVER_NAMES[servers == 4 :: 2]
    placements = [solve(instance(model, servers), name, Options(seed=1)) for name in solvers]
    names = placements[0].servers
    prompts = [line for task in lines().values() for line in task[:4]]
    asked: dict[str, list[dict[str, Any]]] = {name: [] for name in names[:3]}
    moved = threading.Event()
    failed = threading.Event()

    def keep_asking() -> None:
        """Every server has something to serve until the last move has ended."""
        try:
            while not moved.wait(0.01):
                for n, (name, sent) in enumerate(asked.items()):
                    if len(sent) - len(run.answers(name)) < OUTSTANDING:
                        line = {**prompts[(len(sent) + n) % len(prompts)]}
                        sent.append({**line, "id": f"{name}/{len(sent)}"})
                        run.ask(name, sent[-1])
        except OSError:  # a server has ended; what it said is shown by who waits for it
            failed.set()

    own = ["--concurrency", "2", "--dtype", "float32", "--max-new-tokens", str(NEW_TOKENS)]
    own += ["--movable", "--placements-dir", "out"]
    warm = (model, servers) != ("deepseek-v2", 3)  # these run the command as users do
    with Servers(tmp_path, placements[0], f"tiny-{model}", *own, *options, warm=warm) as run:
        for name in names:
            torchrun = (*TORCHRUN, str(free_port())) if servers == 2 else ()
            run.start(name, None if name in asked else [], launcher=torchrun)
        asking = threading.Thread(target=keep_asking)
        asking.start()
        try:
            run.until(lambda: all(len(run.answers(name)) > 2 for name in asked))
            before = {name: len(run.answers(name)) for name in asked}
            for placement in placements[1:]:
                code, text = run.move(placement)
                assert code == 0, text
            run.until(lambda: all(len(run.answers(name)) > before[name] for name in asked))
        finally:
            moved.set()
            asking.join()
        for name in asked:
            run.finish(name)
        assert set(run.codes().values()) == {0}, [run.errors(name) for name in names]
    assert not failed.is_set()
    assert len(list((tmp_path / "out").iterdir())) == len(placements) - 1
    remote = 0
    for name, wanted in asked.items():
        answers = {answer["id"]: answer for answer in run.answers(name)}
        assert sorted(answers) == sorted(line["id"] for line in wanted)
        passed = 0
        for line in wanted:
            answer = answers[line["id"]]
            assert answer["error"] is None
            assert answer["tokens"] == alone(model, line["prompt"])
            assert answer["arrival_s"] <= answer["start_s"] < answer["first_token_s"]
            assert answer["first_token_s"] <= answer["done_s"]
            passed += answer["prompt_tokens"] + len(answer["tokens"]) - 1
        stats = run.stats(name)
        assert stats["retries"] == 0
        assert stats["steps"] == passed * placements[0].model.num_layers
        assert stats["calls"] == stats["steps"] * placements[0].model.top_k
        token_bytes = 4 * 64
        assert stats["back_bytes"] == stats["destinations"] * token_bytes
        assert stats["out_bytes"] == stats["back_bytes"] + 4 * stats["remote_calls"]
        assert (stats["requests"], stats["failed"], stats["lost"]) == (len(wanted), 0, [])
        assert stats["gpus"] == experts_of(placements[-1], name)
        remote += stats["remote_calls"]
    for name in names:
        told = [text for text in run.errors(name) if not text.startswith(NOTE)]
        assert told == [] or servers == 2  # torchrun warns
        assert name == names[0] or told == run.errors(name)
        # one line a run: plans without a table do not say what is reserved for KV caches
        of_caches = [text for text in run.said(name) if "gives no kv_tokens" in text]
        assert len(of_caches) == (name == names[0])
    assert remote > 0
    if servers == 4:
        assert run.stats(names[-1])["requests"] == 0


@pytest.mark.parametrize("channels", [None, ChannelConfig("gloo", CPU)], ids=["tcp", "gloo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_over_the_links(dtype: Any, channels: ChannelConfig | None) -> None:
    """Two servers with their workers: logits of each are the whole model's, within tolerance.

    Gate weights travel with 18 bits of mantissa, partial sums in the model's dtype, whether they
    are in the messages or beside them.
    """
    model = "deepseek-v2"
    checkpoint = committed(model)
    placement = solve(instance(model, 2), "exact")
    port, spec = free_port(), checkpoint.spec

    def server(rank: int) -> LocalServer:
        store = load_server_experts(
            checkpoint, placement, rank, [CPU] * len(placement.gpu_capacity[rank]), dtype
        )
        config = ServerConfig(
            rendezvous=Rendezvous(2, rank, port=port),
            placement=placement,
            model=placement.model,
            network=uniform_network(2, spec.hidden_size * dtype.itemsize),
            compute=ExpertCompute(store),
            migration=MigrationConfig(CheckpointLoader(checkpoint.folder, store)),
            facts={},
            dtype=dtype,
            width=spec.hidden_size,
            max_tokens=512,
            channels=channels,
        )
        return LocalServer(config, lambda text: None)

    servers = [server(0), server(1)]
    whole = reference(model, dtype)
    try:
        run_in_parallel([one.__enter__ for one in servers])
        for one in servers:
            backend = ThreadLocalDispatcher()
            mine = load_placed_model(checkpoint, backend, dtype)
            with torch.no_grad(), backend.using(one.lanes[0], 1):
                difference = (mine(prompts()).logits - whole(prompts()).logits).float().abs()
            assert one.counters.to_json()["remote_calls"] > 0
            if dtype == torch.float32:
                assert difference.max() < 1e-3
            else:  # a token whose gate is nearly tied may go to another expert, hence the mean
                assert 0 < difference.mean() < 0.1
        run_in_parallel([one.finish for one in servers])
    finally:
        for one in servers:
            one.close()


def test_kv_caches_without_memory_are_told() -> None:
    """With a cluster file the servers whose users' caches have no memory are named, else what is.

    Nothing is said of a cluster that reserves it, or of a model without keys and values.
    """
    spec = committed("mixtral").spec
    text = (
        '[[server]]\nname = "a"\ntasks = { x = 1.0 }\nweight = 1.0\n[[server.gpu]]\nmemory_gb = 1'
    )
    cluster = parse_cluster(text)
    kept = parse_cluster(text.replace("weight", "kv_tokens = 5\nweight"))
    assert missing_kv_text("p.json", "c.toml", cluster, spec) == (
        "c.toml: nothing is reserved for the KV cache of a: kv_tokens is not given or 0"
    )
    assert missing_kv_text("p.json", "c.toml", kept, spec) == ""
    assert missing_kv_text("p.json", None, None, spec).startswith("p.json: gives no kv_tokens: ")
    stateless = dataclasses.replace(spec, kv_bytes_per_token=0)
    for known in (None, cluster):
        assert missing_kv_text("p.json", "c.toml", known, stateless) == ""


# ------------------------------------------------------------------------------------- by reading


def test_nothing_from_the_network_is_unpickled() -> None:
    """No module of the runtime has the means: pickles, object collectives, listeners, torch.load.

    multiprocessing's own pipe to a process that the server itself started is all there is.
    """
    modules = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "xmlrpc"}
    banned = {"rpc", "load", "Listener", "Client", "BaseManager", "init_process_group"}
    found = []
    for path in sorted(Path(runtime_adapter.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.split(".")[0] for alias in node.names}
                if isinstance(node, ast.ImportFrom):
                    words = (node.module or "").split(".")
                    names.add(words[0])
                    assert words[:2] != ["multiprocessing", "connection"]
                    assert words[:2] != ["multiprocessing", "managers"]
                found += [(path.name, name) for name in names & modules]
            elif isinstance(node, ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else ""
                unsafe = node.attr in banned and owner in ("torch", "dist", "multiprocessing")
                if unsafe or "_object" in node.attr:
                    found.append((path.name, node.attr))
            elif isinstance(node, ast.Name) and node.id in ("eval", "exec"):
                found.append((path.name, node.id))
    assert found == []


def test_requests_of_a_file(tmp_path: Path) -> None:
    """Lines in order of arrival, with what they leave out filled in; an empty file has none."""
    path = tmp_path / "requests.jsonl"
    path.write_text(
        '{"prompt": "late", "at_s": 2.5, "id": "x"}\n\n'
        '{"prompt": "two\\u2028lines", "task": "t", "max_new_tokens": 3}\n'
    )
    first, second = read_requests(path)
    assert (first.line, first.prompt, first.task) == (3, "two\u2028lines", "t")
    assert (first.id, first.at_s, first.max_new_tokens) == (None, 0.0, 3)
    assert (second.line, second.id, second.at_s, second.max_new_tokens) == (1, "x", 2.5, None)
    path.write_text("")
    assert read_requests(path) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: .*; expected \{\"prompt\": \.\.\.\}"),
        ("[]", r"line 2: \[\]; expected an object"),
        ('{"task": "t"}', "line 2: key 'prompt' is missing"),
        ('{"prompt": "a", "max_tokens": 3}', "did you mean 'max_new_tokens'"),
        ('{"prompt": " "}', "prompt: ' '; expected a non-empty text"),
        ('{"prompt": "a", "id": 1.5}', "id: 1.5; expected a text or a whole number"),
        ('{"prompt": "a", "at_s": -1}', "at_s: -1; expected at least 0"),
        ('{"prompt": "a", "at_s": 1e999}', "line 2"),
        ('{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens: 0; expected at least 1"),
    ],
)
def test_wrong_requests(line: str, message: str, tmp_path: Path) -> None:
    """Each is one message that names file, line and value."""
    path = tmp_path / "requests.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(InputError, match=message) as error:
        read_requests(path)
    assert str(path) in str(error.value)


def test_requests_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file, and one that is not UTF-8."""
    with pytest.raises(InputError, match="no such file"):
        read_requests(tmp_path / "none")
    (tmp_path / "bytes").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(InputError, match="byte 12 is not UTF-8"):
        read_requests(tmp_path / "bytes")
