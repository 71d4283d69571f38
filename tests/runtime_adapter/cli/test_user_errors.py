"""What a user of the runtime gets wrong is told in one line; nothing is lost or half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from prism_plan.placement import Placement
from tests.limits import HANG_S
from tests.runtime_adapter.cli.test_faults import (
    MODEL,
    NAMES,
    OWN,
    fates,
    refused,
)
from tests.runtime_adapter.replays import environment
from tests.runtime_adapter.servers import Servers


def runtime(*words: str) -> tuple[int, str]:
    """Exit code and standard error of the command, as a user gets them."""
    done = subprocess.run(
        [sys.executable, "-m", "runtime_adapter", *words],
        env=environment(), capture_output=True, text=True, timeout=HANG_S, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.returncode, done.stderr


def test_one_file_for_two_outputs(tmp_path: Path) -> None:
    """One of them would be lost: refused before anything is written, by any name."""
    (tmp_path / "link").symlink_to(tmp_path / "x")
    for changed in (
        {"output": str(tmp_path / "x"), "stats": str(tmp_path / "x")},
        {"output": str(tmp_path / "x"), "journal": str(tmp_path / "link")},
    ):
        error = refused(tmp_path, fates()[2], **changed)
        assert error.exit_code == 2
        assert "is given for two outputs; expected a file for each" in str(error)
        assert not (tmp_path / "x").exists()


def test_a_closed_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to read requests from."""
    monkeypatch.setattr(sys, "stdin", None)
    error = refused(tmp_path, fates()[2], requests="-")
    assert error.exit_code == 2
    assert "standard input: closed; expected requests" in str(error)


def test_a_journal_that_is_a_pipe(tmp_path: Path) -> None:
    """It is refused, and nobody is waited for at its other end."""
    os.mkfifo(tmp_path / "pipe")
    changed = {"journal": str(tmp_path / "pipe"), "output": str(tmp_path / "x")}
    assert "pipe: no regular file; expected a journal" in str(
        refused(tmp_path, fates()[2], **changed)
    )


def alone_with_all() -> tuple[str, Placement]:
    """A prompt, and the placement of one server that holds every expert."""
    lives, _, placement = fates()
    return lives, placement.replace(
        servers=NAMES[:1], gpu_capacity=((128,),),
        on_gpu=np.array([placement.on_gpu.any(axis=0)]),
    )  # fmt: skip


def test_a_request_for_which_there_is_no_cache_memory(tmp_path: Path) -> None:
    """A plan without a table has the cluster file's kv_tokens: longer requests are refused."""
    lives, alone = alone_with_all()
    text = 'name = "c"\n[[server]]\nname = "edge-0"\ntasks = { chat = 1.0 }\nkv_tokens = 3\n'
    (tmp_path / "c.toml").write_text(text + "[[server.gpu]]\nslots = 128\n")
    with Servers(tmp_path, alone, f"tiny-{MODEL}", *OWN) as run:
        run.start("edge-0", [{"prompt": lives}], "--cluster", str(tmp_path / "c.toml"))
        assert run.codes() == {"edge-0": 5}
        (answer,) = run.answers("edge-0")
    assert "tokens, prompt and answer; expected at most 3" in answer["error"]
    assert answer["tokens"] == []


def test_a_run_in_which_answers_cannot_be_written(tmp_path: Path) -> None:
    """A full disk ends the server with one line about the file, and exit code 2."""
    lives, alone = alone_with_all()
    with Servers(tmp_path, alone, f"tiny-{MODEL}", *OWN) as run:
        run.start("edge-0", [{"prompt": lives}], "-o", "/dev/full")
        assert run.codes() == {"edge-0": 2}
        assert run.errors("edge-0") == [
            "prism-runtime: /dev/full: cannot be written: No space left on device"
        ]


#: Runs the command, and prints a line when the first of its modules is loaded.
TELL_OF_LOADING = """
import sys
import runtime_adapter.cli

class Tell:
    def find_spec(self, *_):
        sys.meta_path.remove(self)
        print(flush=True)

sys.meta_path.insert(0, Tell())
runtime_adapter.cli.main()
"""


def test_ctrl_c_while_modules_load(tmp_path: Path) -> None:
    """Whenever it comes after the command has begun, there is no traceback."""
    words = [sys.executable, "-c", TELL_OF_LOADING]
    for wait_s in (0.0, 0.1, 0.3):
        process = subprocess.Popen(
            [*words, "status", "--store", "127.0.0.1:1", "--timeout", "600"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
            env=environment(),
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(wait_s)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=HANG_S)
        assert (process.returncode, said) == (130, "prism-runtime: interrupted\n")


def test_a_folder_for_placements_that_is_none(tmp_path: Path) -> None:
    """The store says so before it listens."""
    (tmp_path / "file").write_text("x")
    words = ("store", "--listen", "127.0.0.1:0", "--placements-dir", str(tmp_path / "file"))
    code, said = runtime(*words)
    last = said.splitlines()[-1]
    assert code == 2
    assert last.startswith(f"prism-runtime: {tmp_path}/file: cannot write to this folder: ")
    assert "the store listens" not in said


@pytest.mark.parametrize("pid", ["1", "0", "-5", "99999999999999"])
def test_a_parent_that_is_none(pid: str) -> None:
    """A store ends with the process that has started it, and with no other."""
    code, said = runtime("store", "--listen", "127.0.0.1:0", "--with-parent", pid)
    assert code == 2
    assert f"--with-parent: {pid}; expected the process that started this one" in said
    assert said.count("\n") == 1


def test_another_secret_is_told_with_the_address(tmp_path: Path) -> None:
    """Who has the wrong one reads whom it has asked, and which option to look at."""
    for name in ("secret", "other"):
        path = tmp_path / name
        path.touch(0o600)
        path.write_text(f"a {name} of this test, of many bytes")
    listen = ["store", "--listen", "127.0.0.1:0", "--secret-file", str(tmp_path / "secret")]
    with subprocess.Popen(
        [sys.executable, "-m", "runtime_adapter", *listen],
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as store:  # fmt: skip
        assert store.stderr is not None
        address = store.stderr.readline().split()[-1]
        code, said = runtime("status", "--store", address, "--secret-file", str(tmp_path / "other"))
        store.terminate()
    assert code == 5
    assert said == (
        f"prism-runtime: --store {address}: the other side does not know this run's secret; give "
        "both the same --secret-file\n"
    )
