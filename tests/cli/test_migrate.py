"""`prism-plan migrate` as a user sees it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from prism_plan.io.migration import read_migration
from prism_plan.io.placement import read_placement, write_placement
from prism_plan.io.text_files import sha256
from prism_plan.placement import Placement
from tests.migration.moves_by_hand import placed
from tests.migration.replay import check_plan

Run = Callable[..., CompletedProcess[str]]


def cluster(slots: list[int], forbid: str = "[]") -> str:
    """Servers s0, s1, ... of one GPU that loads 10 bytes per second; rules of the last one."""
    parts = ['name = "c"']
    for n, number in enumerate(slots):
        rule = forbid if n == len(slots) - 1 else "[]"
        parts.append(
            f'[[server]]\nname = "s{n}"\nweight = 1.0\nforbid = {rule}\n'
            f"[[server.gpu]]\nslots = {number}\nload_gbs = 1e-8"
        )
    return "\n".join(parts)


def swap(pairs: int = 2, slots: int = 1) -> tuple[Placement, Placement]:
    """Two sole copies that change places, and a third server with nothing to do."""
    a = placed([[0], [1], []], [slots] * 3, pairs=pairs)
    b = placed([[1], [0], []], [slots] * 3, pairs=pairs)
    return a, b


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a.json, b.json and c.toml."""
    for name, placement in zip("ab", swap(), strict=True):
        write_placement(tmp_path / f"{name}.json", placement)
    (tmp_path / "c.toml").write_text(cluster([1, 1, 1]))
    return tmp_path


def test_the_plan_is_written_and_told(prism_plan: Run, here: Path) -> None:
    """A table by server, the total, the time; the file is valid, timed, and leads from a to b."""
    result = prism_plan(
        "migrate", "a.json", "b.json", "--cluster", "c.toml", "-o", "m.json", cwd=here
    )
    assert result.returncode == 0, result.stderr
    assert "1 load of temporary copies" in result.stderr
    rows = {
        line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.strip()
    }
    assert rows["s0"] == ["1", "1", "0", "10", "B", "1.000", "s"]
    assert rows["s2"] == ["1", "1", "1", "10", "B", "1.000", "s"]
    assert rows["total"] == ["3", "3", "1", "30", "B", "1.000", "s"]
    assert "3.000 s with all GPUs side by side, 3.000 s one after the other" in result.stdout
    plan = read_migration(here / "m.json")
    a, b = (read_placement(here / f"{name}.json") for name in "ab")
    assert check_plan(plan, a, b) == []
    assert plan.inputs["from"].sha256 == sha256(here / "a.json")
    assert plan.inputs["to"].name == "b.json"
    checked = prism_plan("check", "m.json", cwd=here)
    assert checked.stdout == (
        "m.json: ok: migration: m on 3 servers, 3 loads (1 of them temporary) and 3 drops\n"
    )


def test_replicas_that_are_not_kept_are_told(prism_plan: Run, tmp_path: Path) -> None:
    """A target of two replicas: without a slot the line says which expert has one for a while."""
    a = placed([[0], [1], [0, 1], []], [1, 1, 2, 1], pairs=2)
    b = placed([[1], [0], [0, 1], []], [1, 1, 2, 1], pairs=2)
    two = b.replace(plan=dataclasses.replace(b.plan, min_replicas=2))
    for name, placement in (("a", a), ("b", two)):
        write_placement(tmp_path / f"{name}.json", placement)
    for slots, text in (
        (1, "every expert stays on 2 servers at every moment (on fewer where a.json or b.json has"),
        (0, "1 expert has fewer than 2 copies for a while, for no order was found that loads"),
    ):
        (tmp_path / "c.toml").write_text(cluster([1, 1, 2, slots]))
        result = prism_plan(
            "migrate", "a.json", "b.json", "--cluster", "c.toml", "-o", "m.json", cwd=tmp_path
        )
        assert result.returncode == 0, result.stderr
        assert text in result.stderr
        assert (
            "1 load of temporary copies that lead past full GPUs, 10 bytes" in result.stderr
        ) == (slots == 1)
        checked = prism_plan("check", "m.json", cwd=tmp_path)
        assert ("1 expert has fewer than 2 copies" in checked.stdout) == (slots == 0)


