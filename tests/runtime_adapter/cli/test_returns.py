"""Servers that are killed and started again: they join under their names, and serve."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import click
import psutil
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from prism_plan.errors import InputError  # noqa: E402
from runtime_adapter.cli.store import command as store_command  # noqa: E402
from studies.faults.processes import own_store, store_children  # noqa: E402
from tests.limits import HANG_S  # noqa: E402
from tests.runtime_adapter.cli.test_faults import (  # noqa: E402
    MODEL,
    NAMES,
    OWN,
    fates,
    incarnation,
    refused,
    replicated,
    start,
)
from tests.runtime_adapter.cli.test_serve import alone, lines  # noqa: E402
from tests.runtime_adapter.replays import environment, experts_of  # noqa: E402
from tests.runtime_adapter.servers import Servers, family, gone  # noqa: E402

#: The store's processes, and what they are called.
PARTS = {"scheduler": "the scheduler", "service": "the store's service"}
#: Placements that are moved to: whose experts each server gets.
TURNS = ([1, 2, 0], [2, 0, 1])
SECRET = "a secret of the tests, of many bytes"


def written(path: Path, text: str) -> str:
    """A secret in a file that nobody else can read."""
    path.write_text(text)
    path.chmod(0o600)
    return str(path)


def prompts() -> list[str]:
    """Prompts whose answers have several tokens."""
    return [line["prompt"] for line in lines()["narrative"][:4]]


def experts_again(run: Servers, name: str, after: int) -> int:
    """How many experts a server holds that has joined again after an incarnation, 0 before."""
    members = {member["name"]: member for member in run.status().get("members", [])}
    if name not in members or members[name]["state"] != "up":
        return 0
    return int(members[name]["experts"]) if members[name]["incarnation"] > after else 0


def test_a_server_comes_back_to_the_run_of_a_store(tmp_path: Path) -> None:
    """A run with a secret and a store of its own, in which a server is killed and started again.

    By its journal it goes on with its requests: each is answered rightly, none twice. It gets the
    experts that it had, and all others have answered theirs meanwhile. Who has another secret takes
    no part; what servers log is JSON, if they are told so.
    """
    secret = written(tmp_path / "secret", SECRET)
    wrong = written(tmp_path / "wrong", SECRET.replace("many", "more"))
    options = (*OWN, "--timeout", "3", "--secret-file", secret, "--log-format", "json")
    journal = ("--journal", "edge-1.journal")
    with Servers(tmp_path, replicated(), f"tiny-{MODEL}", *options, secret=secret) as run:
        run.start_store("--secret-file", secret)
        for name in NAMES:
            run.start(name, None, *(journal if name == "edge-1" else ()))
        for name in NAMES:
            run.ask(name, {"prompt": prompts()[0], "id": "first"})
        run.until(lambda: all(run.answers(name) for name in NAMES))
        assert status(run, "--secret-file", secret) == (0, ["up"] * 3)
        for given in ((), ("--secret-file", wrong)):
            assert status(run, *given)[0] == 5
        run.start("edge-2", [], "--secret-file", wrong, called="stranger")
        assert run.codes(["stranger"]) == {"stranger": 5}
        assert "secret" in json.loads(run.said("stranger")[-1])["message"]

        before = incarnation(run, "edge-1")
        processes = [psutil.Process(run.processes["edge-1"].pid)]
        processes += family(processes[0].pid)
        for which in range(4):
            run.ask("edge-1", {"prompt": prompts()[which], "id": which})
        run.until(lambda: len(run.answers("edge-1")) >= 2)  # and others are under way, or wait
        accepted = accepted_by(tmp_path / "edge-1.journal")
        run.send("edge-1", signal.SIGKILL)
        run.until(lambda: gone(processes))
        kept = run.answers("edge-1")
        run.start("edge-1", None, *journal, "-o", "edge-1.jsonl", called="again")
        for name in ("edge-0", "edge-2"):  # they do not wait for it
            run.ask(name, {"prompt": prompts()[1], "id": "meanwhile"})
            run.until(lambda name=name: len(run.answers(name)) == 2)
        number = int(replicated().on_gpu[NAMES.index("edge-1")].sum())
        run.until(lambda: experts_again(run, "edge-1", before) == number)
        run.ask("again", {"prompt": prompts()[3], "id": "new"})
        run.until(lambda: "new" in [answer["id"] for answer in run.answers("edge-1")])
        assert status(run, "--secret-file", secret) == (0, ["up"] * 3)
        for name in ("edge-0", "edge-2", "again"):
            run.finish(name)
        assert set(run.codes(["edge-0", "edge-2", "again", "store"]).values()) == {0}
        answers = run.answers("edge-1")
        assert run.stats("again")["gpus"] == experts_of(replicated(), "edge-1")
        for name in (*NAMES, "again"):
            for line in run.said(name):
                values = json.loads(line)
                server = "edge-1" if name == "again" else name
                assert (values["server"], bool(values["message"])) == (server, True)
    assert answers[: len(kept)] == kept
    ids = [answer["id"] for answer in answers]
    assert len(set(ids)) == len(ids)
    assert {*accepted, "new"} <= set(ids)
    texts = {"first": prompts()[0], "new": prompts()[3], **dict(enumerate(prompts()))}
    for answer in answers:
        assert answer["error"] is None
        assert answer["tokens"] == alone(MODEL, texts[answer["id"]], 8)
    for name in ("edge-0", "edge-2"):
        for answer, prompt in zip(run.answers(name), prompts(), strict=False):
            assert answer["tokens"] == alone(MODEL, prompt, 8)


def accepted_by(journal: Path) -> list[Any]:
    """Ids of the requests that a journal has."""
    values = [json.loads(line) for line in journal.read_text().splitlines() if line.endswith("}")]
    return [value["line"]["id"] for value in values if "accept" in value]


def status(run: Servers, *options: str) -> tuple[int, list[str]]:
    """Exit code of ``prism-runtime status``, and the states that it tells, if any."""
    words = ["status", "--store", f"127.0.0.1:{run.port}", "--json", *options]
    done = subprocess.run(
        [sys.executable, "-m", "runtime_adapter", *words],
        env=environment(), capture_output=True, text=True, timeout=HANG_S, check=False,
    )  # fmt: skip
    members = json.loads(done.stdout)["members"] if done.stdout else []
    return done.returncode, [member["state"] for member in members]


def test_the_first_server_comes_back_with_its_store(tmp_path: Path) -> None:
    """The server that had started the store is killed and started again: so is the store.

    The others serve all the time, and take part in the new store's run; then the first one serves,
    with so many experts that each is on two servers again.
    """
    options = (*OWN, "--timeout", "3")
    with Servers(tmp_path, replicated(), f"tiny-{MODEL}", *options) as run:
        processes = start(run, prompts()[0])
        epoch = run.status()["epoch"]
        run.send("edge-0", signal.SIGKILL)
        run.until(lambda: gone(processes["edge-0"]))
        for name in ("edge-1", "edge-2"):
            run.ask(name, {"prompt": prompts()[1], "id": "without"})
            run.until(lambda name=name: len(run.answers(name)) == 2)
        run.start("edge-0", None, called="again")
        # incarnations are counted anew in a run whose store and first server are both new
        run.until(lambda: run.status().get("epoch") not in (None, epoch))
        run.until(lambda: experts_again(run, "edge-0", 0) and not run.status()["open_plans"])
        run.until(lambda: all(run.state(name) == "up" for name in NAMES))
        served = ("again", "edge-1", "edge-2")
        for name in served:
            run.ask(name, {"prompt": prompts()[2], "id": "with"})
        run.until(lambda: all("with" in [a["id"] for a in run.answers(name)] for name in served))
        for name in served:
            run.finish(name)
        assert set(run.codes(served).values()) == {0}
        held: Counter[tuple[str, int]] = Counter()
        for name in served:
            held.update(
                {(layer, n) for gpu in run.stats(name)["gpus"] for layer in gpu for n in gpu[layer]}
            )
        assert len(held) == replicated().model.num_pairs
        assert min(held.values()) == 2
    texts = {"first": prompts()[0], "without": prompts()[1], "with": prompts()[2]}
    for name in served:
        assert run.stats(name)["failed"] == 0
        for answer in run.answers(name):
            assert answer["error"] is None
            assert answer["tokens"] == alone(MODEL, texts[answer["id"]], 8)


def test_parts_of_the_store_are_killed(tmp_path: Path) -> None:
    """Scheduler and service are started again at once, which is said; requests and moves succeed.

    After the service was killed the store has forgotten the run: all servers join again, and none
    is taken for lost meanwhile.
    """
    targets = [replicated().replace(on_gpu=replicated().on_gpu[turn]) for turn in TURNS]
    with Servers(tmp_path, replicated(), f"tiny-{MODEL}", *OWN, "--movable") as run:
        start(run, prompts()[0])
        supervisor = own_store(run.processes["edge-0"].pid)
        assert supervisor is not None
        for (which, said), target in zip(PARTS.items(), targets, strict=True):
            epoch = run.status()["epoch"]
            (hit,) = store_children(supervisor)[which]
            hit.kill()
            told = f"prism-runtime: {said} has ended (signal 9); it is started again"
            run.until(lambda told=told: told in run.errors("edge-0"))
            for name in NAMES:
                run.ask(name, {"prompt": prompts()[1], "id": which})
            joins_again = which == "service"
            run.until(lambda e=epoch, j=joins_again: all_up(run, other_than=e if j else None))
            assert (run.status()["epoch"] != epoch) == joins_again
            run.until(
                lambda which=which: all(
                    which in [answer["id"] for answer in run.answers(name)] for name in NAMES
                )
            )
            code, text = run.move(target)
            assert code == 0, text
            assert run.errors("edge-0").count(told) == 1
        for name in NAMES:
            run.ask(name, {"prompt": prompts()[2], "id": "after"})
            run.finish(name)
        assert run.codes() == dict.fromkeys(NAMES, 0)
    texts = {"first": prompts()[0], **dict.fromkeys(PARTS, prompts()[1]), "after": prompts()[2]}
    for name in NAMES:
        assert run.stats(name)["gpus"] == experts_of(targets[-1], name)
        assert not any("is down" in line for line in run.errors(name))
        assert [answer["id"] for answer in run.answers(name)] == list(texts)
        for answer in run.answers(name):
            assert answer["error"] is None
            assert answer["tokens"] == alone(MODEL, texts[answer["id"]], 8)


def all_up(run: Servers, *, other_than: str | None) -> bool:
    """Whether all servers are up at the store, in another epoch than the one that is given."""
    now = run.status()
    states = [member["state"] for member in now.get("members", [])]
    return states == ["up"] * len(NAMES) and now["epoch"] != other_than


# --------------------------------------------------------------------------- before anybody joins


def test_a_run_that_others_reach_needs_a_secret(tmp_path: Path) -> None:
    """A server or a store at an address of other machines is refused, and told what to give."""
    error = refused(tmp_path, fates()[2], store="192.0.2.1:29400")
    assert error.exit_code == 2
    assert "secret_file" in str(error) or "secret-file" in str(error)
    assert "192.0.2.1" in str(error)
    for host in ("0.0.0.0", "192.0.2.1"):
        with pytest.raises((InputError, click.ClickException)) as caught:
            store_command.main(["--listen", f"{host}:0"], standalone_mode=False)
        assert isinstance(caught.value, InputError)
        assert host in str(caught.value)


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        ("short", 0o600, "5 bytes"),
        (SECRET, 0o644, "other users may read it"),
        (None, 0, "no such file"),
    ],
)
def test_secrets_that_are_none(text: str | None, mode: int, message: str, tmp_path: Path) -> None:
    """Refused before anybody is called, with the file's name."""
    path = tmp_path / "secret"
    if text is not None:
        path.write_text(text)
        path.chmod(mode)
    error = refused(tmp_path, fates()[2], **{"secret-file": str(path)})
    assert error.exit_code == 2
    assert str(path) in str(error)
    assert message in str(error)
