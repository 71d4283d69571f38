"""Servers that are killed, hang, or cannot join: who says what within which time, who goes on."""

from __future__ import annotations

import functools
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from prism_plan.errors import PrismError  # noqa: E402
from prism_plan.io.placement import write_placement  # noqa: E402
from prism_plan.placement import Placement, SolveReport  # noqa: E402
from prism_plan.solvers import Options, solve  # noqa: E402
from runtime_adapter.cli.serve import command  # noqa: E402
from tests.runtime_adapter.checkpoints import TRACES, committed, reference  # noqa: E402
from tests.runtime_adapter.cli.test_serve import alone, lines  # noqa: E402
from tests.runtime_adapter.moe.test_placed_experts import instance  # noqa: E402
from tests.runtime_adapter.replays import free_port  # noqa: E402
from tests.runtime_adapter.servers import Servers, family, gone  # noqa: E402

MODEL = "deepseek-v2"
OWN = ("--dtype", "float32", "--max-new-tokens", "8")
NAMES = ("edge-0", "edge-1", "edge-2")


@functools.cache
def selected(prompt: str) -> Any:
    """Experts that a request needs, bool [L, E]."""
    found: list[Any] = []
    network = reference(MODEL, torch.float32)
    spec = committed(MODEL).spec
    from prism_plan.profiling.recording.expert_modules import find_experts

    hooks = [
        experts.module.register_forward_hook(
            lambda m, args, out, at=at: found.append((at, args[1]))
        )
        for at, experts in enumerate(find_experts(network).values())
    ]
    alone.cache_clear()
    alone(MODEL, prompt, 8)
    for hook in hooks:
        hook.remove()
    needed = np.zeros((spec.num_layers, spec.num_experts), bool)
    for at, chosen in found:
        needed[at, chosen.numpy().ravel()] = True
    return needed


@functools.cache
def fates() -> tuple[str, str, Placement]:
    """A prompt that lives without edge-2, one that does not, and the placement that makes it so.

    edge-2 alone holds what the second prompt needs and the first does not, and copies of the rest;
    edge-0 and edge-1 hold everything else, half of it each and the other half by turns.
    """
    spec = committed(MODEL).spec
    short = [line["prompt"][:24] for line in lines()["narrative"][:4]]
    lives, dies = short[0], lines()["arithmetic"][0]["prompt"]
    only = selected(dies) & ~selected(lives)
    assert only.any()
    rest = ~only
    half = np.indices(only.shape).sum(axis=0) % 2 == 0
    held = np.array([rest & half, rest & ~half, only | (rest & half)])
    slots = tuple((int(one.sum()),) for one in held)
    return lives, dies, Placement(spec.shape(), NAMES, slots, held, SolveReport("hand"))


def replicated() -> Placement:
    """Every expert on two of three servers."""
    import dataclasses

    problem = dataclasses.replace(instance(MODEL, 3), min_replicas=2)
    roomy = dataclasses.replace(problem, gpu_capacity=((90,), (90,), (90,)))
    return solve(roomy, "exact", Options())


def listening(pids: list[int]) -> set[tuple[str, int]]:
    """Addresses at which processes wait for connections or datagrams."""
    found = set()
    for pid in pids:
        for one in psutil.Process(pid).net_connections(kind="inet"):
            if one.status == psutil.CONN_LISTEN or (
                one.type == socket.SOCK_DGRAM and not one.raddr
            ):
                found.add((one.laddr.ip, one.laddr.port))
    return found


def disturb(address: tuple[str, int]) -> None:
    """Say to a port what a stray connection might."""
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 64, b"\xff" * 4096, os.urandom(999)):
        with socket.create_connection(address, timeout=5) as stray:
            stray.sendall(words)


def start(
    run: Servers, prompt: str, names: Sequence[str] = NAMES
) -> dict[str, list[psutil.Process]]:
    """Start three servers, wait until those of ``names`` have answered a first request.

    They take more requests when a test asks them; the others have none. Returns their processes.
    """
    for name in NAMES:
        run.start(name, None if name in names else [])
    for name in names:
        run.ask(name, {"prompt": prompt, "id": "first"})
    run.until(lambda: all(run.answers(name) for name in names))
    return {
        name: [psutil.Process(run.processes[name].pid), *family(run.processes[name].pid)]
        for name in NAMES
    }


def incarnation(run: Servers, name: str) -> int:
    """The incarnation under which a server is up, 0 if it is not."""
    members = run.status().get("members", [])
    up = [one for one in members if (one["name"], one["state"]) == (name, "up")]
    return int(up[0]["incarnation"]) if up else 0