def test_standard_output_is_json_alone(prism_plan: Run, here: Path) -> None:
    """`-o -` and --json print the plan's bytes and nothing else."""
    common = ("migrate", "a.json", "b.json", "--cluster", "c.toml")
    for options in (["-o", "-"], ["--json"], ["--json", "-o", "-"], ["--json", "-o", "m.json"]):
        result = prism_plan(*common, *options, cwd=here)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["format"] == "prism-plan/migration"
    assert (here / "m.json").read_text() == result.stdout


def refused(prism_plan: Run, here: Path, *words: str) -> int:
    """The exit code of a command that says one line with the words, and writes nothing."""
    result = prism_plan(
        "migrate", "a.json", "b.json", "--cluster", "c.toml", "-o", "m.json", cwd=here
    )
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("prism-plan: ")
    for word in words:
        assert word in result.stderr
    assert not result.stdout
    assert not (here / "m.json").exists()
    return result.returncode


def test_no_order_exists(prism_plan: Run, here: Path) -> None:
    """Exit code 3 with the reason: a swap with every GPU full, or copies forbidden."""
    (here / "c.toml").write_text(cluster([1, 1, 1], forbid="[[3, 0], [3, 1]]"))
    assert refused(prism_plan, here, "b.json: infeasible", "no temporary copy may go where") == 3
    (here / "c.toml").write_text(cluster([1, 1, 0]))
    assert (
        refused(prism_plan, here, "every GPU is full", "layer 3 expert 0 on server 's0' gpu[0]")
        == 3
    )


def test_rules_of_the_cluster_steer_temporary_copies(prism_plan: Run, here: Path) -> None:
    """Where one of two experts may not go to the free slot, the other one does."""
    for forbidden in (0, 1):
        (here / "c.toml").write_text(cluster([1, 1, 1], forbid=f"[[3, {forbidden}]]"))
        result = prism_plan(
            "migrate", "a.json", "b.json", "--cluster", "c.toml", "--json", cwd=here
        )
        moved = {s["expert"] for s in json.loads(result.stdout)["steps"] if s["server"] == "s2"}
        assert moved == {1 - forbidden}


def test_bad_input(prism_plan: Run, here: Path) -> None:
    """Exit code 2: other model, other servers, over capacity, an expert left out, a bad rule."""
    a, b = swap()
    write_placement(here / "a.json", swap(pairs=3)[0])
    assert refused(prism_plan, here, "a.json: model", "made for another model") == 2
    write_placement(here / "a.json", placed([[0], [1]], [1, 1], pairs=2))
    assert refused(prism_plan, here, "a.json: servers", "as in b.json") == 2
    write_placement(here / "a.json", a)
    write_placement(here / "b.json", placed([[0, 1], [0], []], [2, 1, 1], pairs=2))
    assert refused(prism_plan, here, "b.json: server 's0' gpu[0] holds 2 experts", "1 slots") == 2
    write_placement(here / "b.json", placed([[0], [0], []], [1, 1, 1], pairs=2))
    assert refused(prism_plan, here, "b.json: layer 3 expert 1 is held nowhere") == 2
    write_placement(here / "b.json", b)
    (here / "c.toml").write_text(cluster([1, 1, 1], forbid="[[4, 0]]"))
    assert refused(prism_plan, here, "c.toml: server[2].forbid: layer 4") == 2
    (here / "c.toml").write_text(cluster([1, 1]))
    assert refused(prism_plan, here, "b.json: servers are", "plan it for c.toml") == 2


def test_the_cluster_may_have_more_room(prism_plan: Run, here: Path) -> None:
    """Its slots count where it gives them; else those that the placement states."""
    (here / "c.toml").write_text(cluster([2, 1, 1]))
    result = prism_plan("migrate", "a.json", "b.json", "--cluster", "c.toml", cwd=here)
    assert re.search(r"^ ?total +2 +2 +0 ", result.stdout, re.MULTILINE)
    memory = re.sub(r"slots = \d", "memory_gb = 40", cluster([1, 1, 1]))
    (here / "c.toml").write_text(memory)
    result = prism_plan("migrate", "a.json", "b.json", "--cluster", "c.toml", cwd=here)
    assert re.search(r"^ ?total +3 +3 +1 ", result.stdout, re.MULTILINE)


def test_experts_that_nobody_holds_are_told(prism_plan: Run, here: Path) -> None:
    """A first placement with gaps is taken, with a note."""
    write_placement(here / "a.json", placed([[0], [], []], [1] * 3, pairs=2))
    result = prism_plan("migrate", "a.json", "b.json", "--cluster", "c.toml", cwd=here)
    assert result.returncode == 0
    assert "1 expert held nowhere in a.json" in result.stderr
