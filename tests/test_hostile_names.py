"""Names of strangers' files on a terminal and in figures: every command, as a user runs it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

from prism_plan.io.trace_writer import write_trace
from prism_plan.printable_text import is_printable
from tests.cli.test_commands import SPEC
from tests.profiling.synthetic import synthetic_trace

Run = Callable[..., subprocess.CompletedProcess[bytes]]
#: What steers a terminal, reorders, hides, breaks lines, is markup of rich and mathtext of plots.
EVIL = "\x1b[31mRED\x1b]0;owned\x07\x7f\x9b2J\u202e\u2028\u200b[red]x[/] $\\frac{$ <b>&--\n# H"
TASKS = (f"x{EVIL}", f"y{EVIL}")


def cluster(name: str = EVIL) -> str:
    """A cluster whose servers and tasks have such names, in slots."""
    text = [f"name = {json.dumps(name)}"]
    for n, task in enumerate(TASKS):
        tasks = f"{{ {json.dumps(task)} = 1.0 }}"
        text.append(
            f"[[server]]\nname = {json.dumps(f'{n}{EVIL}')}\narrival_interval_s = 10.0\n"
            f"tasks = {tasks}\n[[server.gpu]]\nslots = 10"
        )
    return "\n".join(text)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hostile files of every kind that a stranger may give, and a file with a hostile name."""
    folder = tmp_path_factory.mktemp("hostile")
    spec = dataclasses.replace(SPEC, name=f"m{EVIL}")
    write_trace(folder / "t.parquet", synthetic_trace(spec, TASKS, requests=4, seed=1))
    (folder / "c.toml").write_text(cluster())
    (folder / "\x1b[31mc\u202e.toml").write_text('name = "\\u001b[2J"\n[[server]]\nevil\x85 = 1')
    (folder / "broken.json").write_text('{"format": "\\u001b[2J\\u009b"}')
    (folder / "dup.json").write_text('{"\\u009b2J": 1, "\\u009b2J": 2}')
    (folder / "model.json").write_text(json.dumps(SPEC.to_json() | {"name": EVIL}))
    rows = [f"{layer},{expert},{expert + 1}" for layer in (1, 2) for expert in range(8)]
    (folder / "counts.csv").write_text("layer,expert,count\n" + "\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(here: Path) -> Run:
    """Run the installed command; all that it says must be printable."""
    script = str(Path(sys.executable).parent / "prism-plan")

    def run(*arguments: str | bytes, code: int = 0) -> subprocess.CompletedProcess[bytes]:
        result = subprocess.run([script, *arguments], capture_output=True, cwd=here, check=False)
        assert result.returncode == code, result.stderr
        for stream in (result.stdout, result.stderr):
            text = stream.decode("utf-8")
            assert all(c == "\n" or is_printable(c) for c in text), text
        return result

    return run


ON = ("--cluster", "c.toml")


@pytest.fixture(scope="module")
def planned(run: Run) -> Path:
    """Placements of two solvers, planned by the command."""
    for solver in ("uniform", "exact"):
        result = run("solve", "t.parquet", *ON, "--solver", solver, "-o", f"{solver}.json")
        assert rb"0\x1b[31mRED\x1b]0;owned" in result.stdout
    return Path("exact.json")


def test_tables_and_json(run: Run, planned: Path, here: Path) -> None:
    """Names are told with escapes, markup literally; JSON has the exact names."""
    compared = run("compare", "t.parquet", "exact.json", *ON, "--solvers", "prism", "-o", "r.json")
    assert rb"[red]x[/]" in compared.stdout
    shown = json.loads(run("solve", "t.parquet", *ON, "--solver", "exact", "-o", "-").stdout)
    names = [server["name"] for server in shown["servers"]]
    assert names == [f"{n}{EVIL}" for n in range(2)]
    written = json.loads((here / planned).read_text(encoding="utf-8"))
    assert [server["name"] for server in written["servers"]] == names
    assert json.loads(run("diff", "uniform.json", "exact.json", "--json").stdout)
    for words in (
        ("diff", "uniform.json", "exact.json"),
        ("migrate", "uniform.json", "exact.json", *ON, "-o", "m.json"),
        ("migrate", "uniform.json", "exact.json", *ON, "--json"),
        ("check", "t.parquet", "c.toml", "exact.json", "r.json", "m.json", *ON, "--json"),
        ("check", "t.parquet", "c.toml", "exact.json", "r.json", "m.json"),
        ("simulate", "exact.json", "--trace", "t.parquet", *ON, "--requests", "2", "-o", "s.json"),
        (
            "profile", "--format", "counts", "--model", "model.json", f"z{EVIL}=counts.csv",
            "-o", f"{EVIL.replace('/', '')}.parquet",
        ),
    ):  # fmt: skip
        run(*words)
    for kind, file in (
        ("heatmap", "t.parquet"),
        ("placement", "exact.json"),
        ("comparison", "r.json"),
        ("cdf", "s.json"),
    ):
        run("plot", kind, file, "-o", f"{kind}.svg")
        root = ET.parse(here / f"{kind}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"


def test_errors(run: Run, planned: Path, here: Path) -> None:
    """File names, values, keys and messages of libraries are printable in one line each."""
    evil = os.fsencode("\x1b[31mc\u202e.toml")
    for words in (
        ("check", evil),
        ("check", "broken.json"),
        ("check", "dup.json"),
        ("check", b"none\xff\x1b[2J.json"),
        ("solve", "t.parquet", "--cluster", evil, "-o", "p.json"),
        ("solve", "t.parquet", *ON, "--solver", EVIL, "-o", "p.json"),
        ("solve", "t.parquet", *ON, f"--{EVIL}", "-o", "p.json"),
        (EVIL,),
        ("plot", "heatmap", "t.parquet", "--task", EVIL, "-o", "h.svg"),
    ):
        result = run(*words, code=2)
        assert result.stdout == b""
        assert result.stderr.count(b"\n") == 1