def all_answered(run: Servers, name: str, requests: int) -> bool:
    """Whether a server has answered so many requests."""
    return len(run.answers(name)) == requests


def told(run: Servers, name: str, text: str) -> bool:
    """Whether a server has said something."""
    return any(text in line for line in run.errors(name))


@pytest.mark.parametrize(("how", "transport"), [("killed", "gloo"), ("hung", "tcp")])
def test_experts_of_a_lost_server(how: str, transport: str, tmp_path: Path) -> None:
    """Front and worker of a server are killed, or hang: both others name it, without being asked.

    Then requests that need experts that it alone held fail with a message that names it, those
    that do not are answered as before. Until then every socket listened at the loopback address
    only, and strangers that spoke to all of them did no harm.
    """
    lives, dies, placement = fates()
    asked = {"lives": lives, "dies": dies, "lives on": lives}
    options = [*OWN, "--timeout", "3", "--transport", transport]
    with Servers(tmp_path, placement, f"tiny-{MODEL}", *options) as run:
        processes = start(run, lives, NAMES[:2])
        pids = [one.pid for all_of in processes.values() for one in all_of]
        sockets = listening(pids)
        assert sockets
        assert {ip for ip, _ in sockets} == {"127.0.0.1"}
        for address in sorted(sockets):
            disturb(address)
        run.send("edge-2", signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        lost = "server 'edge-2' is down: "
        run.until(lambda: all(told(run, name, lost) for name in ("edge-0", "edge-1")))
        for name in ("edge-0", "edge-1"):
            for which, prompt in asked.items():
                run.ask(name, {"prompt": prompt, "id": which})
            run.finish(name)
        codes = run.codes(("edge-0", "edge-1"))
        assert codes == {"edge-0": 5, "edge-1": 5}
        run.send("edge-2", signal.SIGKILL)
        run.until(lambda: all(map(gone, processes.values())))
    for name in ("edge-0", "edge-1"):
        answers = {answer["id"]: answer for answer in run.answers(name)}
        assert sorted(answers) == ["dies", "first", "lives", "lives on"]
        for which in ("first", "lives", "lives on"):
            assert answers[which]["error"] is None
            assert answers[which]["tokens"] == alone(MODEL, lives, 8)
        assert "is held by no server that is still there; down: edge-2" in answers["dies"]["error"]
        assert run.stats(name)["lost"] == ["edge-2"]
        said = run.errors(name)
        assert all(line.startswith("prism-runtime: ") for line in said), said
        assert len(set(said)) == len(said), said
        assert "prism-runtime: 1 of 4 requests failed; see their errors" in said


def test_a_driver_that_hangs_alone(tmp_path: Path) -> None:
    """Its worker goes on answering: the others get all tokens, say what hangs, and end well."""
    lives, dies, placement = fates()
    with Servers(tmp_path, placement, f"tiny-{MODEL}", *OWN, "--timeout", "3") as run:
        start(run, lives)
        run.send("edge-2", signal.SIGSTOP, worker=False)
        for name in NAMES[:2]:
            run.ask(name, {"prompt": dies, "id": "second"})
            run.finish(name)
        codes = run.codes(NAMES[:2])
        assert codes == {"edge-0": 0, "edge-1": 0}
    for name in codes:
        for answer, prompt in zip(run.answers(name), (lives, dies), strict=True):
            assert answer["error"] is None
            assert answer["tokens"] == alone(MODEL, prompt, 8)
        assert run.errors(name) == [
            "prism-runtime: server 'edge-2': the process that serves its requests sent no "
            "heartbeat for 5 s; they are no longer waited for"
        ]


def test_a_worker_that_is_killed_alone(tmp_path: Path) -> None:
    """Its driver starts another one, which joins with the same experts: all requests are answered.

    Those of others that need an expert of its alone are among them.
    """
    lives, dies, placement = fates()
    with Servers(tmp_path, placement, f"tiny-{MODEL}", *OWN, "--timeout", "30") as run:
        processes = start(run, lives)
        before = incarnation(run, "edge-2")
        worker = next(one for one in processes["edge-2"] if "spawn_main" in str(one.cmdline()))
        worker.kill()
        run.until(lambda: told(run, "edge-2", "its worker has ended; it is started again"))
        run.until(lambda: incarnation(run, "edge-2") > before)
        for name in NAMES:
            run.ask(name, {"prompt": dies, "id": "second"})
            run.finish(name)
        assert run.codes() == dict.fromkeys(NAMES, 0)
    for name in NAMES:
        for answer, prompt in zip(run.answers(name), (lives, dies), strict=True):
            assert answer["error"] is None
            assert answer["tokens"] == alone(MODEL, prompt, 8)
        assert run.stats(name)["lost"] == []


def test_two_copies_outlive_the_first_server(tmp_path: Path) -> None:
    """The driver that hosts the store is killed: its worker goes too, and all requests go on.

    Every expert is on two servers, so both others still answer all of theirs, the right tokens,
    although one is done long before the other.
    """
    prompts = [line["prompt"] for line in lines()["ascii-word"][:3]]
    asked = ("edge-1", "edge-2")
    with Servers(tmp_path, replicated(), f"tiny-{MODEL}", *OWN, "--timeout", "3") as run:
        processes = start(run, prompts[0], asked)
        run.send("edge-0", signal.SIGKILL, worker=False)
        run.until(lambda: gone(processes["edge-0"]))
        run.until(lambda: all(told(run, name, "no store: ") for name in asked))
        for name in asked:  # one is done before the other has its requests
            for which in (1, 2):
                run.ask(name, {"prompt": prompts[which], "id": which})
            run.finish(name)
            run.until(functools.partial(all_answered, run, name, 3))
        codes = run.codes()
        assert codes == {"edge-0": -signal.SIGKILL, "edge-1": 0, "edge-2": 0}
        run.until(lambda: all(map(gone, processes.values())))
    for name in asked:
        assert [answer["error"] for answer in run.answers(name)] == [None] * 3
        for answer in run.answers(name):
            which = 0 if answer["id"] == "first" else answer["id"]
            assert answer["tokens"] == alone(MODEL, prompts[which], 8)


def test_who_cannot_join(tmp_path: Path) -> None:
    """A server with other options, and one whose name is taken.

    The latter is told so and disturbs nobody; the former is told so and the whole run ends at once,
    since it would never be complete.
    """
    lives, _, placement = fates()
    with Servers(tmp_path, placement, f"tiny-{MODEL}", *OWN) as run:
        run.start("edge-0")
        run.start("edge-1", [{"prompt": lives}])
        run.start("edge-1", called="second")
        first = ("edge-1", "second")
        run.until(lambda: any(run.processes[name].poll() is not None for name in first))
        taken = next(name for name in first if run.processes[name].poll() is not None)
        assert run.processes[taken].wait() == 2
        assert run.errors(taken) == [
            "prism-runtime: --server: server 'edge-1' is there already; start each server once"
        ]
        assert run.processes["edge-0"].poll() is None
        run.start("edge-2", [], "--route", "spread")
        codes = run.codes()
        assert codes["edge-2"] == 2
        reason = "server 'edge-2': --route: 'spread'; expected 'cover', as the first server has it"
        assert run.errors("edge-2") == [f"prism-runtime: {reason}"]
        for name in ("edge-0", next(name for name in first if name != taken)):
            assert codes[name] == 5
            assert run.errors(name) == [f"prism-runtime: server 'edge-2' does not join: {reason}"]


def test_a_server_that_never_comes_and_ctrl_c(tmp_path: Path) -> None:
    """Who waits in vain says for whom; Ctrl-C ends a server while it waits and while it serves."""
    lives, _, placement = fates()
    alive = placement.replace(
        servers=NAMES[:2],
        gpu_capacity=((128,), (128,)),
        on_gpu=np.array([placement.on_gpu.any(axis=0)] * 2),
    )
    with Servers(tmp_path, alive, f"tiny-{MODEL}", *OWN) as run:
        run.start("edge-0", [], "--join", "2")
        assert run.codes() == {"edge-0": 5}
        assert run.errors("edge-0") == ["prism-runtime: server 'edge-1' did not come within 2 s"]
        for name in NAMES[:2]:
            run.start(name, [{"prompt": lives}, {"prompt": lives, "at_s": 900.0}])
        run.until(lambda: all(run.answers(name) for name in NAMES[:2]))
        workers = [one for name in NAMES[:2] for one in family(run.processes[name].pid)]
        assert workers
        for name in ("edge-1", "edge-0"):
            os.killpg(run.processes[name].pid, signal.SIGINT)  # as a terminal does
            assert run.codes([name]) == {name: 130}
            assert run.errors(name)[-1] == "prism-runtime: interrupted"
        run.until(lambda: gone(workers))
        run.start("edge-0", called="waiting")
        run.until(lambda: any("the store listens" in line for line in run.said("waiting")))
        run.send("waiting", signal.SIGINT)
        assert run.codes(["waiting"]) == {"waiting": 130}


# --------------------------------------------------------------------------- before anybody joins


def refused(tmp_path: Path, placement: Placement, *options: str, **changed: str) -> PrismError:
    """What a server says that does not get as far as to meet the others."""
    write_placement(tmp_path / "p.json", placement)
    (tmp_path / "r.jsonl").write_text('{"prompt": "a"}\n')
    given = {
        "--placement": str(tmp_path / "p.json"),
        "--checkpoint": str(TRACES / f"tiny-{MODEL}"),
        "--requests": str(tmp_path / "r.jsonl"),
        "--server": "edge-0",
        "--store": f"127.0.0.1:{free_port()}",
        "--join": "1",
        **{f"--{name}": value for name, value in changed.items()},
    }
    words = [word for pair in given.items() for word in pair]
    with pytest.raises((PrismError, click.ClickException)) as error:
        command.main([*words, *options], standalone_mode=False)
    assert isinstance(error.value, PrismError)
    assert "\n" not in str(error.value)
    return error.value


def test_a_placement_of_another_model(tmp_path: Path) -> None:
    """Refused by the first field that differs."""
    error = refused(tmp_path, solve(instance("mixtral", 3), "exact"))
    assert error.exit_code == 2
    assert "p.json: model.num_experts" in str(error) or "moe_layers" in str(error)
    assert "tiny-deepseek-v2" in str(error)


def test_an_unknown_server(tmp_path: Path) -> None:
    """The message lists those that there are."""
    error = refused(tmp_path, fates()[2], server="edge-3")
    assert "unknown server 'edge-3'" in str(error)
    assert "edge-0, edge-1, edge-2" in str(error)


def test_a_missing_tensor(tmp_path: Path) -> None:
    """The message names file and tensor, of an expert and of the dense part."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(TRACES / f"tiny-{MODEL}", tmp_path / "checkpoint")
    whole = load_file(folder / "model.safetensors")
    for name in ("model.layers.2.mlp.experts.3.up_proj.weight", "model.norm.weight"):
        save_file(
            {key: value for key, value in whole.items() if key != name},
            folder / "model.safetensors",
        )
        error = refused(tmp_path, fates()[2], checkpoint=str(folder))
        assert f"model.safetensors: tensor {name} is missing" in str(error)


def test_too_few_slots_and_too_little_memory(tmp_path: Path) -> None:
    """More experts than slots, more slots than memory, an expert that is nowhere."""
    placement = fates()[2]
    few = placement.replace(gpu_capacity=((3,), *placement.gpu_capacity[1:]))
    assert "GPU 0: no free slot for layer" in str(refused(tmp_path, few))
    many = placement.replace(gpu_capacity=((10**9,), *placement.gpu_capacity[1:]))
    assert "bytes of experts, and" in str(refused(tmp_path, many))
    held = placement.on_gpu.copy()
    held[:, 1, 4] = False
    nowhere = str(refused(tmp_path, placement.replace(on_gpu=held)))
    assert "p.json: layer 2 expert 4 is on no server; expected every expert somewhere" in nowhere


def test_a_port_in_use(tmp_path: Path) -> None:
    """The message names the port, where what listens is no store, and where nobody listens."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        store = f"127.0.0.1:{other.getsockname()[1]}"
        error = refused(tmp_path, fates()[2], store=store)
    assert error.exit_code == 5
    assert f"the run's store at {store} does not answer within 1 s" in str(error)
    error = refused(tmp_path, fates()[2], server="edge-1")
    assert error.exit_code == 5
    assert "does not answer within 1 s (connection refused)" in str(error)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"concurrency": "0"}, "concurrency: 0; expected a whole number from 1 to 256"),
        ({"max-new-tokens": "0"}, "max_new_tokens: 0; expected a whole number from 1 to"),
        ({"threads": "-1"}, "threads: -1; expected a whole number from 1 to 1,024"),
        ({"max-new-tokens": "512"}, "line 1: 2 tokens and 512 new ones; expected 1 to 512"),
        ({"route": "nearest"}, "route: nearest needs to know the links; expected cluster"),
        (
            {"device": "cpu", "transport": "nccl"},
            "transport: nccl carries states between CUDA GPUs, and this server has none "
            "(device is cpu); give every server a GPU, or use transport tcp",
        ),
        ({"device": "tpu"}, "device: 'tpu'; expected auto, cpu, cuda"),
        ({"store": "nowhere"}, "store: 'nowhere'; expected HOST:PORT"),
        ({"output": "/no/such/folder/x"}, "/no/such/folder"),
        ({"timeout": "1e300"}, "timeout_s: 1e+300; expected seconds above 0, at most 1,000,000"),
        ({"request-timeout": "inf"}, "request_timeout_s: inf; expected seconds above 0"),
    ],
)
def test_wrong_options(changed: dict[str, str], message: str, tmp_path: Path) -> None:
    """One message that names the parameter, which the boundary tells as the option."""
    assert message in str(refused(tmp_path, fates()[2], **changed))
